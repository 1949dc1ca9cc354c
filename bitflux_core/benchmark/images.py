"""Whole images through diffusers' FluxPipeline: seconds by stage, memory, and what crosses from the host.

Text encoding starts from random token ids, since no tokenizer is needed for random weights.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline

from bitflux_core.benchmark.models import Sizes, random_pipeline
from bitflux_core.benchmark.rows import GB, attempt, release
from bitflux_core.benchmark.steps import synchronize
from bitflux_core.benchmark.traffic import HostToDevice

GUIDANCE = 3.5
DEFAULT_MODES = ("bf16", "ternary", "ternary-int8")
STEPS = (28, 50)
RESIDENT, MODEL_OFFLOAD, SEQUENTIAL_OFFLOAD = "resident", "model offload", "sequential offload"

SMALL_GPU_STEPS = (28,)
SMALL_GPU_BYTES = 24e9  # an A10's or an L4's nominal memory; what CUDA itself takes is not counted
SMALL_GPU_CASES = (
    ("ternary", RESIDENT),
    ("ternary-int8", RESIDENT),
    ("bf16", RESIDENT),
    ("bf16", MODEL_OFFLOAD),
    ("bf16", SEQUENTIAL_OFFLOAD),
)


@dataclass(frozen=True)
class ImageRow:
    """One image of one mode. GB are 1e9 bytes; None: not measured.

    Attributes:
        mode: see models.MODES; not compiled unless its name says so.
        placement: "resident" (every model, text encoders included, stays on the GPU), or diffusers' "model offload" or
            "sequential offload" with their defaults.
        resolution, steps: pixels a side, denoising steps.
        memory_cap_gb: what the process may allocate on the GPU; None: all of it.
        text_s, denoise_s, decode_s: seconds of CLIP and T5, of the steps, and of the VAE with the way to the host.
        image_s: their sum.
        resident_gb: allocated once the models are in place, before an image.
        peak_gb: most that was allocated during the image (CUDA only).
        text_encoders: where they are.
        host_to_device_gb: what one image copies from host memory to the GPU (only under a cap).
        error: what went wrong, a line.
    """

    mode: str
    placement: str
    resolution: int
    steps: int
    memory_cap_gb: float | None = None
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    image_s: float | None = None
    resident_gb: float | None = None
    peak_gb: float | None = None
    text_encoders: str | None = None
    host_to_device_gb: float | None = None
    error: str | None = None


def measure_images(
    modes: Sequence[str], sizes: Sizes, device: torch.device, steps: Sequence[int], resolution: int
) -> Iterator[ImageRow]:
    """A row a mode and number of steps, everything resident; the models of a mode are made once."""
    for mode in modes:
        made: dict[str, FluxPipeline] = {}
        for count in steps:
            row = ImageRow(mode, RESIDENT, resolution, count)
            yield attempt(row, lambda row=row, made=made: _resident(row, made, sizes, device))  # type: ignore[misc]
        made.clear()
        release()


def measure_small_gpu(
    modes: Sequence[str], sizes: Sizes, device: torch.device, steps: Sequence[int], resolution: int
) -> Iterator[ImageRow]:
    """A row a case of SMALL_GPU_CASES whose mode is asked for, under a cap on the GPU memory that may be allocated."""
    for mode, placement in SMALL_GPU_CASES:
        for count in steps if mode in modes else ():
            row = ImageRow(mode, placement, resolution, count, memory_cap_gb=SMALL_GPU_BYTES / GB)
            yield attempt(row, lambda row=row: _small_gpu(row, sizes, device))  # type: ignore[misc]


def _resident(row: ImageRow, made: dict[str, FluxPipeline], sizes: Sizes, device: torch.device) -> dict[str, Any]:
    if row.mode not in made:
        made[row.mode] = random_pipeline(row.mode, sizes, device)
        draw(made[row.mode], sizes, device, 1, row.resolution)  # whatever compiles at the first call
    return _measure(row, made[row.mode], sizes, device)


def _small_gpu(row: ImageRow, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    if row.placement == RESIDENT:
        with _capped(device, SMALL_GPU_BYTES):
            pipeline = random_pipeline(row.mode, sizes, device)
            draw(pipeline, sizes, device, 1, row.resolution)
            return _measure(row, pipeline, sizes, device)
    # Made outside the cap: random numbers come from the GPU, a real model from a file.
    pipeline = random_pipeline(row.mode, sizes, torch.device("cpu"))
    release()
    with _capped(device, SMALL_GPU_BYTES):
        if row.placement == MODEL_OFFLOAD:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.enable_sequential_cpu_offload()
        draw(pipeline, sizes, device, 1, row.resolution)
        return _measure(row, pipeline, sizes, device)


def _measure(row: ImageRow, pipeline: FluxPipeline, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device) if on_cuda else None
    found: dict[str, Any] = {}
    # The counter adds some 10 us of Python an operator. That is nothing beside moving the weights, so an offloaded
    # image is counted as it is timed; a resident one is timed alone and drawn once more to be counted.
    counter = HostToDevice()
    with contextlib.nullcontext() if row.placement == RESIDENT else counter:
        found.update(draw(pipeline, sizes, device, row.steps, row.resolution))
    if row.placement == RESIDENT and row.memory_cap_gb is not None:
        with counter:
            draw(pipeline, sizes, device, row.steps, row.resolution)
    if row.memory_cap_gb is not None:
        found["host_to_device_gb"] = counter.bytes / GB
    return {
        **found,
        "image_s": sum(found[f"{stage}_s"] for stage in ("text", "denoise", "decode")),
        "resident_gb": None if resident is None else resident / GB,
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB if on_cuda else None,
        "text_encoders": ("on the GPU" if on_cuda else "on the CPU") if row.placement == RESIDENT else "offloaded",
    }


@torch.no_grad()
def draw(pipeline: FluxPipeline, sizes: Sizes, device: torch.device, steps: int, resolution: int) -> dict[str, float]:
    """Draws one image; the seconds of its stages. FloatingPointError for latents that are not finite."""
    seconds = {}
    start = _now(device)
    clip_ids = torch.randint(3, pipeline.text_encoder.config.vocab_size - 2, (1, sizes.clip_tokens))
    clip_ids[:, -1] = pipeline.text_encoder.config.eos_token_id  # its place is where CLIP pools
    t5_ids = torch.randint(3, pipeline.text_encoder_2.config.vocab_size, (1, sizes.text_tokens))
    pooled = pipeline.text_encoder(clip_ids.to(device)).pooler_output
    embeds = pipeline.text_encoder_2(t5_ids.to(device))[0]
    seconds["text_s"] = _now(device) - start

    start = _now(device)
    latents = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        width=resolution,
        height=resolution,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=sizes.text_tokens,
        output_type="latent",
    ).images
    seconds["denoise_s"] = _now(device) - start

    start = _now(device)
    finite = bool(latents.isfinite().all())
    latents = pipeline._unpack_latents(latents, resolution, resolution, pipeline.vae_scale_factor)
    latents = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    image = pipeline.vae.decode(latents, return_dict=False)[0]
    pipeline.image_processor.postprocess(image, output_type="pil")
    seconds["decode_s"] = _now(device) - start
    pipeline.maybe_free_model_hooks()
    if not finite:
        raise FloatingPointError("the image's latents are not finite")
    return seconds


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _capped(device: torch.device, n_bytes: float) -> Iterator[None]:
    """Lets the process allocate no more than `n_bytes` on a CUDA device."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(n_bytes / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
