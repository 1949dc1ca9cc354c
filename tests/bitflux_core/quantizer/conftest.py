"""The lively pipeline as the quantizer sees it: its blocks one by one, its teacher, settings."""

import shutil

import pytest
import torch

from bitflux_core.loading import load_transformer
from bitflux_core.quantizer.blocks import BlockSource
from bitflux_core.quantizer.quantize import QuantizeSettings
from bitflux_core.samples import Sampling

SAMPLING = Sampling(width=32, height=32, steps=4, guidance=2.0, max_sequence_length=16)
PROMPTS = ("a photo of a circle", "a photo of a red square", "a photo of two stars", "a photo of a ring")


@pytest.fixture
def source(lively_dir):
    return BlockSource(lively_dir / "transformer", "cpu", torch.float32)


@pytest.fixture
def teacher(lively_dir):
    return load_transformer("bf16", pipeline_dir=lively_dir, ternary_dir=None, device="cpu", dtype=torch.float32)


@pytest.fixture
def broken_dir(lively_dir, tmp_path):
    """A copy to damage."""
    shutil.copytree(lively_dir, tmp_path / "flux")
    return tmp_path / "flux"


@pytest.fixture(scope="session")
def settings():
    """Makes QuantizeSettings of a few states, with changes."""

    def make(**changes) -> QuantizeSettings:
        values = {
            "init": "compensated",
            "prompts": PROMPTS,
            "states_a_prompt": 2,
            "reconstruction_steps": 0,
            "sampling": SAMPLING,
            "batch": 4,
        }
        return QuantizeSettings(**values | changes)

    return make
