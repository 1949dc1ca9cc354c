"""A linear layer whose weight is ternary and stays packed.

Legend: N output features, K input features, J packed bytes a row (see kernels/packing.py).
"""

from typing import Literal, Self

import torch
from torch import Tensor, nn

from bitflux_core.ternary import TernaryWeight
from kernels import dispatch, reference
from kernels.packing import pack_planes, packed_width
from kernels.reference import Activations

Execution = Literal["kernel", "reference"]


class TernaryLinear(nn.Module):
    """Stands in for nn.Linear, for inference: `packed` uint8 [N, J], `scale` float32 [N] and `bias` [N] are buffers.

    `activations` "native" | "int8" chooses the arithmetic; `execution` "kernel" takes the fastest implementation,
    "reference" the plain torch one. Both may be changed at any time.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activations: Activations = "native",
        execution: Execution = "kernel",
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activations: Activations = activations
        self.execution: Execution = execution
        self.register_buffer("packed", torch.empty(out_features, packed_width(in_features), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    @classmethod
    def from_ternary(cls, ternary: TernaryWeight, bias_N: Tensor | None) -> Self:
        """The layer of these codes and scales; the bias keeps its dtype."""
        out_features, in_features = ternary.codes_NK.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias=bias_N is not None)
        layer.packed = pack_planes(ternary.codes_NK)
        layer.scale = ternary.scale_N.float()
        layer.bias = None if bias_N is None else bias_N.detach()
        return layer

    def dequantize(self) -> Tensor:
        """The weight [N, K] in float32."""
        return reference.dequantize(self.packed, self.scale, self.in_features, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        weight = (self.packed, self.scale, self.bias, self.in_features)
        if self.execution == "reference":
            return reference.LINEARS[self.activations](x, *weight)
        return dispatch.linear(x, *weight, self.activations)

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Keeps `scale` in float32, to the bit, where `.to(bfloat16)` and the like cast every floating buffer."""
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activations={self.activations}, execution={self.execution}"
        )
