"""From full-precision block linears to ternary ones, in place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.ternary import TernaryWeight, absmean, least_squares, snr_db

METHODS: dict[str, Callable[[Tensor], TernaryWeight]] = {"absmean": absmean, "least_squares": least_squares}


@dataclass(frozen=True)
class LayerSnr:
    """What quantizing one layer lost: its signal-to-noise ratio in dB."""

    name: str
    in_features: int
    out_features: int
    snr_db: float


@torch.no_grad()
def quantize_transformer(transformer: FluxTransformer2DModel, method: str = "least_squares") -> list[LayerSnr]:
    """Replaces every block linear by its ternary twin and reports the loss of each layer.

    One layer at a time, so that at most one layer's full weight is held beside the model. UserError for a weight that
    is not finite.
    """
    quantize = METHODS[method]
    report = []
    for name, linear in block_linears(transformer).items():
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{name} is ternary already: quantize a full-precision transformer")
        if not linear.weight.isfinite().all():
            raise UserError(f"{name}.weight holds values that are not finite: use an undamaged checkpoint")
        ternary = quantize(linear.weight)
        report.append(LayerSnr(name, linear.in_features, linear.out_features, snr_db(linear.weight, ternary)))
        replace_linear(transformer, name, ternary)
    return report


def replace_linear(transformer: FluxTransformer2DModel, name: str, ternary: TernaryWeight) -> None:
    """Puts a TernaryLinear of `ternary` in the place of the linear `name`, whose bias it takes over."""
    bias_N = transformer.get_submodule(name).bias
    transformer.set_submodule(name, TernaryLinear.from_ternary(ternary, bias_N))
