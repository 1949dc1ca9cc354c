"""Plain torch ternary linears on any device: what every kernel is compared with, and what runs where none exists.

Legend: M tokens (all leading dimensions flattened), N output features, K input features, J packed bytes a row.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.packing import unpack_planes

Activations = Literal["native", "int8"]

INT8_MAX = 127
_SMALLEST_AMAX = 1e-30  # keeps a token of zeros from dividing by zero; its quantized values are zeros all the same


def dequantize(packed_NJ: Tensor, scale_N: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: code times scale, the scale rounded to `dtype`."""
    weight_NK = unpack_planes(packed_NJ, in_features).to(dtype)
    return weight_NK.mul_(scale_N.to(dtype)[:, None])


def ternary_linear(x: Tensor, packed_NJ: Tensor, scale_N: Tensor, bias_N: Tensor | None, in_features: int) -> Tensor:
    """x [..., K] to [..., N] in x's floating dtype, to which the weight is decoded at every call."""
    return F.linear(x, dequantize(packed_NJ, scale_N, in_features, x.dtype), bias_N)


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token symmetric absmax quantization: int8 values in [-127, 127] [M, K] and float32 scales [M]."""
    wide_MK = x_MK.float()
    scale_M = wide_MK.abs().amax(dim=1).clamp(min=_SMALLEST_AMAX) / INT8_MAX
    values_MK = (wide_MK / scale_M[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values_MK.to(torch.int8), scale_M


def ternary_linear_int8(
    x: Tensor, packed_NJ: Tensor, scale_N: Tensor, bias_N: Tensor | None, in_features: int
) -> Tensor:
    """As `ternary_linear`, with the activations quantized to int8 by token and an exact integer sum of products.

    Scales and bias are applied to the integer sum in float32, then the result is rounded once to x's dtype.
    """
    values_MK, scale_M = quantize_tokens(x.reshape(-1, in_features))
    sum_MN = _integer_product(values_MK, unpack_planes(packed_NJ, in_features)).float()
    y_MN = sum_MN * scale_M[:, None] * scale_N.float()
    if bias_N is not None:
        y_MN = y_MN + bias_N.float()
    return y_MN.to(x.dtype).unflatten(0, x.shape[:-1])


def _integer_product(values_MK: Tensor, codes_NK: Tensor) -> Tensor:
    """values @ codes.T without rounding. Sums stay below 127 K < 2^24 for K < 132,104, so float32 holds the result too.

    On CPU int8 products are the fastest (3 to 4 times float32 here). CUDA's want M > 16 and multiples of 8, and
    float32 products may be switched to TF32, whose accumulator nothing documents: float64 is exact at any setting.
    """
    if values_MK.device.type == "cpu":
        return torch._int_mm(values_MK, codes_NK.t())
    return values_MK.double() @ codes_NK.double().t()


LINEARS = {"native": ternary_linear, "int8": ternary_linear_int8}
