"""What the matrix-product kernels share: the order of tiles, the decoding of packed codes, the epilogue.

Legend: BN x BM a tile of the result (output features x tokens), BJ packed bytes of a row that a step reads.
"""

import struct

import torch
import triton
import triton.language as tl


def _halves(value: float, dtype: torch.dtype) -> str:
    """`value` in both 16-bit halves of a word, as PTX."""
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16).item()) & 0xFFFF
    return f"0x{struct.pack('>HH', bits, bits).hex()}"


def _decode_int8(plane: int) -> str:
    """PTX of four codes 0, 1, 2 as int8, from four packed bytes."""
    return f"{{ .reg .b32 t; shr.b32 t, $1, {2 * plane}; and.b32 $0, t, 0x03030303; }}"


def _decode_16bit(plane: int, dtype: torch.dtype, offset: float, positions: int) -> str:
    """PTX of four signed codes in `dtype`, from four packed bytes.

    A byte is put into the low half of a 16-bit word whose other bits are those of `offset`, the number whose last
    mantissa bit is worth 1: offset + 4^p code, from which one exact multiply-add leaves code - 1. That holds for
    `positions` planes; bfloat16's mantissa is too short for the last one, which is shifted first.
    """
    shift = max(0, plane - positions + 1)
    scale = 4.0 ** (shift - plane)
    word = struct.unpack(">I", bytes.fromhex(_halves(offset, dtype)[2:]))[0]
    mask = 0x00030003 << (2 * (plane - shift))
    suffix = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    multiply_add = f"{_halves(scale, dtype)}", f"{_halves(-offset * scale - 1, dtype)}"
    lines = [
        ".reg .b32 t, m, a;",
        f"shr.b32 t, $2, {2 * shift};",
        f"mov.b32 m, {multiply_add[0]}; mov.b32 a, {multiply_add[1]};",
    ]
    for output, selector in ((0, "0x4140"), (1, "0x4342")):
        lines += [
            f"prmt.b32 ${output}, t, 0, {selector};",
            f"lop3.b32 ${output}, ${output}, {mask:#010x}, {word:#010x}, 0xEA;",
            f"fma.rn.{suffix} ${output}, ${output}, m, a;",
        ]
    return "{ " + " ".join(lines) + " }"


INT8 = tl.constexpr(tuple(_decode_int8(plane) for plane in range(4)))
BFLOAT16 = tl.constexpr(tuple(_decode_16bit(plane, torch.bfloat16, 128.0, 3) for plane in range(4)))
FLOAT16 = tl.constexpr(tuple(_decode_16bit(plane, torch.float16, 1024.0, 4) for plane in range(4)))


@triton.jit
def decode(packed, PLANE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Codes of a plane of the uint8 tile `packed`: int8 0, 1, 2 (the caller subtracts the tokens' sums), or -1, 0, 1.

    The compiler works on single bytes; the assembly does four codes by a shift and an AND (int8) or by two
    permutes, two LOP3 and two packed multiply-adds (16 bits). The interpreter runs no assembly, and multiplies the
    bits of bfloat16 as if they were integers: without ASSEMBLY a 16-bit DTYPE's codes are float32, as x has to be.
    """
    if not ASSEMBLY:
        codes = (packed >> (2 * PLANE)) & 3
        result = codes.to(tl.int8) if DTYPE.is_int8() else codes.to(tl.float32) - 1
    elif DTYPE.is_int8():
        result = tl.inline_asm_elementwise(INT8[PLANE], "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    elif DTYPE.is_bf16():
        result = tl.inline_asm_elementwise(
            BFLOAT16[PLANE], "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        result = tl.inline_asm_elementwise(FLOAT16[PLANE], "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    return result


@triton.jit
def tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(block of tokens, block of features) of a tile: GROUP blocks of tokens by all features, then the next group,
    so that the tiles in work at any time share their operands in the L2 cache.
    """
    first = tile // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def halves(acc):
    """The left and the right columns of a tile."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def store_tile(
    acc,  # [BN, BM] int32 or float32
    y_ptr,
    token_scale_ptr,
    token_sum_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    start_m,
    start_n,
    tokens,
    features,
    tokens_an_image,
    residual_stride,
    ONE_IMAGE: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """residual + gate x (acc, less the tokens' sums, x both scales + bias), in float32; stored as [tokens, features].

    The tile is turned round as it is, without any scale, so that everything else is read and written by rows. With
    DIGITS above 1 so many of acc's columns, as of x's rows, make up a token: it is their sum, each with its own scale.
    """
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1] // DIGITS
    acc = tl.trans(acc)
    offs_r = start_m + tl.arange(0, acc.shape[0])
    mask_r = offs_r < tokens
    if token_sum_ptr is not None:
        acc -= tl.load(token_sum_ptr + offs_r, mask_r, other=0)[:, None]
    y = acc.to(tl.float32)
    if token_scale_ptr is not None:
        y *= tl.load(token_scale_ptr + offs_r, mask_r, other=0)[:, None]
    if DIGITS > 1:
        y = tl.sum(y.reshape(BM, DIGITS, BN), 1)
    offs_m = start_m // DIGITS + tl.arange(0, BM)
    offs_n = start_n + tl.arange(0, BN)
    mask_m = offs_m < tokens // DIGITS
    mask_n = offs_n < features
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    y *= tl.load(scale_ptr + offs_n, mask_n, other=0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask_n, other=0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        if ONE_IMAGE:
            y *= tl.load(gate_ptr + offs_n, mask_n, other=0).to(tl.float32)[None, :]
        else:
            images = (offs_m // tokens_an_image)[:, None]
            y *= tl.load(gate_ptr + images * features + offs_n[None, :], mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows * residual_stride + offs_n[None, :], mask, other=0).to(tl.float32)
    tl.store(y_ptr + rows * features + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask)
