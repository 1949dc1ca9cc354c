"""The tiny pipeline with larger adaLN weights: fresh ones leave the velocity almost zero."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflux_core.loading import load_transformer
from bitflux_core.quantizer.blocks import BlockSource
from bitflux_core.quantizer.quantize import QuantizeSettings
from bitflux_core.samples import Sampling

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLING = Sampling(width=32, height=32, steps=4, guidance=2.0, max_sequence_length=16)
PROMPTS = ("a photo of a circle", "a photo of a red square", "a photo of two stars", "a photo of a ring")


@pytest.fixture(scope="session")
def lively_dir(pipeline_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lively") / "flux"
    shutil.copytree(pipeline_dir, folder)
    tensors = load_file(folder / "transformer" / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
    save_file(tensors, folder / "transformer" / WEIGHTS, {"format": "pt"})
    return folder


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
