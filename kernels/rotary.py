"""Triton kernel of what precedes attention: RMSNorm of every head's query and key, then the rotary embedding.

Legend: B images, T text tokens, S tokens of an image, H heads, D head size, C columns of a token's projection (its
first H D are queries, the next H D keys). kernels/reference.py has the plain torch arithmetic.

A program takes one token, text or image, and writes its place in the joint sequence. It reads each element once, in
tiles of some heads by D columns, and is bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 4


@triton.jit
def _norm_rope_kernel(
    qkv_ptr,
    text_qkv_ptr,  # not read where text_tokens is 0, as the text's weights
    query_weight_ptr,
    key_weight_ptr,
    text_query_weight_ptr,
    text_key_weight_ptr,
    cos_ptr,  # [T + S, D], contiguous
    sin_ptr,
    query_ptr,  # [B, T + S, H, D], contiguous
    key_ptr,
    image_stride,  # between images and between tokens of qkv
    token_stride,
    text_image_stride,
    text_token_stride,
    text_tokens,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # heads a tile
):
    token = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    if token < text_tokens:
        row_ptr = text_qkv_ptr + image * text_image_stride + token.to(tl.int64) * text_token_stride
        row_query_weight_ptr = text_query_weight_ptr
        row_key_weight_ptr = text_key_weight_ptr
    else:
        row_ptr = qkv_ptr + image * image_stride + (token - text_tokens).to(tl.int64) * token_stride
        row_query_weight_ptr = query_weight_ptr
        row_key_weight_ptr = key_weight_ptr
    out_row = (image * tl.num_programs(0) + token) * (HEADS * SIZE)

    # Weights and rotations are loaded as tiles whose rows are alike, so that a thread's columns are those of its x.
    columns = tl.arange(0, SIZE)[None, :]
    tile_columns = columns + tl.zeros([BLOCK, 1], tl.int32)
    cos_real, cos_imaginary = pairs(tl.load(cos_ptr + token * SIZE + tile_columns).to(tl.float32), BLOCK, SIZE)
    sin_real, sin_imaginary = pairs(tl.load(sin_ptr + token * SIZE + tile_columns).to(tl.float32), BLOCK, SIZE)
    for part in tl.static_range(2):
        weight = tl.load((row_key_weight_ptr if part else row_query_weight_ptr) + tile_columns).to(tl.float32)
        out_ptr = key_ptr if part else query_ptr
        for first_head in tl.static_range(0, HEADS, BLOCK):
            head = first_head + tl.arange(0, BLOCK)[:, None]
            offsets = head * SIZE + columns
            x = tl.load(row_ptr + part * (HEADS * SIZE) + offsets, head < HEADS, 0).to(tl.float32)
            inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
            real, imaginary = pairs(x * inverse_rms[:, None] * weight, BLOCK, SIZE)
            y = tl.join(real * cos_real - imaginary * sin_real, imaginary * cos_imaginary + real * sin_imaginary)
            y = tl.reshape(y, [BLOCK, SIZE]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_row + offsets, y, head < HEADS)


@triton.jit
def pairs(x, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Even and odd columns of a tile [BLOCK, SIZE], each [BLOCK, SIZE / 2]: a thread holds both already."""
    return tl.split(tl.reshape(x, [BLOCK, SIZE // 2, 2]))


def qk_norm_rope_triton(
    qkv_BSC: Tensor,
    text_qkv_BTC: Tensor | None,
    heads: int,
    weights: tuple[Tensor, Tensor],
    text_weights: tuple[Tensor, Tensor] | None,
    cos_SD: Tensor,
    sin_SD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.qk_norm_rope`. ValueError where the head size is no power of two."""
    images, tokens, _ = qkv_BSC.shape
    size = weights[0].shape[0]
    if size & (size - 1):
        raise ValueError(f"heads of {size} columns: the kernel takes powers of two")
    qkv_BSC = _rows(qkv_BSC)
    if text_qkv_BTC is None or text_weights is None:
        text_qkv_BTC, text_weights, text_tokens = qkv_BSC, weights, 0
    else:
        text_qkv_BTC, text_tokens = _rows(text_qkv_BTC), text_qkv_BTC.shape[1]
    shape = (images, text_tokens + tokens, heads, size)
    query_BSHD = torch.empty(shape, dtype=qkv_BSC.dtype, device=qkv_BSC.device)
    key_BSHD = torch.empty(shape, dtype=qkv_BSC.dtype, device=qkv_BSC.device)
    _norm_rope_kernel[(text_tokens + tokens, images)](
        qkv_BSC, text_qkv_BTC, *weights, *text_weights, cos_SD.contiguous(), sin_SD.contiguous(), query_BSHD, key_BSHD,
        *qkv_BSC.stride()[:2], *text_qkv_BTC.stride()[:2], text_tokens, eps, heads, size, _heads_a_tile(heads),
        num_warps=_WARPS,
    )  # fmt: skip
    return query_BSHD, key_BSHD


def _heads_a_tile(heads: int) -> int:
    # As in kernels/rowwise.py: 3 x 2^n heads are three whole tiles.
    whole = triton.next_power_of_2(heads)
    return whole // 4 if whole >= 4 and 4 * heads <= 3 * whole else whole


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
