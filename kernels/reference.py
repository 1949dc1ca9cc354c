"""Plain torch arithmetic of a ternary FLUX on any device: what kernels are compared with, and what runs without them.

Legend: M tokens (all leading dimensions flattened), N output features, K input features, J packed bytes a row,
P = 4 x J rounded up to 16 (the width of quantized activations), B images, M = B x tokens of an image, S tokens of an
image, H heads, D head size.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.packing import PLANES, packed_width, unpack_planes

Activations = Literal["native", "int8"]

INT8_MAX = 127
DIGITS = 4  # rows that `digits` makes of a token: three digits to the base 256 and zeros, since sums want a power of 2
_LARGEST_DIGITS = INT8_MAX << 16
_SMALLEST_AMAX = 1e-30  # keeps a token of zeros from dividing by zero; its quantized values are zeros all the same
_BYTES_A_LOAD = 16  # bulk copies start at multiples of it


class Quantized(NamedTuple):
    """int8 activations: `values_MP` in [-127, 127], laid out as `plane_padded` says, float32 `scale_M`, int32 `sum_M`.

    `sum_M` is the sum of a token's values: a product with unsigned codes 0, 1, 2 minus it is that with -1, 0, 1. A
    token with a NaN or an infinity has values 0 and scale NaN, so that whatever is computed from it is NaN.
    """

    values_MP: Tensor
    scale_M: Tensor
    sum_M: Tensor


def quantized_width(in_features: int) -> int:
    """P, the columns of quantized activations: `in_features` where that is a multiple of 64."""
    return PLANES * plane_width(in_features)


def plane_width(in_features: int) -> int:
    """Columns of one plane of quantized activations: the packed weight's J, rounded up to 16."""
    return -(-packed_width(in_features) // _BYTES_A_LOAD) * _BYTES_A_LOAD


def plane_padded(values_MK: Tensor) -> Tensor:
    """[M, K] to [M, P]: k = plane x J + j goes to column plane x (P / 4) + j, zeros elsewhere."""
    in_features = values_MK.shape[1]
    width, padded = packed_width(in_features), plane_width(in_features)
    planes_M4J = F.pad(values_MK, (0, PLANES * width - in_features)).unflatten(1, (PLANES, width))
    return F.pad(planes_M4J, (0, padded - width)).flatten(1)


def plane_unpadded(values_MP: Tensor, in_features: int) -> Tensor:
    """The inverse of `plane_padded`: [M, P] to [M, K]."""
    planes_M4J = values_MP.unflatten(1, (PLANES, -1))[:, :, : packed_width(in_features)]
    return planes_M4J.flatten(1)[:, :in_features]


def dequantize(packed_NJ: Tensor, scale_N: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: code times scale, the scale rounded to `dtype`."""
    weight_NK = unpack_planes(packed_NJ, in_features).to(dtype)
    return weight_NK.mul_(scale_N.to(dtype)[:, None])


def ternary_linear(x: Tensor, packed_NJ: Tensor, scale_N: Tensor, bias_N: Tensor | None, in_features: int) -> Tensor:
    """x [..., K] to [..., N] in x's floating dtype, to which the weight is decoded at every call."""
    return F.linear(x, dequantize(packed_NJ, scale_N, in_features, x.dtype), bias_N)


def ternary_linear_int8(
    x: Tensor, packed_NJ: Tensor, scale_N: Tensor, bias_N: Tensor | None, in_features: int
) -> Tensor:
    """As `ternary_linear`, with the activations quantized to int8 by token and an exact integer sum of products."""
    quantized = quantize(x.reshape(-1, in_features))
    y_MN = matmul_int8(quantized, packed_NJ, scale_N, bias_N, None, None, in_features, x.dtype)
    return y_MN.unflatten(0, x.shape[:-1])


def quantize(x_MK: Tensor) -> Quantized:
    """`quantized_values`, laid out for the kernels and with the sum of each token's values."""
    values_MK, scale_M = quantized_values(x_MK)
    return Quantized(plane_padded(values_MK), scale_M, values_MK.sum(dim=1, dtype=torch.int32))


def quantized_values(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [M, K] and float32 scales [M], per-token symmetric absmax quantization.

    value = x * (127 / amax) rounded to nearest even, scale = amax / 127.
    """
    wide_MK = x_MK.float()
    amax_M = wide_MK.abs().amax(dim=1)
    finite_M = amax_M.isfinite()
    amax_M = amax_M.clamp(min=_SMALLEST_AMAX)
    values_MK = (wide_MK * (INT8_MAX / amax_M)[:, None]).round_().where(finite_M[:, None], 0).to(torch.int8)
    scale_M = (amax_M / INT8_MAX).where(finite_M, torch.nan)
    return values_MK, scale_M


def rounded_to_int8(x: Tensor) -> Tensor:
    """x [..., K] as its quantized values stand for it, in its dtype."""
    values_MK, scale_M = quantized_values(x.flatten(0, -2))
    return (values_MK * scale_M[:, None]).to(x.dtype).view_as(x)


def dequantized(x: Quantized, in_features: int, dtype: torch.dtype) -> Tensor:
    """The activations [M, K] that quantized ones stand for, in `dtype`."""
    return (plane_unpadded(x.values_MP, in_features) * x.scale_M[:, None]).to(dtype)


def digits(x_MK: Tensor) -> Quantized:
    """x as fixed-point numbers of 24 bits below each token's largest, [4 M, P]: rows 4 m to 4 m + 3 add up to token m.

    Errs by less than 2^-22 of a token's largest number, bfloat16 itself by 2^-9 of each number.
    """
    wide_MK = x_MK.float()
    amax_M = wide_MK.abs().amax(dim=1)
    finite_M = amax_M.isfinite()
    amax_M = amax_M.clamp(min=_SMALLEST_AMAX)
    rest_MK = (wide_MK * (_LARGEST_DIGITS / amax_M)[:, None] + 0.5).floor_().where(finite_M[:, None], 0).int()
    scale_M = (amax_M / _LARGEST_DIGITS).where(finite_M, torch.nan)
    rows, scales = [torch.zeros_like(rest_MK)], [scale_M * 0]
    for place in range(DIGITS - 1):
        digit_MK = ((rest_MK + 128) & 255) - 128
        rest_MK = (rest_MK - digit_MK) >> 8
        rows.append(digit_MK)
        scales.append(scale_M * 256.0**place)
    values_RK = torch.stack(rows, dim=1).flatten(0, 1)
    sum_R = values_RK.sum(dim=1, dtype=torch.int32)
    return Quantized(plane_padded(values_RK.to(torch.int8)), torch.stack(scales, dim=1).flatten(), sum_R)


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
    """[M, N] in `dtype`: residual + gate x (integer sum x both scales + bias), in float32 and rounded once."""
    codes_NK = unpack_planes(packed_NJ, in_features)
    sum_MN = _integer_product(plane_unpadded(x.values_MP, in_features), codes_NK).float()
    y_MN = sum_MN * x.scale_M[:, None] * scale_N.float()
    return _epilogue(y_MN, bias_N, gate_BN, residual_MN).to(dtype)


def matmul(
    x_MK: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
    in_features: int,
) -> Tensor:
    """[M, N] in x's dtype: residual + gate x (x times the codes, times scale + bias), in float32 and rounded once."""
    codes_NK = unpack_planes(packed_NJ, in_features)
    y_MN = (x_MK.float() @ codes_NK.float().t()) * scale_N.float()
    return _epilogue(y_MN, bias_N, gate_BN, residual_MN).to(x_MK.dtype)


def norm_modulate(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Tensor:
    """[M, K] in x's dtype: LayerNorm without weights, times 1 + scale, plus shift of the token's image (AdaLN-Zero)."""
    return _norm_modulated(x_MK, shift_BK, scale_BK, eps).to(x_MK.dtype)


def norm_modulate_quantize(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Quantized:
    """`quantize` of the float32 result of `norm_modulate`."""
    return quantize(_norm_modulated(x_MK, shift_BK, scale_BK, eps))


def gelu(x_MK: Tensor, head_MA: Tensor | None) -> Tensor:
    """[M, A + K] in x's dtype: `head_MA` as it is (or nothing, A = 0), then tanh-approximated GELU of x."""
    return _gelu_joined(x_MK, head_MA).to(x_MK.dtype)


def gelu_quantize(x_MK: Tensor, head_MA: Tensor | None) -> Quantized:
    """`quantize` of the float32 result of `gelu`."""
    return quantize(_gelu_joined(x_MK, head_MA))


def qk_norm_rope(
    qkv_BSC: Tensor,
    text_qkv_BTC: Tensor | None,
    heads: int,
    weights: tuple[Tensor, Tensor],
    text_weights: tuple[Tensor, Tensor] | None,
    cos_SD: Tensor,
    sin_SD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T + S, H, D] in qkv's dtype, text first: RMSNorm by head, then rotary embedding, in float32.

    `qkv` begins with H D columns of queries and H D of keys; the rest of a row is not read. `weights` are the norms'
    (query, key) [D]; cos and sin cover T + S tokens, each pair of neighbouring columns alike (diffusers' layout).
    """
    parts = [(qkv_BSC, weights)]
    if text_qkv_BTC is not None and text_weights is not None:
        parts.insert(0, (text_qkv_BTC, text_weights))
    joined = []
    for index in range(2):
        normed = []
        for part, part_weights in parts:
            size = part_weights[index].shape[0]
            columns = part[..., index * heads * size : (index + 1) * heads * size]
            normed.append(_rms_normed(columns.unflatten(-1, (heads, size)), part_weights[index], eps))
        joined.append(_rotated(torch.cat(normed, dim=1), cos_SD, sin_SD).to(qkv_BSC.dtype))
    return joined[0], joined[1]


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, cos_SD: Tensor, sin_SD: Tensor, eps: float) -> Tensor:
    """[B, S, H, D] in x's dtype: RMSNorm by head times `weight`, then rotary embedding, in float32."""
    return _rotated(_rms_normed(x_BSHD, weight_D, eps), cos_SD, sin_SD).to(x_BSHD.dtype)


def _rms_normed(x_BSHD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_BSHD = x_BSHD.float()
    return x_BSHD * (x_BSHD.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight_D.float()


def _rotated(x_BSHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    real, imaginary = x_BSHD.unflatten(-1, (-1, 2)).unbind(-1)
    turned_BSHD = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return x_BSHD * cos_SD.float()[:, None] + turned_BSHD * sin_SD.float()[:, None]


def _norm_modulated(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Tensor:
    normed_MK = F.layer_norm(x_MK.float(), x_MK.shape[1:], eps=eps)
    return torch.addcmul(_per_token(shift_BK, x_MK).float(), normed_MK, 1 + _per_token(scale_BK, x_MK).float())


def _gelu_joined(x_MK: Tensor, head_MA: Tensor | None) -> Tensor:
    y_MK = F.gelu(x_MK.float(), approximate="tanh")
    return y_MK if head_MA is None else torch.cat([head_MA.float(), y_MK], dim=1)


def _epilogue(y_MN: Tensor, bias_N: Tensor | None, gate_BN: Tensor | None, residual_MN: Tensor | None) -> Tensor:
    if bias_N is not None:
        y_MN = y_MN + bias_N.float()
    if gate_BN is not None:
        y_MN = y_MN * _per_token(gate_BN, y_MN).float()
    if residual_MN is not None:
        y_MN = y_MN + residual_MN.float()
    return y_MN


def _per_token(rows_BK: Tensor, x_MK: Tensor) -> Tensor:
    return rows_BK.repeat_interleave(x_MK.shape[0] // rows_BK.shape[0], dim=0)


def _integer_product(values_MK: Tensor, codes_NK: Tensor) -> Tensor:
    """values @ codes.T without rounding. Sums stay below 127 K < 2^24 for K < 132,104, so float32 holds the result too.

    On CPU int8 products are the fastest (3 to 4 times float32 here). CUDA's want M > 16 and multiples of 8, and
    float32 products may be switched to TF32, whose accumulator nothing documents: float64 is exact at any setting.
    """
    if values_MK.device.type == "cpu":
        return torch._int_mm(values_MK, codes_NK.t())
    return values_MK.double() @ codes_NK.double().t()


LINEARS = {"native": ternary_linear, "int8": ternary_linear_int8}
