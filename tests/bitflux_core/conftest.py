"""A FLUX pipeline small enough to build, save and run in a test: one double and one single block of width 32."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import save_ternary
from bitflux_core.convert import quantize_transformer
from bitflux_core.mini.models import (
    CLIP_WIDTH,
    END,
    LATENT_CHANNELS,
    SPECIAL_TOKENS,
    T5_WIDTH,
    build_text_encoders,
    build_tokenizer,
    build_vae,
)


def build_tiny_transformer(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.eval()


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    return build_tiny_transformer()


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory) -> Path:
    """A saved pipeline; tests that change files copy it first."""
    transformer = build_tiny_transformer()
    clip_tokenizer, t5_tokenizer = build_tokenizer(start=True), build_tokenizer(start=False)
    clip, t5 = build_text_encoders(len(t5_tokenizer), SPECIAL_TOKENS.index(END))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0),
        vae=build_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    directory = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def ternary_dir(tmp_path_factory) -> Path:
    """The ternary checkpoint of that transformer, in several shards; tests that change files copy it first."""
    transformer = build_tiny_transformer()
    quantize_transformer(transformer)
    directory = tmp_path_factory.mktemp("ternary")
    save_ternary(transformer, directory, {"source": "a test"}, method="least_squares", max_shard_size="40KB")
    return directory


@pytest.fixture(scope="session")
def lively_dir(pipeline_dir, tmp_path_factory) -> Path:
    """The tiny pipeline with larger adaLN weights: fresh ones leave the velocity almost zero."""
    folder = tmp_path_factory.mktemp("lively") / "flux"
    shutil.copytree(pipeline_dir, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
    save_file(tensors, file, {"format": "pt"})
    return folder
