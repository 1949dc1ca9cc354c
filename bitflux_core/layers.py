"""Which layers of a FLUX transformer are ternary."""

from collections.abc import Container

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from bitflux_core.errors import UserError
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
    rank: int = 0,
) -> None:
    """Puts TernaryLinear on the meta device in the place of every block linear, or of those in `names`.

    Each has a low-rank correction of `rank`, or none for 0.
    """
    with torch.device("meta"):
        for name, linear in block_linears(transformer).items():
            if names is None or name in names:
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                transformer.set_submodule(name, TernaryLinear(*sizes, activations, execution, rank))


def correction_rank(transformer: FluxTransformer2DModel) -> int:
    """The rank of the corrections of its ternary layers, 0 without. ValueError where they differ."""
    layers = [layer for layer in block_linears(transformer).values() if isinstance(layer, TernaryLinear)]
    ranks = {0 if layer.down is None else len(layer.down) for layer in layers}
    if len(ranks) > 1:
        raise ValueError(f"corrections of ranks {sorted(ranks)}: all ternary layers must have one rank, or none")
    return ranks.pop() if ranks else 0


def check_rank(transformer: FluxTransformer2DModel, rank: int) -> None:
    """UserError for a rank below 0, which stands for no correction, or beyond that of the smallest block linear."""
    layers = block_linears(transformer)
    sizes = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    if not 0 <= rank <= sizes[smallest]:
        raise UserError(f"low rank {rank}: take 1 to {sizes[smallest]}, the full rank of {smallest}")
