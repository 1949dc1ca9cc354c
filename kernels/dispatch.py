"""The one place that chooses which implementation runs a ternary linear layer by itself."""

import torch
from torch import Tensor

from kernels import ops, reference
from kernels.reference import Activations


def linear(
    x: Tensor,
    packed_NJ: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    in_features: int,
    activations: Activations,
) -> Tensor:
    """x [..., K] times the packed ternary weight, [..., N] in x's dtype, by the best implementation for x's device.

    `activations`: "native" keeps x in its own dtype, "int8" quantizes it per token (see kernels/reference.py).
    """
    if x.device.type != "cuda":
        return reference.LINEARS[activations](x, packed_NJ, scale_N, bias_N, in_features)
    x_MK = x.reshape(-1, in_features)
    if activations == "int8":
        y_MN = ops.matmul_int8(ops.quantize(x_MK), packed_NJ, scale_N, bias_N, in_features=in_features, dtype=x.dtype)
    else:
        y_MN = ops.matmul(x_MK, packed_NJ, scale_N, bias_N)
    return y_MN.unflatten(0, x.shape[:-1])


def backend_name(device: torch.device | str) -> str:
    """Name of the implementation that `linear` uses on `device`, for results and reports."""
    kind = torch.device(device).type
    return "triton (cuda)" if kind == "cuda" else f"torch-reference ({kind})"
