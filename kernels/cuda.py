"""The operators of kernels/ops.py on CUDA: the Triton kernel that fits, or the torch reference where none does.

Arguments and results are those of the functions of the same name in kernels/reference.py, legend included.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels._gemm_config import SMALL_M
from kernels.gemm import matmul_digits_triton, matmul_int8_triton, matmul_triton
from kernels.reference import DIGITS, Quantized
from kernels.rotary import qk_norm_rope_triton as qk_norm_rope
from kernels.rowwise import gelu_quantize_triton as gelu_quantize
from kernels.rowwise import gelu_triton as gelu
from kernels.rowwise import norm_modulate_quantize_triton as norm_modulate_quantize
from kernels.rowwise import norm_modulate_triton as norm_modulate
from kernels.rowwise import quantize_triton as quantize
from kernels.tuning import choose_config

__all__ = [
    "gelu",
    "gelu_quantize",
    "matmul",
    "matmul_int8",
    "norm_modulate",
    "norm_modulate_quantize",
    "qk_norm_rope",
    "quantize",
]


def matmul(
    x_MK: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
) -> Tensor:
    arguments = (packed_NJ, scale_N, bias_N, gate_BN, residual_MN, in_features)
    if x_MK.dtype == torch.float32:  # tensor cores would round it to TF32
        return reference.matmul(x_MK, *arguments)
    rows = DIGITS * x_MK.shape[0]
    if rows <= SMALL_M:
        config = choose_config("int8", rows, packed_NJ.shape[0], in_features, x_MK.device)
        return matmul_digits_triton(x_MK, *arguments, config)
    config = choose_config("16bit", x_MK.shape[0], packed_NJ.shape[0], in_features, x_MK.device)
    return matmul_triton(x_MK, *arguments, config)


def matmul_int8(
    x: Quantized,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    config = choose_config("int8", x.values_MP.shape[0], packed_NJ.shape[0], in_features, x.values_MP.device)
    return matmul_int8_triton(*x, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, in_features, dtype, config)
