"""Triton kernels over the rows of an activation matrix: LayerNorm with modulation, GELU, and quantization to int8.

Legend: M tokens, K columns of x, A columns of head, B images (M / B tokens each), P columns of quantized activations.
kernels/reference.py has the plain torch arithmetic of each launcher under its name without `_triton`.

A program holds one row in registers (see kernels/_row_parts.py), so that an element is read once however many passes
the arithmetic makes. All of them are bound by memory. x is float32, bfloat16 or float16; rows
wider than the registers hold raise ValueError.
"""
# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop changes its type)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._row_parts import (
    LARGEST_DIGITS,
    LARGEST_VALUE,
    add_up,
    dequantized,
    load_row,
    magnitude_bits,
    scales_of,
    store_quantized,
    store_row,
)
from kernels.reference import DIGITS, Quantized, plane_padded, quantized_width

_DIGITS = tl.constexpr(DIGITS)
_WIDEST_ROW = 32768  # 64 registers a thread at 16 warps
_ELEMENTS_A_THREAD = 32
_SMALLEST_CHUNK = 256  # columns a warp: 16 bytes a thread of 16-bit numbers
# tanh-GELU is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) = x / (1 + 2^(x (linear + cubic x^2))).
_GELU_LINEAR = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) / ln 2
_GELU_CUBIC = tl.constexpr(-0.10294323958002349)  # 0.044715 times that


@triton.jit
def _quantize_kernel(x_ptr, values_ptr, scale_ptr, sum_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + row * x_stride, WIDTH, BLOCK)
    finite, inverse, scale = scales_of(magnitude_bits(x), LARGEST_VALUE)
    total = store_quantized(values_ptr + row * WIDTH, x, finite, inverse, WIDTH, BLOCK)
    tl.store(scale_ptr + row, scale)
    tl.store(sum_ptr + row, total)


@triton.jit
def _rounded_kernel(x_ptr, y_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + row * x_stride, WIDTH, BLOCK)
    _, inverse, scale = scales_of(magnitude_bits(x), LARGEST_VALUE)
    store_row(y_ptr + row * WIDTH, dequantized(x, inverse, scale), WIDTH, BLOCK)


@triton.jit
def _digits_kernel(x_ptr, values_ptr, scale_ptr, sum_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + row * x_stride, WIDTH, BLOCK)
    finite, inverse, scale = scales_of(magnitude_bits(x), LARGEST_DIGITS)
    rest = ()
    zeros = ()
    for i in tl.static_range(len(x)):
        whole = tl.floor(x[i] * inverse + 0.5)
        rest += (tl.where(finite, whole, 0).to(tl.int32),)
        zeros += (tl.zeros([BLOCK], tl.int32),)
    row *= _DIGITS
    store_row(values_ptr + row * WIDTH, zeros, WIDTH, BLOCK)
    tl.store(scale_ptr + row, scale * 0)
    tl.store(sum_ptr + row, 0)
    for place in tl.static_range(1, _DIGITS):
        digits = ()
        left = ()
        for i in tl.static_range(len(x)):
            digit = ((rest[i] + 128) & 255) - 128
            digits += (digit,)
            left += ((rest[i] - digit) >> 8,)
        rest = left
        store_row(values_ptr + (row + place) * WIDTH, digits, WIDTH, BLOCK)
        tl.store(scale_ptr + row + place, scale)
        tl.store(sum_ptr + row + place, add_up(digits))
        scale *= 256


@triton.jit
def _norm_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,  # [M, K], int8 if QUANTIZE
    token_scale_ptr,  # [M] if QUANTIZE
    token_sum_ptr,
    x_stride,
    shift_stride,
    scale_stride,
    tokens_an_image,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // tokens_an_image).to(tl.int64)
    x = load_row(x_ptr + row * x_stride, WIDTH, BLOCK)
    shift = load_row(shift_ptr + image * shift_stride, WIDTH, BLOCK)
    scale = load_row(scale_ptr + image * scale_stride, WIDTH, BLOCK)

    mean = add_up(x) / WIDTH
    centered = ()
    squares = ()
    for i in tl.static_range(len(x)):
        chunk = x[i] - mean
        if (i + 1) * BLOCK > WIDTH:
            chunk = tl.where(i * BLOCK + tl.arange(0, BLOCK) < WIDTH, chunk, 0)
        centered += (chunk,)
        squares += (chunk * chunk,)
    inverse_deviation = tl.rsqrt(add_up(squares) / WIDTH + eps)
    y = ()
    for i in tl.static_range(len(x)):
        y += (shift[i] + centered[i] * inverse_deviation * (1 + scale[i]),)

    if QUANTIZE:
        finite, inverse, token_scale = scales_of(magnitude_bits(y), LARGEST_VALUE)
        total = store_quantized(y_ptr + row * WIDTH, y, finite, inverse, WIDTH, BLOCK)
        tl.store(token_scale_ptr + row, token_scale)
        tl.store(token_sum_ptr + row, total)
    else:
        store_row(y_ptr + row * WIDTH, y, WIDTH, BLOCK)


@triton.jit
def _gelu_kernel(
    x_ptr,
    head_ptr,  # not read where HEAD_WIDTH is 0
    y_ptr,  # [M, A + K], int8 if QUANTIZE
    token_scale_ptr,  # [M] if QUANTIZE
    token_sum_ptr,
    x_stride,
    head_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = load_row(head_ptr + row * head_stride, HEAD_WIDTH, HEAD_BLOCK)
    x = load_row(x_ptr + row * x_stride, WIDTH, BLOCK)
    y = ()
    for i in tl.static_range(len(x)):
        power = x[i] * (_GELU_LINEAR + _GELU_CUBIC * (x[i] * x[i]))
        # 1 / (1 + 2^power) as the square of a root: one fast instruction, and 0 where 2^power overflows.
        root = tl.rsqrt(1 + tl.exp2(power))
        y += (x[i] * root * root,)

    y_ptr += row * (HEAD_WIDTH + WIDTH)
    if QUANTIZE:
        bits = magnitude_bits(y)
        if HEAD_WIDTH:
            bits = tl.maximum(bits, magnitude_bits(head))
        finite, inverse, token_scale = scales_of(bits, LARGEST_VALUE)
        total = store_quantized(y_ptr + HEAD_WIDTH, y, finite, inverse, WIDTH, BLOCK)
        if HEAD_WIDTH:
            total += store_quantized(y_ptr, head, finite, inverse, HEAD_WIDTH, HEAD_BLOCK)
        tl.store(token_scale_ptr + row, token_scale)
        tl.store(token_sum_ptr + row, total)
    else:
        store_row(y_ptr, head, HEAD_WIDTH, HEAD_BLOCK)
        store_row(y_ptr + HEAD_WIDTH, y, WIDTH, BLOCK)


def quantize_triton(x_MK: Tensor) -> Quantized:
    """As `reference.quantize`, bit for bit."""
    x_MK = _rows(x_MK)
    tokens, width = x_MK.shape
    quantized = _empty_quantized(x_MK, width)
    warps = _warps(width)
    # Contracting multiplication and addition would round once where the reference rounds twice.
    _quantize_kernel[(tokens,)](
        x_MK, *quantized, x_MK.stride(0), width, _block(width, warps), num_warps=warps, enable_fp_fusion=False
    )
    return _padded(quantized)


def rounded_to_int8_triton(x: Tensor) -> Tensor:
    """As `reference.rounded_to_int8`, bit for bit."""
    x_MK = _rows(x.flatten(0, -2))
    tokens, width = x_MK.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    warps = _warps(width)
    _rounded_kernel[(tokens,)](
        x_MK, y, x_MK.stride(0), width, _block(width, warps), num_warps=warps, enable_fp_fusion=False
    )
    return y


def digits_triton(x_MK: Tensor) -> Quantized:
    """As `reference.digits`, bit for bit."""
    x_MK = _rows(x_MK)
    tokens, width = x_MK.shape
    quantized = _empty_quantized(x_MK, width, rows=DIGITS * tokens)
    warps = _warps(width)
    # Contracting multiplication and addition would round once where the reference rounds twice.
    _digits_kernel[(tokens,)](
        x_MK, *quantized, x_MK.stride(0), width, _block(width, warps), num_warps=warps, enable_fp_fusion=False
    )
    return _padded(quantized)


def norm_modulate_triton(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Tensor:
    """As `reference.norm_modulate`."""
    y_MK = torch.empty(x_MK.shape, dtype=x_MK.dtype, device=x_MK.device)
    _launch_norm(x_MK, shift_BK, scale_BK, eps, (y_MK, y_MK, y_MK), False)
    return y_MK


def norm_modulate_quantize_triton(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Quantized:
    """As `reference.norm_modulate_quantize`."""
    quantized = _empty_quantized(x_MK, x_MK.shape[1])
    _launch_norm(x_MK, shift_BK, scale_BK, eps, quantized, True)
    return _padded(quantized)


def gelu_triton(x_MK: Tensor, head_MA: Tensor | None) -> Tensor:
    """As `reference.gelu`."""
    width = x_MK.shape[1] + (0 if head_MA is None else head_MA.shape[1])
    y_MK = torch.empty(x_MK.shape[0], width, dtype=x_MK.dtype, device=x_MK.device)
    _launch_gelu(x_MK, head_MA, (y_MK, y_MK, y_MK), False)
    return y_MK


def gelu_quantize_triton(x_MK: Tensor, head_MA: Tensor | None) -> Quantized:
    """As `reference.gelu_quantize`."""
    quantized = _empty_quantized(x_MK, x_MK.shape[1] + (0 if head_MA is None else head_MA.shape[1]))
    _launch_gelu(x_MK, head_MA, quantized, True)
    return _padded(quantized)


def _launch_norm(
    x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float, outputs: tuple[Tensor, Tensor, Tensor], quantize: bool
) -> None:
    x_MK, shift_BK, scale_BK = _rows(x_MK), _rows(shift_BK), _rows(scale_BK)
    tokens, width = x_MK.shape
    warps = _warps(width)
    strides = (x_MK.stride(0), shift_BK.stride(0), scale_BK.stride(0))
    _norm_kernel[(tokens,)](
        x_MK, shift_BK, scale_BK, *outputs, *strides, tokens // shift_BK.shape[0], eps,
        width, _block(width, warps), quantize, num_warps=warps,
    )  # fmt: skip


def _launch_gelu(x_MK: Tensor, head_MA: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor], quantize: bool) -> None:
    x_MK = _rows(x_MK)
    tokens, width = x_MK.shape
    head, head_width = (x_MK, 0) if head_MA is None else (_rows(head_MA), head_MA.shape[1])
    warps = _warps(width + head_width)
    _gelu_kernel[(tokens,)](
        x_MK, head, *outputs, x_MK.stride(0), head.stride(0),
        width, _block(width, warps), head_width, _block(head_width, warps), quantize, num_warps=warps,
    )  # fmt: skip


@functools.cache
def _warps(width: int) -> int:
    """Warps of a program for rows of `width` columns. ValueError for rows too wide for registers."""
    if width > _WIDEST_ROW:
        raise ValueError(f"rows of {width} columns: the kernels hold a row in registers, at most {_WIDEST_ROW} columns")
    return min(max(triton.next_power_of_2(width) // (32 * _ELEMENTS_A_THREAD), 1), 16)


@functools.cache
def _block(width: int, warps: int) -> int:
    """Columns of a chunk where `warps` hold `width` columns."""
    whole = max(triton.next_power_of_2(width), 1)
    # 3 x 2^n columns, as FLUX has them, are three whole chunks; one chunk would be a quarter padding.
    block = whole // 4 if 4 * width <= 3 * whole else whole
    return max(block, min(_SMALLEST_CHUNK * warps, whole))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _empty_quantized(x_MK: Tensor, width: int, rows: int | None = None) -> Quantized:
    """Outputs without the padding of planes, which `_padded` adds where there is any; x's number of rows by default."""
    rows, device = rows or x_MK.shape[0], x_MK.device
    return Quantized(
        torch.empty(rows, width, dtype=torch.int8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )


def _padded(quantized: Quantized) -> Quantized:
    width = quantized.values_MP.shape[1]
    if quantized_width(width) == width:
        return quantized
    return quantized._replace(values_MP=plane_padded(quantized.values_MP))
