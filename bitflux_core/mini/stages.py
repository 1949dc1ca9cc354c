"""The stages that make the mini FLUX; each reads what earlier ones wrote to its folder and writes there itself."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import open_clip
import torch
from diffusers import FluxPipeline
from transformers import (
    BlipForQuestionAnswering,
    DPTForDepthEstimation,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)

from bitflux_core.errors import UserError
from bitflux_core.mini.clip import build_clip, save_weights, write_config
from bitflux_core.mini.compositions import vocabulary
from bitflux_core.mini.depth import build_depth, save_depth, train_depth
from bitflux_core.mini.detector import build_detector, save_detector
from bitflux_core.mini.models import build_pipeline, widen_vocabulary
from bitflux_core.mini.train_clip import train_clip
from bitflux_core.mini.train_detector import train_detector
from bitflux_core.mini.train_teacher import train_teacher
from bitflux_core.mini.train_text import train_text
from bitflux_core.mini.train_vae import LEARNING_RATE as VAE_LR
from bitflux_core.mini.train_vae import train_vae
from bitflux_core.mini.train_vqa import train_vqa
from bitflux_core.mini.vqa import build_tokenizer, build_vqa, save_vqa
from bitflux_core.training import use_fast_math

Model = TypeVar("Model", bound=PreTrainedModel)

SHARD_SIZE = "15MB"  # small enough to commit


@dataclass(frozen=True)
class TrainSettings:
    """How long each stage trains and on how much. Batches are a GPU's; `seconds` replace the steps beside them."""

    output: Path
    seed: int = 0
    vae_steps: int = 1600
    vae_batch: int = 64
    vae_lr: float = VAE_LR  # less, where the stage goes on from a trained one
    text_steps: int = 1500
    text_batch: int = 256
    images: int = 250_000  # rendered scenes that the teacher learns from
    batch: int = 512  # of the teacher
    teacher_steps: int = 23_000
    teacher_seconds: float | None = None
    guidance_steps: int = 1400
    detector_steps: int = 3000
    detector_batch: int = 256
    clip_steps: int = 1000
    clip_batch: int = 512
    vqa_steps: int = 6000
    vqa_batch: int = 256  # scenes, of several questions each
    depth_steps: int = 2000
    depth_batch: int = 128


def run_stages(names: list[str], settings: TrainSettings) -> None:
    """Runs the named stages in the order given, on this process's GPU or on the CPU.

    UserError for an unknown stage, and for one whose forerunners' models are not in the folder.
    """
    for name in names:
        if name not in STAGES:
            raise UserError(f"unknown stage '{name}': choose from {', '.join(STAGES)}")
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{settings.output} cannot be made ({error.strerror}): name another folder") from error
    use_fast_math()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    for name in names:
        STAGES[name](settings, device)


def _vae(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the pipeline in the folder, if there is one, with the words that its vocabulary lacks added."""
    if (settings.output / "flux").exists():
        pipeline = _load_pipeline(settings)
        widen_vocabulary(pipeline, vocabulary())
    else:
        pipeline = build_pipeline(settings.seed)
    steps, batch = settings.vae_steps, settings.vae_batch
    train_vae(pipeline.vae, steps=steps, batch=batch, device=device, seed=settings.seed, learning_rate=settings.vae_lr)
    _save_pipeline(pipeline, settings.output / "flux")


def _text(settings: TrainSettings, device: torch.device) -> None:
    pipeline = _load_pipeline(settings)
    accuracy = train_text(
        pipeline.text_encoder_2,
        pipeline.tokenizer_2,
        steps=settings.text_steps,
        batch=settings.text_batch,
        device=device,
        seed=settings.seed,
    )
    print("text:", ", ".join(f"{question} {share:.1%}" for question, share in accuracy.items()))
    _save_pipeline(pipeline, settings.output / "flux")


def _teacher(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the transformer in the folder; what drew without guidance stays in `flux-unguided`."""
    first = os.environ.get("RANK", "0") == "0"
    pipeline = _load_pipeline(settings)
    train_teacher(
        pipeline,
        steps=settings.teacher_steps,
        seconds=settings.teacher_seconds,
        guidance_steps=settings.guidance_steps,
        batch=settings.batch,
        images=settings.images,
        device=device,
        seed=settings.seed,
        after_flow=lambda: _save_pipeline(copy.deepcopy(pipeline), settings.output / "flux-unguided")
        if first
        else None,
    )
    if first:
        _save_pipeline(pipeline, settings.output / "flux")


def _detector(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the detector in the folder, if there is one."""
    torch.manual_seed(settings.seed)
    folder = settings.output / "detector"
    model = _goes_on(Mask2FormerForUniversalSegmentation, folder, build_detector)
    steps, batch = settings.detector_steps, settings.detector_batch
    train_detector(model, steps=steps, batch=batch, device=device, seed=settings.seed + steps)
    save_detector(model.to("cpu", torch.bfloat16), folder)


def _clip(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the model in the folder, if there is one."""
    folder = settings.output / "clip"
    write_config(folder)
    torch.manual_seed(settings.seed)
    model, tokenizer = build_clip(folder), open_clip.get_tokenizer(f"local-dir:{folder}")
    steps, batch = settings.clip_steps, settings.clip_batch
    train_clip(model, tokenizer, steps=steps, batch=batch, device=device, seed=settings.seed)
    save_weights(model, folder)


def _vqa(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the model in the folder, if there is one."""
    torch.manual_seed(settings.seed)
    folder = settings.output / "vqa"
    tokenizer = build_tokenizer()
    model = _goes_on(BlipForQuestionAnswering, folder, lambda: build_vqa(tokenizer))
    steps, batch = settings.vqa_steps, settings.vqa_batch
    accuracy = train_vqa(model, tokenizer, steps=steps, batch=batch, device=device, seed=settings.seed)
    print(f"vqa: {accuracy:.1%} of the last questions answered right", flush=True)
    save_vqa(model.to("cpu", torch.bfloat16), tokenizer, folder)


def _depth(settings: TrainSettings, device: torch.device) -> None:
    """Goes on from the model in the folder, if there is one."""
    torch.manual_seed(settings.seed)
    folder = settings.output / "depth"
    model = _goes_on(DPTForDepthEstimation, folder, build_depth)
    steps, batch = settings.depth_steps, settings.depth_batch
    error = train_depth(model, steps=steps, batch=batch, device=device, seed=settings.seed)
    print(f"depth: mean squared error {error:.4f}", flush=True)
    save_depth(model.to("cpu", torch.bfloat16), folder)


STAGES: dict[str, Callable[[TrainSettings, torch.device], None]] = {
    "vae": _vae,
    "text": _text,
    "teacher": _teacher,
    "detector": _detector,
    "clip": _clip,
    "vqa": _vqa,
    "depth": _depth,
}


def _load_pipeline(settings: TrainSettings) -> FluxPipeline:
    folder = settings.output / "flux"
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} holds no pipeline: run the stage vae first")
    return FluxPipeline.from_pretrained(str(folder))


def _goes_on(kind: type[Model], folder: Path, build: Callable[[], Model]) -> Model:
    """The model in the folder, in float32, or a new one where there is no folder."""
    return kind.from_pretrained(folder).float() if folder.exists() else build()


def _save_pipeline(pipeline: FluxPipeline, folder: Path) -> None:
    """bfloat16 weights, without the paths of the machine that made them."""
    pipeline.to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
