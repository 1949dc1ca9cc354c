"""The row of a token in registers: device functions of kernels/rowwise.py.

A row is a tuple of float32 chunks of BLOCK columns, a power of two, with zeros beyond the row's WIDTH columns.
"""
# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop changes its type)

import triton
import triton.language as tl

_SMALLEST_AMAX = tl.constexpr(1e-30)  # as in the reference
LARGEST_VALUE = tl.constexpr(127.0)
LARGEST_DIGITS = tl.constexpr(8323072.0)  # 127 x 256^2
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 x 2^23: v + it has v, rounded to nearest even, in its lowest mantissa bits
_ROUNDER_BITS = tl.constexpr(0x4B400000)  # the same number's float32 bits


@triton.jit
def load_row(row_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The float32 chunks of `WIDTH` columns: a tuple of tensors [BLOCK]."""
    chunks = ()
    for start in tl.static_range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        chunk = tl.load(row_ptr + columns) if start + BLOCK <= WIDTH else tl.load(row_ptr + columns, columns < WIDTH, 0)
        chunks += (chunk.to(tl.float32),)
    return chunks


@triton.jit
def store_row(row_ptr, chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(len(chunks)):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        chunk = chunks[i].to(row_ptr.dtype.element_ty)
        if (i + 1) * BLOCK <= WIDTH:
            tl.store(row_ptr + columns, chunk)
        else:
            tl.store(row_ptr + columns, chunk, columns < WIDTH)


@triton.jit
def add_up(chunks):
    total = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total += chunks[i]
    return tl.sum(total, 0)


@triton.jit
def magnitude_bits(chunks):
    """Largest magnitude as the bits of a float32: ordered as the numbers are, with NaN, which tl.max drops, on top."""
    amax = tl.abs(chunks[0])
    for i in tl.static_range(1, len(chunks)):
        amax = tl.maximum(amax, tl.abs(chunks[i]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(amax.to(tl.int32, bitcast=True), 0)


@triton.jit
def scales_of(amax_bits, LARGEST: tl.constexpr):
    """(whether the row is finite, what brings its largest magnitude to LARGEST, the scale that undoes it)."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    finite = amax < float("inf")
    amax = tl.maximum(amax, _SMALLEST_AMAX)
    # torch computes a number divided by a tensor as the reciprocal times the number.
    inverse = tl.div_rn(1.0, amax) * LARGEST
    scale = tl.where(finite, tl.div_rn(amax, LARGEST), float("nan"))
    return finite, inverse, scale


@triton.jit
def dequantized(chunks, inverse, scale):
    """What the chunks' values, rounded to nearest even, stand for; NaN in a row whose scale is."""
    values = ()
    for i in tl.static_range(len(chunks)):
        rounded = chunks[i] * inverse + _ROUNDER
        values += ((rounded.to(tl.int32, bitcast=True) - _ROUNDER_BITS).to(tl.float32) * scale,)
    return values


@triton.jit
def store_quantized(row_ptr, chunks, finite, inverse, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the chunks as int8; returns their sum."""
    total = 0
    if finite:
        values = ()
        for i in tl.static_range(len(chunks)):
            rounded = chunks[i] * inverse + _ROUNDER
            values += (rounded.to(tl.int32, bitcast=True) - _ROUNDER_BITS,)
        store_row(row_ptr, values, WIDTH, BLOCK)
        total = add_up(values)
    else:
        zeros = ()
        for _ in tl.static_range(len(chunks)):
            zeros += (tl.zeros([BLOCK], tl.int32),)
        store_row(row_ptr, zeros, WIDTH, BLOCK)
    return total
