"""Triton kernels of kernels/training.py, whose plain torch arithmetic, legend included, they follow.

All are bound by memory: an element is read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rotary import pairs
from kernels.rowwise import rounded_to_int8_triton as rounded_to_int8

__all__ = ["latent_weight", "latent_weight_backward", "norm_rope", "norm_rope_backward", "rounded_to_int8"]

_ELEMENTS = 2048  # of a tile
_PROGRAMS = 512  # that share a norm's rows in its backward pass; fixed, for they add up the weight's gradient
_WARPS = 4


@triton.jit
def _latent_weight_kernel(latent_ptr, log_scale_ptr, weight_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.exp(tl.load(log_scale_ptr + row))
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        latent = tl.load(latent_ptr + row * K + column, column < K, 0)
        weight = tl.where(tl.abs(latent) > 0.5, tl.where(latent > 0, scale, -scale), 0)
        tl.store(weight_ptr + row * K + column, weight.to(weight_ptr.dtype.element_ty), column < K)


@triton.jit
def _latent_weight_backward_kernel(
    grad_ptr, latent_ptr, log_scale_ptr, grad_latent_ptr, grad_log_scale_ptr, K, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.exp(tl.load(log_scale_ptr + row))
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        latent = tl.load(latent_ptr + row * K + column, column < K, 0)
        grad = tl.load(grad_ptr + row * K + column, column < K, 0).to(tl.float32)
        sums += tl.where(tl.abs(latent) > 0.5, tl.where(latent > 0, grad, -grad), 0)
        grad_latent = (grad * scale).to(grad_latent_ptr.dtype.element_ty)
        tl.store(grad_latent_ptr + row * K + column, grad_latent, column < K)
    tl.store(grad_log_scale_ptr + row, tl.sum(sums) * scale)


@triton.jit
def _norm_rope_forward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,  # B S H
    heads,
    tokens,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # rows a tile
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, SIZE)[None, :]
    offsets, inside = row.to(tl.int64)[:, None] * SIZE + column, (row < rows)[:, None]
    turns = ((row // heads) % tokens)[:, None] * SIZE + column
    weight = tl.load(weight_ptr + column + tl.zeros([BLOCK, 1], tl.int32)).to(tl.float32)
    x = tl.load(x_ptr + offsets, inside, 0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None] * weight
    cos_real, cos_imaginary = pairs(tl.load(cos_ptr + turns), BLOCK, SIZE)
    sin_real, sin_imaginary = pairs(tl.load(sin_ptr + turns), BLOCK, SIZE)
    real, imaginary = pairs(normed, BLOCK, SIZE)
    y = tl.join(real * cos_real - imaginary * sin_real, imaginary * cos_imaginary + real * sin_imaginary)
    tl.store(y_ptr + offsets, tl.reshape(y, [BLOCK, SIZE]).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _norm_rope_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_x_ptr,
    grad_weight_ptr,  # [programs, D]: a part of the sum from each program
    rows,
    heads,
    tokens,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, SIZE)[None, :]
    weight = tl.load(weight_ptr + column + tl.zeros([BLOCK, 1], tl.int32)).to(tl.float32)
    grad_weight = tl.zeros([BLOCK, SIZE], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        offsets, inside = row.to(tl.int64)[:, None] * SIZE + column, (row < rows)[:, None]
        turns = ((row // heads) % tokens)[:, None] * SIZE + column
        x = tl.load(x_ptr + offsets, inside, 0).to(tl.float32)
        grad_real, grad_imaginary = pairs(tl.load(grad_ptr + offsets, inside, 0).to(tl.float32), BLOCK, SIZE)
        cos_real, cos_imaginary = pairs(tl.load(cos_ptr + turns), BLOCK, SIZE)
        sin_real, sin_imaginary = pairs(tl.load(sin_ptr + turns), BLOCK, SIZE)
        back_real = grad_real * cos_real + grad_imaginary * sin_imaginary
        back_imaginary = grad_imaginary * cos_imaginary - grad_real * sin_real
        back = tl.reshape(tl.join(back_real, back_imaginary), [BLOCK, SIZE])
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
        normed = x * inverse_rms
        grad_weight += back * normed
        back *= weight
        grad_x = inverse_rms * (back - normed * (tl.sum(back * normed, 1) / SIZE)[:, None])
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
    part = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(grad_weight_ptr + part, tl.sum(grad_weight, 0))


def latent_weight(latent_NK: Tensor, log_scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    weight_NK = torch.empty(latent_NK.shape, dtype=dtype, device=latent_NK.device)
    rows, columns = latent_NK.shape
    _latent_weight_kernel[(rows,)](
        latent_NK.contiguous(), log_scale_N, weight_NK, columns, _columns_at_once(columns), num_warps=_WARPS
    )
    return weight_NK


def latent_weight_backward(grad_NK: Tensor, latent_NK: Tensor, log_scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of latents and log scales, each in its tensor's dtype."""
    grad_latent_NK, grad_log_scale_N = torch.empty_like(latent_NK), torch.empty_like(log_scale_N)
    rows, columns = latent_NK.shape
    _latent_weight_backward_kernel[(rows,)](
        grad_NK.contiguous(), latent_NK.contiguous(), log_scale_N, grad_latent_NK, grad_log_scale_N, columns,
        _columns_at_once(columns), num_warps=_WARPS,
    )  # fmt: skip
    return grad_latent_NK, grad_log_scale_N


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, cos_SD: Tensor, sin_SD: Tensor, eps: float) -> Tensor:
    _, tokens, heads, size = x_BSHD.shape
    rows, block = x_BSHD.numel() // size, _rows_a_tile(size)
    y_BSHD = torch.empty(x_BSHD.shape, dtype=x_BSHD.dtype, device=x_BSHD.device)
    _norm_rope_forward_kernel[(triton.cdiv(rows, block),)](
        x_BSHD.contiguous(), weight_D, cos_SD.contiguous(), sin_SD.contiguous(), y_BSHD, rows, heads, tokens, eps,
        size, block, num_warps=_WARPS,
    )  # fmt: skip
    return y_BSHD


def norm_rope_backward(
    grad_BSHD: Tensor, x_BSHD: Tensor, weight_D: Tensor, cos_SD: Tensor, sin_SD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight, each in its tensor's dtype."""
    _, tokens, heads, size = x_BSHD.shape
    rows, block = x_BSHD.numel() // size, _rows_a_tile(size)
    programs = min(_PROGRAMS, triton.cdiv(rows, block))
    grad_x_BSHD = torch.empty(x_BSHD.shape, dtype=x_BSHD.dtype, device=x_BSHD.device)
    parts_PD = torch.empty(programs, size, device=x_BSHD.device)
    _norm_rope_backward_kernel[(programs,)](
        grad_BSHD.contiguous(), x_BSHD.contiguous(), weight_D, cos_SD.contiguous(), sin_SD.contiguous(), grad_x_BSHD,
        parts_PD, rows, heads, tokens, eps, size, block, num_warps=_WARPS,
    )  # fmt: skip
    return grad_x_BSHD, parts_PD.sum(dim=0).to(weight_D.dtype)


def _columns_at_once(columns: int) -> int:
    return min(_ELEMENTS, triton.next_power_of_2(columns))


def _rows_a_tile(size: int) -> int:
    if size & (size - 1):
        raise ValueError(f"heads of {size} columns: the kernels take powers of two")
    return max(1, _ELEMENTS // size)
