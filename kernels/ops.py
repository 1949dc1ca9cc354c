"""The steps of a ternary FLUX block as torch operators: the plain torch reference anywhere, Triton kernels on CUDA.

Each is a registered custom operator with a fake implementation, so that `torch.compile(fullgraph=True)`, CUDA graphs
and the meta device work. See kernels/reference.py for what each computes, and for the legend of the shapes.

Operators return plain tuples, `[:]` of a Quantized; the functions below wrap them again.

Errors: ValueError names the tensor, what was expected and what came, before anything is launched.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.packing import packed_width
from kernels.reference import Quantized, quantized_width

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("bitflux::quantize", mutates_args=())
def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize(x)[:]


@torch.library.custom_op("bitflux::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return reference.norm_modulate(x, shift, scale, eps)


@torch.library.custom_op("bitflux::norm_modulate_quantize", mutates_args=())
def _norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.norm_modulate_quantize(x, shift, scale, eps)[:]


@torch.library.custom_op("bitflux::gelu", mutates_args=())
def _gelu(x: Tensor, head: Tensor | None) -> Tensor:
    return reference.gelu(x, head)


@torch.library.custom_op("bitflux::gelu_quantize", mutates_args=())
def _gelu_quantize(x: Tensor, head: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gelu_quantize(x, head)[:]


@torch.library.custom_op("bitflux::matmul", mutates_args=())
def _matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    in_features: int,
) -> Tensor:
    return reference.matmul(x, packed, scale, bias, gate, residual, in_features)


@torch.library.custom_op("bitflux::matmul_int8", mutates_args=())
def _matmul_int8(
    values: Tensor,
    token_scale: Tensor,
    token_sum: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    x = Quantized(values, token_scale, token_sum)
    return reference.matmul_int8(x, packed, scale, bias, gate, residual, in_features, dtype)


@torch.library.custom_op("bitflux::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    qkv: Tensor,
    text_qkv: Tensor | None,
    heads: int,
    query_weight: Tensor,
    key_weight: Tensor,
    text_query_weight: Tensor | None,
    text_key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    text_weights = None
    if text_query_weight is not None and text_key_weight is not None:
        text_weights = (text_query_weight, text_key_weight)
    weights = (query_weight, key_weight)
    return reference.qk_norm_rope(qkv, text_qkv, heads, weights, text_weights, cos, sin, eps)


@_quantize.register_kernel("cuda")
def _(x):
    return _cuda().quantize(x)[:]


@_norm_modulate.register_kernel("cuda")
def _(x, shift, scale, eps):
    return _cuda().norm_modulate(x, shift, scale, eps)


@_norm_modulate_quantize.register_kernel("cuda")
def _(x, shift, scale, eps):
    return _cuda().norm_modulate_quantize(x, shift, scale, eps)[:]


@_gelu.register_kernel("cuda")
def _(x, head):
    return _cuda().gelu(x, head)


@_gelu_quantize.register_kernel("cuda")
def _(x, head):
    return _cuda().gelu_quantize(x, head)[:]


@_matmul.register_kernel("cuda")
def _(x, *rest):
    return _cuda().matmul(x, *rest)


@_matmul_int8.register_kernel("cuda")
def _(values, token_scale, token_sum, *rest):
    return _cuda().matmul_int8(Quantized(values, token_scale, token_sum), *rest)


@_qk_norm_rope.register_kernel("cuda")
def _(qkv, text_qkv, heads, query_weight, key_weight, text_query_weight, text_key_weight, cos, sin, eps):
    text_weights = None if text_query_weight is None else (text_query_weight, text_key_weight)
    weights = (query_weight, key_weight)
    return _cuda().qk_norm_rope(qkv, text_qkv, heads, weights, text_weights, cos, sin, eps)


def _cuda():
    """The Triton side, which no machine without a GPU imports."""
    from kernels import cuda

    return cuda


def quantize(x_MK: Tensor) -> Quantized:
    """int8 activations of x [M, K], a row a token."""
    _check_matrix("x", x_MK)
    return Quantized(*_quantize(x_MK))


def norm_modulate(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Tensor:
    """LayerNorm and AdaLN-Zero modulation, [M, K] in x's dtype."""
    _check_modulation(x_MK, shift_BK, scale_BK)
    return _norm_modulate(x_MK, shift_BK, scale_BK, eps)


def norm_modulate_quantize(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Quantized:
    """`norm_modulate` straight to int8 activations, without rounding to x's dtype in between."""
    _check_modulation(x_MK, shift_BK, scale_BK)
    return Quantized(*_norm_modulate_quantize(x_MK, shift_BK, scale_BK, eps))


def gelu(x_MK: Tensor, head_MA: Tensor | None = None) -> Tensor:
    """[head | tanh-GELU(x)], [M, A + K] in x's dtype."""
    _check_head(x_MK, head_MA)
    return _gelu(x_MK, head_MA)


def gelu_quantize(x_MK: Tensor, head_MA: Tensor | None = None) -> Quantized:
    """`gelu` straight to int8 activations, without a concatenated copy."""
    _check_head(x_MK, head_MA)
    return Quantized(*_gelu_quantize(x_MK, head_MA))


def matmul(
    x_MK: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    *,
    gate_BN: Tensor | None = None,
    residual_MN: Tensor | None = None,
) -> Tensor:
    """residual + gate x (x times the ternary weight + bias), [M, N] in x's dtype; x stays in its floating dtype."""
    _check_matrix("x", x_MK)
    _check_weight(x_MK, x_MK.shape[1], packed_NJ, scale_N, bias_N, gate_BN, residual_MN)
    return _matmul(x_MK, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, x_MK.shape[1])


def matmul_int8(
    x: Quantized,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    *,
    gate_BN: Tensor | None = None,
    residual_MN: Tensor | None = None,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `matmul` for int8 activations of `in_features` columns, [M, N] in `dtype`."""
    expected = (x.values_MP.shape[0], quantized_width(in_features))
    _check("values", x.values_MP, expected, torch.int8, packed_NJ)
    _check("token scale", x.scale_M, expected[:1], torch.float32, packed_NJ)
    _check("token sum", x.sum_M, expected[:1], torch.int32, packed_NJ)
    _check_weight(x.values_MP, in_features, packed_NJ, scale_N, bias_N, gate_BN, residual_MN)
    return _matmul_int8(*x, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, in_features, dtype)


def qk_norm_rope(
    qkv_BSC: Tensor,
    text_qkv_BTC: Tensor | None,
    heads: int,
    weights: tuple[Tensor, Tensor],
    text_weights: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T + S, H, D] for attention, text first; `rotary` is (cos, sin), each [T + S, D]."""
    size = weights[0].shape[0]
    tokens = qkv_BSC.shape[1] + (0 if text_qkv_BTC is None else text_qkv_BTC.shape[1])
    for name, tensor in (("cos", rotary[0]), ("sin", rotary[1])):
        _check(name, tensor, (tokens, size), None, qkv_BSC)
    for name, part in (("qkv", qkv_BSC), ("text qkv", text_qkv_BTC)):
        if part is not None and (part.ndim != 3 or part.shape[2] < 2 * heads * size or part.dtype not in FLOATS):
            raise ValueError(f"{name} is {_is(part)}: expected floating [B, S, at least {2 * heads * size}]")
    text_query, text_key = text_weights or (None, None)
    return _qk_norm_rope(qkv_BSC, text_qkv_BTC, heads, *weights, text_query, text_key, *rotary, eps)


@_quantize.register_fake
def _(x):
    return _fake_quantized(x, x.shape[1])


@_norm_modulate.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@_norm_modulate_quantize.register_fake
def _(x, shift, scale, eps):
    return _fake_quantized(x, x.shape[1])


@_gelu.register_fake
def _(x, head):
    return x.new_empty(x.shape[0], x.shape[1] + (0 if head is None else head.shape[1]))


@_gelu_quantize.register_fake
def _(x, head):
    return _fake_quantized(x, x.shape[1] + (0 if head is None else head.shape[1]))


@_matmul.register_fake
def _(x, packed, scale, bias, gate, residual, in_features):
    return x.new_empty(x.shape[0], packed.shape[0])


@_matmul_int8.register_fake
def _(values, token_scale, token_sum, packed, scale, bias, gate, residual, in_features, dtype):
    return values.new_empty(values.shape[0], packed.shape[0], dtype=dtype)


@_qk_norm_rope.register_fake
def _(qkv, text_qkv, heads, query_weight, key_weight, text_query_weight, text_key_weight, cos, sin, eps):
    tokens = qkv.shape[1] + (0 if text_qkv is None else text_qkv.shape[1])
    shape = (qkv.shape[0], tokens, heads, query_weight.shape[0])
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _fake_quantized(x: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    values = x.new_empty(rows, quantized_width(in_features), dtype=torch.int8)
    return values, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)


def _check_matrix(name: str, x_MK: Tensor) -> None:
    if x_MK.ndim != 2 or x_MK.dtype not in FLOATS:
        raise ValueError(f"{name} is {_is(x_MK)}: expected a matrix of float32, bfloat16 or float16")


def _check_modulation(x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor) -> None:
    _check_matrix("x", x_MK)
    images = shift_BK.shape[0] if shift_BK.ndim else 0
    if not images or x_MK.shape[0] % images:
        raise ValueError(f"shift is {_is(shift_BK)}: expected a row an image, their number a divisor of {len(x_MK)}")
    for name, tensor in (("shift", shift_BK), ("scale", scale_BK)):
        _check(name, tensor, (images, x_MK.shape[1]), None, x_MK)


def _check_head(x_MK: Tensor, head_MA: Tensor | None) -> None:
    _check_matrix("x", x_MK)
    if head_MA is not None:
        _check_matrix("head", head_MA)
        _check("head", head_MA, (x_MK.shape[0], head_MA.shape[1]), x_MK.dtype, x_MK)


def _check_weight(
    x: Tensor,
    in_features: int,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    gate_BN: Tensor | None,
    residual_MN: Tensor | None,
) -> None:
    tokens, out_features = x.shape[0], packed_NJ.shape[0]
    _check("packed", packed_NJ, (out_features, packed_width(in_features)), torch.uint8, x)
    _check("scale", scale_N, (out_features,), torch.float32, x)
    if bias_N is not None:
        _check("bias", bias_N, (out_features,), None, x)
    if gate_BN is not None:
        images = gate_BN.shape[0] if gate_BN.ndim else 0
        if not images or tokens % images:
            raise ValueError(f"gate is {_is(gate_BN)}: expected a row an image, their number a divisor of {tokens}")
        _check("gate", gate_BN, (images, out_features), None, x)
    if residual_MN is not None:
        _check("residual", residual_MN, (tokens, out_features), None, x)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, beside: Tensor) -> None:
    """`dtype` None stands for any floating one; `beside` is on the device where `tensor` has to be."""
    fits = tensor.dtype in FLOATS if dtype is None else tensor.dtype == dtype
    if tuple(tensor.shape) != shape or not fits or tensor.device != beside.device:
        kind = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {_is(tensor)}: expected {kind} {list(shape)} on {beside.device}")


def _is(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
