"""Triton kernels of kernels/columns.py, whose plain torch arithmetic, legend included, they follow.

A program holds some rows of the block in registers and walks its columns: what one column leaves is known only when
the one before is rounded, but rows do not ask for each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.columns import LIMIT

_ROWS = 16  # of a program: its three tiles stay in registers
_WARPS = 4


@triton.jit
def _round_kernel(
    rest_ptr,
    scale_ptr,
    factor_ptr,  # [B, B], upper
    codes_ptr,
    error_ptr,
    rest_stride,
    factor_stride,
    codes_stride,
    N,
    B,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    wide_row = row.to(tl.int64)[:, None]
    inside = (row < N)[:, None] & (column < B)[None, :]
    rest = tl.load(rest_ptr + wide_row * rest_stride + column[None, :], inside, 0)
    scale = tl.load(scale_ptr + row, row < N, 1)
    codes, errors = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for place in range(B):
        here = (column == place)[None, :]
        factor = tl.load(factor_ptr + place * factor_stride + column, column < B, 0)
        value = tl.sum(tl.where(here, rest, 0), 1)
        code = _code(value / scale)
        error = (value - code * scale) / tl.load(factor_ptr + place * factor_stride + place)
        rest -= error[:, None] * factor[None, :]
        codes = tl.where(here, code[:, None], codes)
        errors = tl.where(here, error[:, None], errors)
    tl.store(codes_ptr + wide_row * codes_stride + column[None, :], codes, inside)
    tl.store(error_ptr + wide_row * B + column[None, :], errors, inside)


@triton.jit
def _descend_kernel(
    slope_ptr,
    scale_ptr,
    covariance_ptr,  # [B, B]
    codes_ptr,
    step_ptr,
    slope_stride,
    covariance_stride,
    codes_stride,
    N,
    B,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    wide_row = row.to(tl.int64)[:, None]
    inside = (row < N)[:, None] & (column < B)[None, :]
    slope = tl.load(slope_ptr + wide_row * slope_stride + column[None, :], inside, 0)
    codes = tl.load(codes_ptr + wide_row * codes_stride + column[None, :], inside, 0)
    scale = tl.load(scale_ptr + row, row < N, 1)
    steps = tl.zeros([ROWS, COLUMNS], tl.float32)
    for place in range(B):
        here = (column == place)[None, :]
        covariance = tl.load(covariance_ptr + place * covariance_stride + column, column < B, 0)
        before = tl.sum(tl.where(here, codes, 0), 1)
        curvature = scale * tl.load(covariance_ptr + place * covariance_stride + place)
        code = _code(before + tl.sum(tl.where(here, slope, 0), 1) / curvature)
        step = (code - before) * scale
        slope -= step[:, None] * covariance[None, :]
        codes = tl.where(here, code[:, None], codes)
        steps = tl.where(here, step[:, None], steps)
    tl.store(codes_ptr + wide_row * codes_stride + column[None, :], codes, inside)
    tl.store(step_ptr + wide_row * B + column[None, :], steps, inside)


@triton.jit
def _code(x):
    """-0.5 and 0.5 become 0, as torch rounds them, and what is no number stays so."""
    code = tl.where(tl.abs(x) > 0.5, tl.where(x > 0, 1.0, -1.0), 0.0)
    return tl.where(x == x, code, x)


def round_columns(rest_NB: Tensor, scale_N: Tensor, factor_BB: Tensor, codes_NB: Tensor) -> Tensor:
    return _launched(_round_kernel, rest_NB, scale_N, factor_BB, codes_NB)


def descend_columns(slope_NB: Tensor, scale_N: Tensor, covariance_BB: Tensor, codes_NB: Tensor) -> Tensor:
    return _launched(_descend_kernel, slope_NB, scale_N, covariance_BB, codes_NB)


def _launched(kernel, block_NB: Tensor, scale_N: Tensor, matrix_BB: Tensor, codes_NB: Tensor) -> Tensor:
    rows, columns = block_NB.shape
    if not block_NB.stride(1) == matrix_BB.stride(1) == codes_NB.stride(1) == 1:
        raise ValueError("the kernels take matrices whose columns lie side by side")
    made_NB = torch.empty(rows, columns, device=block_NB.device)
    kernel[(triton.cdiv(rows, _ROWS),)](
        block_NB, scale_N.contiguous(), matrix_BB, codes_NB, made_NB, block_NB.stride(0), matrix_BB.stride(0),
        codes_NB.stride(0), rows, columns, _ROWS, LIMIT, num_warps=_WARPS,
    )  # fmt: skip
    return made_NB
