"""A checkpoint with flipped codes differs from its source in that share of the codes, and in nothing else."""

import pytest
import torch

from bitflux_core.checkpoint import load_ternary, save_ternary
from bitflux_core.convert import quantize_transformer
from bitflux_core.degrade import flip_codes
from bitflux_core.layers import block_linears
from bitflux_core.mini.models import build_pipeline
from kernels.packing import unpack_planes


def test_the_asked_share_of_codes_is_flipped_and_the_seed_decides_which(tmp_path):
    transformer = build_pipeline(seed=0).transformer
    quantize_transformer(transformer)
    save_ternary(transformer, tmp_path / "source", {"source": "a test"}, method="least_squares")
    flipped = flip_codes(tmp_path / "source", tmp_path / "flipped", 0.05, seed=1)
    assert flip_codes(tmp_path / "source", tmp_path / "again", 0.05, seed=1) == flipped

    before, after, again = (
        load_ternary(tmp_path / name, dtype=torch.bfloat16, device="cpu") for name in ("source", "flipped", "again")
    )
    layers = block_linears(before)
    names = {f"{name}.packed" for name in layers}
    changed = total = 0
    for name, tensor in before.state_dict().items():
        other = after.state_dict()[name]
        assert torch.equal(other, again.state_dict()[name])
        if name in names:
            width = layers[name.removesuffix(".packed")].in_features
            changed += int((unpack_planes(tensor, width) != unpack_planes(other, width)).sum())
            total += tensor.shape[0] * width
        else:
            assert torch.equal(tensor, other)
    assert changed == flipped
    assert changed / total == pytest.approx(0.05, abs=0.001)
