"""Triton kernels of kernels/factored.py, whose plain torch arithmetic, legend included, they follow.

All are bound by memory: each reads the gradient once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.factored import TINY

_ROWS, _COLUMNS = 16, 256  # of a tile
_STRIP = 8  # tiles, one below the other, that a program adds up
_BLOCK = 2048  # columns at once of a program that has a row
_WARPS = 4
_TINY = tl.constexpr(TINY)


@triton.jit
def _square_sums_kernel(
    gradient_ptr,
    row_parts_ptr,  # [K / COLUMNS, N]
    column_parts_ptr,  # [N / (ROWS STRIP), K]
    N,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
):
    strip, part = tl.program_id(0), tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(STRIP):
        row = (strip * STRIP + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < K)[None, :]
        gradient = tl.load(gradient_ptr + row.to(tl.int64)[:, None] * K + column[None, :], inside, 0).to(tl.float32)
        square = gradient * gradient
        sums += square
        tl.store(row_parts_ptr + part.to(tl.int64) * N + row, tl.sum(square, 1), row < N)
    tl.store(column_parts_ptr + strip.to(tl.int64) * K + column, tl.sum(sums, 0), column < K)


@triton.jit
def _update_square_sum_kernel(gradient_ptr, row_ptr, column_ptr, sum_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_moment = tl.load(row_ptr + row)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + row * K + column, column < K, 0).to(tl.float32)
        update = gradient * _inverse_root(row_moment, tl.load(column_ptr + column, column < K, 1))
        sums += update * update
    tl.store(sum_ptr + row, tl.sum(sums))


@triton.jit
def _step_kernel(
    latent_ptr,
    gradient_ptr,
    row_ptr,
    column_ptr,
    rate_ptr,
    dampening_ptr,
    seed_ptr,
    place,
    K,
    BLOCK: tl.constexpr,
    ROUNDED: tl.constexpr,  # to bfloat16, stochastically
):
    row = tl.program_id(0).to(tl.int64)
    row_moment, rate, dampening = tl.load(row_ptr + row), tl.load(rate_ptr), tl.load(dampening_ptr)
    seed = tl.load(seed_ptr) + place
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset = row * K + column
        gradient = tl.load(gradient_ptr + offset, column < K, 0).to(tl.float32)
        latent = tl.load(latent_ptr + offset, column < K, 0).to(tl.float32)
        latent -= rate * gradient * _inverse_root(row_moment, tl.load(column_ptr + column, column < K, 1))
        code = tl.where(tl.abs(latent) > 0.5, tl.where(latent > 0, 1.0, -1.0), 0.0)
        latent += dampening * (code - latent)
        if ROUNDED:
            random = (tl.randint(seed, offset) & 0xFFFF).to(tl.int32)
            latent = ((latent.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
        tl.store(latent_ptr + offset, latent.to(latent_ptr.dtype.element_ty), column < K)


@triton.jit
def _inverse_root(row_moment, column_moment):
    return tl.rsqrt(tl.maximum(row_moment * column_moment, _TINY))


def square_sums(gradient_NK: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = gradient_NK.shape
    strips, parts = triton.cdiv(rows, _ROWS * _STRIP), triton.cdiv(columns, _COLUMNS)
    row_parts = torch.empty(parts, rows, device=gradient_NK.device)
    column_parts = torch.empty(strips, columns, device=gradient_NK.device)
    _square_sums_kernel[(strips, parts)](
        gradient_NK.contiguous(), row_parts, column_parts, rows, columns, _ROWS, _COLUMNS, _STRIP, num_warps=_WARPS
    )
    return row_parts.sum(dim=0), column_parts.sum(dim=0)


def update_square_sum(gradient_NK: Tensor, row_N: Tensor, column_K: Tensor) -> Tensor:
    rows, columns = gradient_NK.shape
    sums_N = torch.empty(rows, device=gradient_NK.device)
    _update_square_sum_kernel[(rows,)](
        gradient_NK.contiguous(), row_N, column_K, sums_N, columns, _columns_at_once(columns), num_warps=_WARPS
    )
    return sums_N.sum()


def step_latents(
    latent_NK: Tensor,
    gradient_NK: Tensor,
    row_N: Tensor,
    column_K: Tensor,
    rate: Tensor,
    dampening: Tensor,
    seed: Tensor,
    place: int,
) -> None:
    rows, columns = latent_NK.shape
    assert latent_NK.is_contiguous(), "latents are stepped in place"
    _step_kernel[(rows,)](
        latent_NK, gradient_NK.contiguous(), row_N, column_K, rate, dampening, seed, place, columns,
        _columns_at_once(columns), latent_NK.dtype == torch.bfloat16, num_warps=_WARPS,
    )  # fmt: skip


def _columns_at_once(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))
