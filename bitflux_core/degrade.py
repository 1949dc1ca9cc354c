"""A ternary checkpoint made worse on purpose, by a known amount: what the nightly regression must notice."""

from pathlib import Path

import torch

from bitflux_core.checkpoint import load_ternary, save_ternary
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from kernels.packing import pack_planes, unpack_planes


def flip_codes(source: Path, target: Path, share: float, seed: int) -> int:
    """Writes `source` to the new folder `target` with `share` of every layer's codes changed; how many were.

    A code becomes either of the other two, at places and to values that the seed chooses. UserError as in
    `load_ternary` and `save_ternary`.
    """
    transformer = load_ternary(source, dtype=torch.bfloat16, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    flipped = 0
    for layer in block_linears(transformer).values():
        assert isinstance(layer, TernaryLinear)
        codes_NK = unpack_planes(layer.packed, layer.in_features)
        change_NK = torch.rand(codes_NK.shape, generator=generator) < share
        step_NK = torch.randint(1, 3, codes_NK.shape, generator=generator, dtype=torch.int8)
        other_NK = (codes_NK + 1 + step_NK) % 3 - 1
        layer.packed = pack_planes(torch.where(change_NK, other_NK, codes_NK))
        flipped += int(change_NK.sum())
    save_ternary(transformer, target, {"flipped": share, "seed": seed}, method="flipped codes")
    return flipped
