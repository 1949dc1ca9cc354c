"""Launchers of the ternary matrix products: fused decoding of packed weights, product, scales, bias, gate, residual.

Legend: M tokens, N output features, K input features, J packed bytes a row, P = 4 x J rounded up to 16, B images. See
kernels/reference.py `matmul` and `matmul_int8` for what is computed; arguments are checked in kernels/ops.py.
"""

import functools

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._gemm_config import GemmConfig, config_from_dict, config_to_dict, default_config
from kernels._gemm_tile import gemm_tile
from kernels._unpack import unpack
from kernels.packing import PLANES
from kernels.reference import DIGITS, plane_padded, plane_width
from kernels.rowwise import digits_triton

__all__ = [
    "GemmConfig",
    "config_from_dict",
    "config_to_dict",
    "default_config",
    "launch",
    "matmul_digits_triton",
    "matmul_int8_triton",
    "matmul_triton",
    "unpack",
]

_BYTES_A_LOAD = 16  # tensor descriptors start at, and stride by, multiples of it


def matmul_int8_triton(
    values_MP: Tensor,
    scale_M: Tensor,
    sum_M: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """`reference.matmul_int8` by a fused kernel: the integer sums are exact, [M, N] in `dtype`."""
    tokens, features = values_MP.shape[0], packed_NJ.shape[0]
    config = config or default_config("int8", tokens, features, in_features, _capability(values_MP.device))
    y_MN = values_MP.new_empty(tokens, features, dtype=dtype)
    launch(y_MN, values_MP, scale_M, sum_M, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, config)
    return y_MN


def matmul_triton(
    x_MK: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
    config: GemmConfig | None = None,
) -> Tensor:
    """`reference.matmul` by a fused kernel, float32 sums, [M, N] in x's dtype. ValueError for a float32 x."""
    _check_16_bit(x_MK)
    tokens, features = x_MK.shape[0], packed_NJ.shape[0]
    config = config or default_config("16bit", tokens, features, in_features, _capability(x_MK.device))
    # Copied only where the planes of x do not start at multiples of 16 columns as it is.
    x_MP = x_MK if in_features % (PLANES * _BYTES_A_LOAD) == 0 else plane_padded(x_MK)
    y_MN = x_MK.new_empty(tokens, features)
    launch(y_MN, x_MP, None, None, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, config)
    return y_MN


def matmul_digits_triton(
    x_MK: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
    config: GemmConfig | None = None,
) -> Tensor:
    """As `matmul_triton`, by integer products of the `reference.digits` of x, of which `config` counts the rows.

    For few tokens: decoding to int8 takes a third of the instructions of decoding to 16 bits, and there it is all that
    the multiprocessors do while they wait for the weight's bytes.
    """
    _check_16_bit(x_MK)
    x = digits_triton(x_MK)
    rows, features = x.values_MP.shape[0], packed_NJ.shape[0]
    config = config or default_config("int8", rows, features, in_features, _capability(x_MK.device))
    y_MN = x_MK.new_empty(x_MK.shape[0], features)
    launch(y_MN, *x, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, config, DIGITS)
    return y_MN


def launch(
    y_MN: Tensor,
    x_MP: Tensor,
    scale_M: Tensor | None,
    sum_M: Tensor | None,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    config: GemmConfig,
    digits: int = 1,
) -> None:
    """Writes y. `x_MP` is int8 with both scale_M and sum_M, or 16-bit with neither.

    `digits` of its rows make up a token.
    """
    tokens, features = y_MN.shape
    rows = digits * tokens
    width = plane_width(PLANES * packed_NJ.shape[1])
    if packed_NJ.shape[1] != width:  # `pad` copies where there is nothing to pad, too
        packed_NJ = F.pad(packed_NJ, (0, width - packed_NJ.shape[1]))
    x_MP, packed_NJ = _aligned(x_MP), _aligned(packed_NJ)
    if residual_MN is not None and residual_MN.stride(1) != 1:
        residual_MN = residual_MN.contiguous()
    images = 1 if gate_BN is None else gate_BN.shape[0]
    arguments = (
        y_MN,
        scale_M,
        sum_M,
        scale_N,
        bias_N,
        None if gate_BN is None else gate_BN.contiguous(),
        residual_MN,
        rows,
        features,
        width,
        tokens // images,
        0 if residual_MN is None else residual_MN.stride(0),
    )
    constants = {
        "ONE_IMAGE": images == 1,
        "DIGITS": digits,
        "GROUP": config.group,
        "STAGES": config.stages,
        "SUBTILES": config.subtiles,
        "num_warps": config.warps,
    }
    # Shapes, strides and blocks of the descriptors.
    x_view = [PLANES, rows, width], [width, x_MP.stride(0), 1]
    packed_view = [features, width], [packed_NJ.stride(0), 1], [config.block_n, config.block_j]
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(features, config.block_n)
    grid = (min(tiles, config.residents * _multiprocessors(y_MN.device)),)
    if config.kernel == "hopper":
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor

        from kernels._gemm_hopper import gemm_hopper, shared_layout  # Gluon has no interpreter

        x_block = [PLANES, config.block_m, config.block_j]
        x_desc = Descriptor(x_MP, *x_view, x_block, shared_layout(x_block, x_MP.dtype))
        packed_desc = Descriptor(packed_NJ, *packed_view, shared_layout(packed_view[2], packed_NJ.dtype))
        gemm_hopper[grid](x_desc, packed_desc, *arguments, **constants)
    else:
        descriptors = config.kernel == "tile"
        gemm_tile[grid](
            TensorDescriptor(x_MP, *x_view, [1, config.block_m, config.block_j]) if descriptors else x_MP,
            TensorDescriptor(packed_NJ, *packed_view) if descriptors else packed_NJ,
            *arguments,
            x_MP.stride(0),
            packed_NJ.stride(0),
            DESCRIPTORS=descriptors,
            ASSEMBLY=y_MN.is_cuda,
            BN=config.block_n,
            BM=config.block_m,
            BJ=config.block_j,
            FLATTEN=config.flatten,
            num_stages=config.stages,
            **constants,
        )


def _check_16_bit(x_MK: Tensor) -> None:
    if x_MK.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x_MK.dtype}: the fused product takes bfloat16 and float16")


def _aligned(matrix: Tensor) -> Tensor:
    """A copy where the rows of `matrix` are not contiguous or don't begin where a tensor descriptor may read."""
    stride = matrix.stride(0) * matrix.element_size()
    if matrix.stride(1) != 1 or stride % _BYTES_A_LOAD or matrix.data_ptr() % _BYTES_A_LOAD:
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix


@functools.cache
def _capability(device: torch.device) -> int:
    """Compute capability as 10 x major + minor; the interpreter's choice of blocks is that of the smallest chip."""
    if device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
