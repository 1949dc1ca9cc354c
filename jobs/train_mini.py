"""Makes the embedded mini FLUX again: autoencoder, teacher, detector, CLIP, from a seed, on one GPU (or several).

    python jobs/train_mini.py --output DIR                                      everything, one after the other
    python jobs/train_mini.py --output DIR --stages detector,clip               some stages
    torchrun --nproc-per-node 2 jobs/train_mini.py --output DIR --stages teacher   one stage on two GPUs

Each stage reads what earlier ones wrote to DIR (`flux`, `detector`, `clip`, `ternary`) and writes a folder there.
"""

import argparse
import copy
import json
import os
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import open_clip
import torch
from diffusers import FluxPipeline
from transformers import Mask2FormerForUniversalSegmentation

from bitflux_core.checkpoint import save_ternary
from bitflux_core.distill import Distiller, DistillSettings, encode_conditions
from bitflux_core.errors import UserError
from bitflux_core.files import fingerprint
from bitflux_core.mini.clip import build_clip, save_weights, write_config
from bitflux_core.mini.detector import build_detector, save_detector
from bitflux_core.mini.models import TOKENS, build_pipeline
from bitflux_core.mini.train_clip import train_clip
from bitflux_core.mini.train_detector import train_detector
from bitflux_core.mini.train_teacher import train_teacher
from bitflux_core.mini.train_text import train_text
from bitflux_core.mini.train_vae import train_vae
from bitflux_core.mini.world import training_prompts
from bitflux_core.training import use_fast_math

STAGES = ("vae", "text", "teacher", "detector", "clip", "twin")
SHARD_SIZE = "15MB"
SAMPLER_STEPS, GUIDANCE = 20, 2.0  # as manifests/profiles/mini.yaml draws
SIDE = 8  # image tokens a side


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that the stages read and write")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {','.join(STAGES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=512, help="scenes a step and GPU of the teacher")
    parser.add_argument("--images", type=int, default=250000, help="rendered scenes a GPU that the teacher learns from")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--text-batch", type=int, default=256, help="prompts a step of the text encoder's own stage")
    parser.add_argument("--teacher-steps", type=int, default=23000)
    parser.add_argument("--teacher-seconds", type=float, help="time the flow phase instead of counting its steps")
    parser.add_argument("--guidance-steps", type=int, default=2000)
    parser.add_argument("--detector-steps", type=int, default=3000)
    parser.add_argument("--detector-batch", type=int, default=256)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--twin-steps", type=int, default=6000)
    parser.add_argument("--twin-seconds", type=float, help="time the distillation instead of counting its steps")
    parser.add_argument("--twin-prompts", type=int, default=32768, help="prompts that the twin is distilled on")
    parser.add_argument("--twin-lr", type=float, default=2e-3, help="of the latent weights, in units of their scale")
    parser.add_argument("--twin-optimizer", choices=("adam", "muon"), default="adam", help="of the latent weights")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of the transformer's matrices")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"--stages: {unknown[0]!r} is not a stage; choose among {', '.join(STAGES)}")
    use_fast_math()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    for stage in stages:
        globals()[f"stage_{stage}"](args, device)


def stage_vae(args: argparse.Namespace, device: torch.device) -> None:
    pipeline = build_pipeline(args.seed)
    train_vae(
        pipeline.vae, steps=args.vae_steps, batch=64 if device.type == "cuda" else 4, device=device, seed=args.seed
    )
    save_pipeline(pipeline, args.output / "flux")


def stage_text(args: argparse.Namespace, device: torch.device) -> None:
    pipeline = FluxPipeline.from_pretrained(str(args.output / "flux"))
    accuracy = train_text(
        pipeline.text_encoder_2,
        pipeline.tokenizer_2,
        steps=args.text_steps,
        batch=args.text_batch,
        device=device,
        seed=args.seed,
    )
    print("text:", ", ".join(f"{question} {share:.1%}" for question, share in accuracy.items()))
    save_pipeline(pipeline, args.output / "flux")


def stage_teacher(args: argparse.Namespace, device: torch.device) -> None:
    first = os.environ.get("RANK", "0") == "0"
    pipeline = FluxPipeline.from_pretrained(str(args.output / "flux"))
    train_teacher(
        pipeline,
        steps=args.teacher_steps,
        guidance_steps=args.guidance_steps,
        batch=args.batch,
        images=args.images,
        device=device,
        seed=args.seed,
        optimizer=args.optimizer,
        after_flow=lambda: save_pipeline(copy.deepcopy(pipeline), args.output / "flux-unguided") if first else None,
        seconds=args.teacher_seconds,
    )
    if first:
        save_pipeline(pipeline, args.output / "flux")


def stage_detector(args: argparse.Namespace, device: torch.device) -> None:
    """Goes on from the detector in the folder, if there is one."""
    torch.manual_seed(args.seed)
    folder = args.output / "detector"
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).float() if folder.exists() else build_detector()
    train_detector(
        model, steps=args.detector_steps, batch=args.detector_batch, device=device, seed=args.seed + args.detector_steps
    )
    save_detector(model.to("cpu", torch.bfloat16), folder)


def stage_clip(args: argparse.Namespace, device: torch.device) -> None:
    folder = args.output / "clip"
    write_config(folder)
    torch.manual_seed(args.seed)
    model = build_clip(folder)
    train_clip(
        model,
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        steps=args.clip_steps,
        batch=512,
        device=device,
        seed=args.seed,
    )
    save_weights(model, folder)


def stage_twin(args: argparse.Namespace, device: torch.device) -> None:
    """The ternary twin, from the teacher and the training prompts alone: no image."""
    pipeline = FluxPipeline.from_pretrained(str(args.output / "flux")).to(device)
    settings = DistillSettings(
        steps=args.twin_steps,
        batch=args.batch,
        sampler_steps=SAMPLER_STEPS,
        guidance=GUIDANCE,
        latent_lr=args.twin_lr,
        optimizer=args.twin_optimizer,
        seed=args.seed,
    )
    specs, weights = training_prompts()
    chosen = random.Random(args.seed).choices(specs, weights, k=args.twin_prompts)
    conditions = encode_conditions(pipeline, [spec.text for spec in chosen], tokens=TOKENS, side=SIDE)
    distiller = Distiller(pipeline.transformer, pipeline.scheduler, conditions, settings, device)
    student = distiller.run(args.twin_seconds)
    settings = replace(settings, steps=distiller.steps_made)
    provenance = {"source": "mini FLUX", "fingerprint": fingerprint(args.output / "flux"), **asdict(settings)}
    save_ternary(student, args.output / "ternary", provenance, method="self-distillation")


def save_pipeline(pipeline: FluxPipeline, folder: Path) -> None:
    """bfloat16 weights in shards small enough to commit, without the paths of the machine that made them."""
    pipeline.to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
