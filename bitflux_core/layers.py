"""Which layers of a FLUX transformer are ternary."""

from diffusers import FluxTransformer2DModel
from torch import nn

from bitflux_core.linear import TernaryLinear

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
