"""A linear layer whose weight is ternary and stays packed.

Legend: N output features, K input features, J packed bytes a row (see kernels/packing.py), R rank of the correction.
"""

from typing import Literal, Self

import torch
from torch import Tensor, nn

from bitflux_core.low_rank import LowRank
from bitflux_core.ternary import TernaryWeight
from kernels import dispatch, reference
from kernels.packing import pack_planes, packed_width
from kernels.reference import Activations

Execution = Literal["kernel", "reference"]


class TernaryLinear(nn.Module):
    """Stands in for nn.Linear, for inference: `packed` uint8 [N, J], `scale` float32 [N] and `bias` [N] are buffers.

    `activations` "native" | "int8" chooses the arithmetic; `execution` "kernel" takes the fastest implementation,
    "reference" the plain torch one. Both may be changed at any time. With a `rank` the buffers `down` [R, K] and `up`
    [N, R] correct the ternary weight (see low_rank.py); they read the activations as the product does, so rounded to
    int8 where it takes those.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activations: Activations = "native",
        execution: Execution = "kernel",
        rank: int = 0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activations: Activations = activations
        self.execution: Execution = execution
        self.register_buffer("packed", torch.empty(out_features, packed_width(in_features), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.register_buffer("down", torch.empty(rank, in_features) if rank else None)
        self.register_buffer("up", torch.empty(out_features, rank) if rank else None)

    @classmethod
    def from_ternary(cls, ternary: TernaryWeight, bias_N: Tensor | None) -> Self:
        """The layer of these codes and scales; the bias keeps its dtype."""
        out_features, in_features = ternary.codes_NK.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias=bias_N is not None)
        layer.packed = pack_planes(ternary.codes_NK)
        layer.scale = ternary.scale_N.float()
        layer.bias = None if bias_N is None else bias_N.detach()
        if ternary.correction is not None:
            dtype = torch.float32 if bias_N is None else bias_N.dtype
            layer.down = ternary.correction.down_RK.detach().to(dtype)
            layer.up = ternary.correction.up_NR.detach().to(dtype)
        return layer

    @property
    def correction(self) -> LowRank | None:
        return None if self.up is None or self.down is None else LowRank(self.up, self.down)

    def dequantize(self) -> Tensor:
        """The weight [N, K] in float32, corrected."""
        weight_NK = reference.dequantize(self.packed, self.scale, self.in_features, torch.float32)
        return weight_NK if self.correction is None else weight_NK + self.correction.product()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        weight = (self.packed, self.scale, self.bias, self.in_features)
        if self.execution == "reference":
            y = reference.LINEARS[self.activations](x, *weight)
        else:
            y = dispatch.linear(x, *weight, self.activations)
        if self.correction is None:
            return y
        return y + self.correction.of(reference.rounded_to_int8(x) if self.activations == "int8" else x)

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
            + ("" if self.down is None else f", rank={len(self.down)}")
        )
