"""Ternary rounding of a few columns, one after the other, each answering to what those before it left.

Plain torch takes some ten small kernels a column; a GPU spent most of a quantization launching them.

Legend: N rows, B columns of a block, which lie in wider matrices. On CUDA a Triton kernel runs
(kernels/_column_kernels.py), elsewhere plain torch.
"""

import torch
from torch import Tensor

from kernels.training import codes_of

LIMIT = 128  # columns of a block


def round_columns(rest_NB: Tensor, scale_N: Tensor, factor_BB: Tensor, codes_NB: Tensor) -> Tensor:
    """Error-compensated rounding (GPTQ, Frantar et al. 2023, algorithm 1) of a block: its errors [N, B].

    Writes the codes, as floats, to `codes_NB`. A column's error, over the diagonal of the upper factor `factor_BB`, is
    carried to those behind it. All are float32; `rest_NB` is used up. ValueError for more than LIMIT columns.
    """
    _check(rest_NB)
    if rest_NB.is_cuda:
        return _kernels().round_columns(rest_NB, scale_N, factor_BB, codes_NB)
    error_NB = torch.empty_like(rest_NB)
    for column in range(rest_NB.shape[1]):
        factor_B = factor_BB[column, column:]
        code_N = codes_of(rest_NB[:, column] / scale_N)
        codes_NB[:, column] = code_N
        error_NB[:, column] = (rest_NB[:, column] - code_N * scale_N) / factor_B[0]
        rest_NB[:, column:].addr_(error_NB[:, column], factor_B, alpha=-1)
    return error_NB


def descend_columns(slope_NB: Tensor, scale_N: Tensor, covariance_BB: Tensor, codes_NB: Tensor) -> Tensor:
    """One round of coordinate descent over a block's codes: the steps [N, B] of the quantized weights.

    `slope_NB` is minus half the error's gradient by them; the codes are changed in `codes_NB`. All are float32;
    `slope_NB` is used up. ValueError for more than LIMIT columns.
    """
    _check(slope_NB)
    if slope_NB.is_cuda:
        return _kernels().descend_columns(slope_NB, scale_N, covariance_BB, codes_NB)
    step_NB = torch.empty_like(slope_NB)
    for column in range(slope_NB.shape[1]):
        curvature_N = scale_N * covariance_BB[column, column]
        code_N = codes_of(codes_NB[:, column] + slope_NB[:, column] / curvature_N)
        step_NB[:, column] = (code_N - codes_NB[:, column]) * scale_N
        codes_NB[:, column] = code_N
        slope_NB.addr_(step_NB[:, column], covariance_BB[column], alpha=-1)
    return step_NB


def _check(block_NB: Tensor) -> None:
    if block_NB.shape[1] > LIMIT:
        raise ValueError(f"a block of {block_NB.shape[1]} columns: {LIMIT} is the most")


def _kernels():
    """The Triton side, which no machine without a GPU imports."""
    from kernels import _column_kernels

    return _column_kernels
