"""Which layers of a FLUX transformer are ternary."""

from collections.abc import Container

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from bitflux_core.linear import Execution, TernaryLinear
from kernels.reference import Activations

BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def block_linears(transformer: FluxTransformer2DModel) -> dict[str, nn.Linear | TernaryLinear]:
    """Every linear layer of the double and single blocks by its full name, modulation included, nothing outside.

    The choice of 1.58-bit FLUX (Yang et al. 2024, arXiv 2412.18653).
    """
    return {
        f"{blocks}.{name}": module
        for blocks in BLOCKS
        for name, module in getattr(transformer, blocks).named_modules()
        if isinstance(module, nn.Linear | TernaryLinear)
    }


def empty_ternary_linears(
    transformer: FluxTransformer2DModel,
    activations: Activations = "native",
    execution: Execution = "kernel",
    names: Container[str] | None = None,
) -> None:
    """Puts TernaryLinear on the meta device in the place of every block linear, or of those in `names`."""
    with torch.device("meta"):
        for name, linear in block_linears(transformer).items():
            if names is None or name in names:
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                transformer.set_submodule(name, TernaryLinear(*sizes, activations, execution))
