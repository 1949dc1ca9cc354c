"""From prompts and seeds to images, through diffusers' own FluxPipeline.

Legend: B images, T text tokens, D text width, P pooled width, L latent tokens, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from bitflux_core.accounting import resident_bytes
from bitflux_core.errors import UserError
from bitflux_core.prompts import check_lengths
from bitflux_core.samples import Sampling

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_IMAGE_PARTS = ("transformer", "vae", "scheduler")
_WEIGHTS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel, "vae": AutoencoderKL}


@dataclass(frozen=True)
class PromptEmbedding:
    """One encoded prompt, on the CPU: prompt_embeds [T, D] of T5, pooled [P] of CLIP."""

    prompt_embeds: Tensor
    pooled: Tensor


class TextEncoder:
    """T5 and CLIP of a pipeline, as upstream: T5 pads to `max_sequence_length` without a mask, CLIP truncates."""

    def __init__(
        self, pipeline_dir: Path | str, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int
    ):
        self.max_sequence_length = max_sequence_length
        self.pipeline = _load_pipeline(pipeline_dir, dtype, **dict.fromkeys(_IMAGE_PARTS)).to(device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 1) -> list[PromptEmbedding]:
        """One embedding a prompt, `batch` of them encoded at once.

        Each alone where it must not depend on its neighbours, as batched products do in their last bits. UserError for
        a prompt of more than `max_sequence_length` T5 tokens.
        """
        check_lengths(self.pipeline.tokenizer_2, prompts, self.max_sequence_length)
        embeddings = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            embeds_BTD, pooled_BP, _ = self.pipeline.encode_prompt(part, max_sequence_length=self.max_sequence_length)
            embeddings += [PromptEmbedding(*pair) for pair in zip(embeds_BTD.cpu(), pooled_BP.cpu(), strict=True)]
        return embeddings


class ImageGenerator:
    """A transformer with a pipeline's VAE and scheduler, for text that is already encoded."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        pipeline_dir: Path | str,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.device, self.dtype = torch.device(device), dtype
        parts = dict.fromkeys(_TEXT_PARTS)
        self.pipeline = _load_pipeline(pipeline_dir, dtype, transformer=transformer, **parts).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # a model that the process held before does not count

    def draw(self, embeddings: Sequence[PromptEmbedding], noise_seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        """Images uint8 [B, H, W, 3], one for each pair of embedding and seed.

        FloatingPointError where an image is not finite: cast to uint8 it would pass for a black one.
        """
        noise_BLC = torch.stack([self.initial_noise(seed, sampling) for seed in noise_seeds])
        images_BHWC = self.pipeline(
            prompt_embeds=torch.stack([e.prompt_embeds for e in embeddings]).to(self.device, self.dtype),
            pooled_prompt_embeds=torch.stack([e.pooled for e in embeddings]).to(self.device, self.dtype),
            latents=noise_BLC,
            width=sampling.width,
            height=sampling.height,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="np",
        ).images
        finite_B = np.isfinite(images_BHWC).all(axis=(1, 2, 3))
        if not finite_B.all():
            raise FloatingPointError(f"image {int(finite_B.argmin())} of the batch has values that are not finite")
        return (images_BHWC * 255).round().astype(np.uint8)

    def initial_noise(self, seed: int, sampling: Sampling) -> Tensor:
        """Packed noise of one sample, float32 [L, 4 C], from its own CPU generator: the same on every device."""
        pixels = 2 * self.pipeline.vae_scale_factor
        if sampling.width % pixels or sampling.height % pixels:
            raise UserError(f"{sampling.width}x{sampling.height} pixels: use multiples of {pixels}")
        channels = self.pipeline.transformer.config.in_channels // 4
        height, width = 2 * (sampling.height // pixels), 2 * (sampling.width // pixels)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise_1CHW = torch.randn((1, channels, height, width), generator=generator)
        return FluxPipeline._pack_latents(noise_1CHW, 1, channels, height, width)[0]

    def peak_memory_bytes(self) -> int:
        """Peak allocation on the CUDA device since this generator was built; on CPU the transformer's bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes(self.pipeline.transformer)


def _load_pipeline(pipeline_dir: Path | str, dtype: torch.dtype, **parts: object) -> FluxPipeline:
    """The pipeline in `pipeline_dir` with `parts` put in place of its own; a part given as None is not loaded."""
    if not (Path(pipeline_dir) / "model_index.json").is_file():
        raise UserError(
            f"{pipeline_dir} is no diffusers pipeline (no model_index.json): name the folder of a FLUX model"
        )
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    how = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    try:
        loaded = {name: _load_whole(Path(pipeline_dir) / name, how) for name in _WEIGHTS if name not in parts}
        return FluxPipeline.from_pretrained(pipeline_dir, **how, **loaded, **parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{pipeline_dir} cannot be loaded ({problem}): copy the model again") from error


def _load_whole(folder: Path, how: dict[str, object]) -> torch.nn.Module:
    """The model in `folder`. ValueError where a tensor is missing or not finite.

    Of a missing one the libraries only warn, and draw it at random; values that are not finite reach every image.
    """
    model, report = _WEIGHTS[folder.name].from_pretrained(folder, output_loading_info=True, **how)
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{folder.name} has {kind.replace('_', ' ')} such as {next(iter(report[kind]))}")
    for name, parameter in model.named_parameters():
        low, high = parameter.detach().aminmax()  # without the temporaries of isfinite; a NaN is both
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{folder.name} holds values that are not finite in {name}")
    return model.eval()
