"""FLUX.1-dev's models at full size with random weights, and a tiny set for smoke runs.

Legend: N output features, J packed bytes a row.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bitflux_core.checkpoint import empty_transformer
from bitflux_core.fused import fuse
from bitflux_core.layers import empty_ternary_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.variants import VARIANTS
from kernels.attention import attention_backend
from kernels.benchmark import random_packed

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02  # 3,072 inputs gain about 1.1 a layer: activations stay finite through all blocks
_CODE_STD = (2 / 3) ** 0.5  # of codes -1, 0, 1, equally likely


@dataclass(frozen=True)
class Mode:
    """A variant of bitflux_core/variants.py with what torch can add to it."""

    variant: str
    compiled: bool = False  # the blocks, by torch.compile; full precision attends by cuDNN then
    graphs: bool = True  # with kernels a step is a CUDA graph, as bitflux_core/loading.py has it


MODES = {
    "bf16": Mode("bf16"),
    "bf16-compiled": Mode("bf16", compiled=True),
    "ternary": Mode("ternary"),
    "ternary-eager": Mode("ternary", graphs=False),
    "ternary-compiled": Mode("ternary", compiled=True, graphs=False),
    "ternary-int8": Mode("ternary-int8"),
    "ternary-int8-eager": Mode("ternary-int8", graphs=False),
    "ternary-int8-compiled": Mode("ternary-int8", compiled=True, graphs=False),
    "ternary-reference": Mode("ternary-reference"),
}


@dataclass(frozen=True)
class Sizes:
    """Configurations of a FLUX pipeline's models, by their own names."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    text_tokens: int = 512
    clip_tokens: int = 77
    resolution: int = 1024
    scheduler: dict[str, Any] = field(default_factory=lambda: {"shift": 3.0, "use_dynamic_shifting": True})


_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_DEV = Sizes(
    transformer={"guidance_embeds": True},  # diffusers' defaults are FLUX.1's: 19 + 38 blocks, 24 heads of 128
    vae=_VAE,
    clip={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    t5={"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
)
TINY = Sizes(
    transformer={
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    vae={**_VAE, "block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    clip={
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 98,
        "eos_token_id": 99,
    },
    t5={"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    text_tokens=16,
    resolution=64,
)


def build_transformer(mode: str, sizes: Sizes, device: torch.device) -> FluxTransformer2DModel:
    """The transformer of a mode, on `device`, ready to run."""
    how = VARIANTS[MODES[mode].variant]
    transformer = random_transformer(MODES[mode].variant, sizes, device)
    if how.ternary and how.execution == "kernel":
        return _compiled(fuse(transformer, MODES[mode].graphs), mode)
    # Diffusers keeps the last choice for the whole process, so the eager mode names its own as well.
    transformer.set_attention_backend("_native_cudnn" if MODES[mode].compiled else "native")
    return _compiled(transformer, mode)


@torch.no_grad()
def random_transformer(variant: str, sizes: Sizes, device: torch.device) -> FluxTransformer2DModel:
    """A transformer whose ternary weights are made packed: their full-precision form is never in memory."""
    how = VARIANTS[variant]
    model = empty_transformer(sizes.transformer)
    if how.ternary:
        empty_ternary_linears(model, how.activations, how.execution)
    # FLUX's modules have no buffers but TernaryLinear's, so everything empty is filled here. Diffusers' own `to` warns
    # of modules to keep in float32 even where a model has none.
    model = nn.Module.to(model, DTYPE).to_empty(device=device).eval().requires_grad_(False)
    maker = _maker(device)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        else:
            parameter.copy_(torch.empty_like(parameter, device=maker).normal_(0, WEIGHT_STD))
    for name, module in model.named_modules():
        if name.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
            nn.init.ones_(module.weight)
        if isinstance(module, TernaryLinear):
            module.packed.copy_(random_packed(module.out_features, module.in_features, maker))
            module.scale.uniform_(0.5, 1.5).mul_(WEIGHT_STD / _CODE_STD)
            if module.bias is not None:
                module.bias.zero_()
    return model


def random_pipeline(mode: str, sizes: Sizes, device: torch.device) -> FluxPipeline:
    """A FluxPipeline with every model but the tokenizers, whose vocabularies random weights do not need."""
    vae = _random(AutoencoderKL, sizes.vae, device)
    clip = _random(CLIPTextModel, CLIPTextConfig(**sizes.clip, projection_dim=sizes.clip["hidden_size"]), device)
    t5 = _random(T5EncoderModel, T5Config(**sizes.t5, is_encoder_decoder=False, use_cache=False), device)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**sizes.scheduler),
        vae=vae,
        text_encoder=clip,
        tokenizer=None,
        text_encoder_2=t5,
        tokenizer_2=None,
        transformer=build_transformer(mode, sizes, device),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def step_inputs(sizes: Sizes, batch: int, resolution: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Keyword arguments of a transformer's forward, as FluxPipeline passes them."""
    config = empty_transformer(sizes.transformer).config
    side = resolution // 16  # a token is 2 x 2 latents, a latent 8 x 8 pixels

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device)

    return {
        "hidden_states": normal(batch, side * side, config.in_channels),
        "encoder_hidden_states": normal(batch, sizes.text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, dtype=DTYPE, device=device),
        "guidance": torch.full((batch,), 3.5, device=device),
        "img_ids": FluxPipeline._prepare_latent_image_ids(batch, side, side, device, DTYPE),
        "txt_ids": torch.zeros(sizes.text_tokens, 3, dtype=DTYPE, device=device),
    }


def attention_name(mode: str, sizes: Sizes, tokens: int, device: torch.device) -> str:
    """Which implementation of attention a mode runs for this many tokens."""
    config = empty_transformer(sizes.transformer).config
    shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
    query_BSHD = torch.empty(shape, dtype=DTYPE, device=device)
    how = VARIANTS[MODES[mode].variant]
    if how.ternary and how.execution == "kernel":
        return attention_backend(query_BSHD)
    if MODES[mode].compiled:
        return "cudnn"
    query_BHSD = query_BSHD.transpose(1, 2)
    chosen = SDPBackend(torch._fused_sdp_choice(query_BHSD, query_BHSD, query_BHSD))
    return chosen.name.lower().removesuffix("_attention")


def _compiled(transformer: FluxTransformer2DModel, mode: str) -> FluxTransformer2DModel:
    if MODES[mode].compiled:
        torch.compiler.reset()  # code compiled for an earlier model would count as recompilations of this one's
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer


def _random(kind: type[nn.Module], config: Any, device: torch.device) -> nn.Module:
    """A model with its own initialization, made in DTYPE where that is fast, then moved."""
    with _default_dtype(DTYPE), _maker(device):
        model = kind(**config) if isinstance(config, dict) else kind(config)
    return model.to(device).eval().requires_grad_(False)


def _maker(device: torch.device) -> torch.device:
    """Where random numbers are made: billions of them take minutes on a CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else device


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
