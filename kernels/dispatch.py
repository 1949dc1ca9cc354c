"""The one place that chooses which implementation runs a ternary linear."""

import torch
from torch import Tensor

from kernels import reference
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
    return reference.LINEARS[activations](x, packed_NJ, scale_N, bias_N, in_features)


def backend_name(device: torch.device | str) -> str:
    """Name of the implementation that `linear` uses on `device`, for results and reports."""
    return f"torch-reference ({torch.device(device).type})"
