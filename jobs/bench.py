"""Measures what ternary weights save (products, steps, images, loading), what quantizing, scheduling and scoring cost.

Weights are random and of FLUX.1-dev's dimensions, so nothing is downloaded; the scheduler's replicas only wait. Only
ratios within one run compare: GPUs of one kind differ. Exit code 0: measured (a model that does not fit in memory, or a
target that is missed, is a finding), 2: bad input or no CUDA GPU, 3: something failed, or gave a wrong result; its row
says what.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitflux_core.environment import package_version
from bitflux_core.errors import UserError
from bitflux_core.samples import PIXELS_PER_TOKEN
from jobs import _ray
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, INCOMPLETE, Parser, console_on, exit_code_of, names, positive

if TYPE_CHECKING:
    import torch


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    sections = parser.add_subparsers(dest="section", required=True, metavar="SECTION")
    kernels = sections.add_parser("kernels", help="FLUX.1-dev's matrix products against cuBLAS in bf16 and fp8")
    transformer = sections.add_parser("transformer", help="ms a step and memory of a full-size transformer")
    images = sections.add_parser("images", help="seconds an image, text encoders and VAE of full size included")
    small_gpu = sections.add_parser("small-gpu", help="images in 24 GB: ternary resident, bf16 offloaded")
    scaling = sections.add_parser("scaling", help="images a second on one GPU and on more, through the scheduler")
    scaling.add_argument("--gpus", type=_counts, default=(1, 2), metavar="A,B", help="replicas, one a GPU (1,2)")
    scaling.add_argument("--images", type=positive, default=24, metavar="N", help="of each GPU (%(default)s)")
    scaling.add_argument("--steps", type=positive, default=28, metavar="N", help="denoising steps (%(default)s)")
    for section in (kernels, transformer, images, scaling):
        section.add_argument("--tiny", action="store_true", help="tiny shapes, without a GPU too: a smoke run")
    for section in (transformer, images, small_gpu, scaling):
        section.add_argument("--variants", type=names, metavar="A,B", help="only these (all that the table shows)")
        section.add_argument("--resolution", type=_resolution, help="pixels a side (1024)")
    transformer.add_argument("--batch", type=positive, default=1, metavar="N", help="images (%(default)s)")
    transformer.add_argument("--profile", action="store_true", help="write each variant's time by kernel to the output")
    for section in (images, small_gpu):
        section.add_argument("--steps", type=_counts, metavar="A,B", help="denoising steps (28,50; small-gpu: 28)")
    distill = sections.add_parser(
        "distill", help="end-to-end training of a full-size student: GB, seconds a step, hours"
    )
    distill.add_argument("--gpus", type=_counts, default=(1,), metavar="A,B", help="by Ray Train from two on (1)")
    distill.add_argument("--batch", type=_counts, default=(1,), metavar="A,B", help="images a step on each GPU (1)")
    distill.add_argument("--resolution", type=_resolution, help="pixels a side (1024)")
    distill.add_argument("--tiny", action="store_true", help="tiny shapes, without a GPU too: a smoke run")
    quantize = sections.add_parser("quantize", help="the blocks' codes and their training: GB, seconds, hours in all")
    quantize.add_argument("--prompts", type=positive, metavar="N", help="calibration prompts (64)")
    quantize.add_argument("--tiny", action="store_true", help="tiny shapes, without a GPU too: a smoke run")
    loading = sections.add_parser("loading", help="seconds and host memory from a checkpoint's files to the device")
    loading.add_argument("--tiny", action="store_true", help="tiny models, without a GPU too: a smoke run")
    sections.add_parser("tune", help="find the products' block sizes for this GPU; kernels/configs keeps them")
    scheduler = sections.add_parser(
        "scheduler", help="what scheduling costs, and Ray Data beside it; no GPU, 5 minutes"
    )
    scheduler.add_argument("--replicas", type=_counts, default=(8, 64), metavar="A,B", help="stub replicas (8,64)")
    scheduler.add_argument("--seconds", type=positive, default=32, metavar="S", help="drawing of each (%(default)s)")
    scheduler.add_argument("--samples", type=positive, metavar="N", help="of a plan (26,212: two published benchmarks)")
    scoring = sections.add_parser(
        "evaluators", help="ms an image of each evaluator, full-size models of random weights"
    )
    scoring.add_argument("--drawing", type=_seconds, metavar="S", help="seconds of drawing an image, to compare with")
    scoring.add_argument("--tiny", action="store_true", help="tiny models, without a GPU too: a smoke run")
    for section in sections.choices.values():
        _add_common(section)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _bench(parse(argv)))


def _bench(args: Namespace) -> int:
    device = _device(args.section, getattr(args, "tiny", False))
    # Importing diffusers takes longest: only after what can be refused without it.
    from diffusers.utils import logging

    from bitflux_core.benchmark import rows
    from jobs._bench_report import print_result

    logging.set_verbosity_error()  # it calls the choice of an attention experimental, once a model
    rows.check_folder(args.output)
    # Whatever a library prints must not land in the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        measured, settings = SECTIONS[args.section](args, device)
    machine = rows.this_machine(device, Path(__file__).parent.parent)
    result = rows.Result(args.section, measured, machine, settings)
    files = rows.write(result, args.output)
    print_result(console_on(sys.stderr if args.json else sys.stdout), result, files)
    if args.json:
        print(json.dumps(result.document(), indent=2))
    return INCOMPLETE if result.failed else COMPLETE


def _kernels(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from kernels import benchmark, timing

    measure = timing.timer(device)
    size = {"n_bytes": 1 << 20} if args.tiny else {}
    copy_gb_s = timing.copy_bandwidth(device, measure, **size)
    settings = {"copy_gb_s": copy_gb_s, "launch_floor_ms": timing.launch_floor(device, measure), "tiny": args.tiny}
    layers = benchmark.TINY if args.tiny else benchmark.FLUX_DEV
    return _watched(benchmark.measure_layers(layers, device, measure, copy_gb_s)), settings


def _tune(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    import torch

    from kernels import autotune, benchmark, timing

    measured = _watched(autotune.tune(benchmark.FLUX_DEV, device, timing.timer(device)))
    file = autotune.write_configs(measured, args.output, torch.cuda.get_device_name(device))
    return measured, {"configs": file.name}


def _transformer(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import models, steps

    modes = _chosen(args.variants or (steps.TINY_MODES if args.tiny else steps.DEFAULT_MODES), models.MODES)
    sizes = models.TINY if args.tiny else models.FLUX_DEV
    resolution = args.resolution or sizes.resolution
    profile = args.output if args.profile else None
    measured = steps.measure_steps(modes, sizes, device, batch=args.batch, resolution=resolution, profile=profile)
    settings = {"batch": args.batch, "resolution": resolution, "text_tokens": sizes.text_tokens, "tiny": args.tiny}
    return steps.with_ratios(_watched(measured)), settings


def _images(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import images, models

    modes = _chosen(args.variants or images.DEFAULT_MODES, models.MODES)
    sizes = models.TINY if args.tiny else models.FLUX_DEV
    resolution = args.resolution or sizes.resolution
    measured = images.measure_images(modes, sizes, device, args.steps or images.STEPS, resolution)
    return _watched(measured), {"resolution": resolution, "text_tokens": sizes.text_tokens, "tiny": args.tiny}


def _small_gpu(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import images, models

    known = tuple(dict.fromkeys(mode for mode, _ in images.SMALL_GPU_CASES))
    modes, sizes = _chosen(args.variants or known, known), models.FLUX_DEV
    resolution = args.resolution or sizes.resolution
    measured = images.measure_small_gpu(modes, sizes, device, args.steps or images.SMALL_GPU_STEPS, resolution)
    settings = {"resolution": resolution, "text_tokens": sizes.text_tokens, "cap_gb": images.SMALL_GPU_BYTES / 1e9}
    return _watched(measured), settings


def _scheduler(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    if "RAY_ADDRESS" in os.environ:
        raise UserError("section scheduler measures on a Ray of its own, on this machine: unset RAY_ADDRESS")
    _ray.prepare()
    from cluster import benchmark

    with _ray.connected(), tempfile.TemporaryDirectory(prefix="scheduler-", dir=args.output) as folder:
        samples = args.samples or benchmark.SAMPLES
        measured = benchmark.measure(args.replicas, args.seconds, samples, Path(folder).resolve())
        settings = {"seconds_a_sample": benchmark.SECONDS_A_SAMPLE, "samples_a_shard": benchmark.BATCH}
        return _watched(measured), {**settings, "cores": os.cpu_count(), "ray": package_version("ray")}


def _scaling(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    _ray.prepare()
    from bitflux_core.benchmark import models
    from cluster import scaling

    sizes = models.TINY if args.tiny else models.FLUX_DEV
    modes, resolution = _chosen(args.variants or ("ternary-int8",), models.MODES), args.resolution or sizes.resolution
    with _ray.connected():
        measured: list[Any] = []
        for mode in modes:
            rows = scaling.measure_scaling(mode, sizes, args.gpus, args.images, args.steps, resolution)
            measured += _watched(rows)
    return measured, {"steps": args.steps, "resolution": resolution, "tiny": args.tiny}


def _distill(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import distill, models

    sizes = models.TINY if args.tiny else models.FLUX_DEV
    resolution = args.resolution or sizes.resolution

    def measured() -> Iterator[distill.DistillRow]:
        for gpus, batch in itertools.product(args.gpus, args.batch):
            row = distill.DistillRow(gpus, gpus * batch, resolution)
            if gpus == 1:
                yield distill.measure_training(row, sizes, device, args.output)
                continue
            _ray.prepare()
            from cluster import distill_train

            with _ray.connected():
                yield distill_train.measure_training(row, sizes, args.output.resolve())

    settings = {"resolution": resolution, "text_tokens": sizes.text_tokens, "tiny": args.tiny}
    return _watched(measured()), {**settings, "recipe_steps": distill.RECIPE.steps}


def _quantize(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import models, quantize

    sizes, recipe = (models.TINY, quantize.TINY) if args.tiny else (models.FLUX_DEV, quantize.FLUX_DEV)
    if args.prompts:
        recipe = replace(recipe, prompts=args.prompts)
    measured = _watched(quantize.measure_quantizing(recipe, sizes, device, args.output))
    settings = {**asdict(recipe), "resolution": sizes.resolution, "text_tokens": sizes.text_tokens, "tiny": args.tiny}
    return measured, {**settings, "teacher_step_s": quantize.teacher_step_seconds(measured, recipe)}


def _loading(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from bitflux_core.benchmark import loading, models

    sizes = models.TINY if args.tiny else models.FLUX_DEV
    measured = _watched(loading.measure_loading(sizes, device, args.output))
    return measured, {"loads_from_cache": loading.CACHED_LOADS, "tiny": args.tiny}


def _evaluators(args: Namespace, device: "torch.device") -> tuple[list, dict[str, Any]]:
    from evaluators import benchmark, random_models
    from evaluators.language import language

    sizes = random_models.TINY if args.tiny else random_models.FULL
    settings = {"images_a_call": benchmark.IMAGES, "side": sizes.side, "language": language().name, "tiny": args.tiny}
    if args.drawing:
        settings["drawing_s"] = args.drawing
    return _watched(benchmark.measure_evaluators(sizes, device, args.drawing)), settings


SECTIONS = {
    "kernels": _kernels,
    "transformer": _transformer,
    "images": _images,
    "small-gpu": _small_gpu,
    "tune": _tune,
    "scheduler": _scheduler,
    "scaling": _scaling,
    "distill": _distill,
    "quantize": _quantize,
    "loading": _loading,
    "evaluators": _evaluators,
}


def _watched(rows: Iterable[Any]) -> list[Any]:
    """The rows; each is announced on standard error as it comes."""
    from jobs._bench_report import name_of

    seen = []
    for row in rows:
        print(f"{name_of(row)}: {row.error or 'measured'}", file=sys.stderr)
        seen.append(row)
    return seen


def _device(section: str, tiny: bool) -> "torch.device":
    """Where to measure. UserError where there is no CUDA GPU and one is needed."""
    import torch

    if section == "scheduler":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # with its index: the allocator's cap wants one
    if not tiny:
        remedy = "run it on a machine with one" + ("" if section == "small-gpu" else ", or try --tiny")
        raise UserError(f"section {section} needs a CUDA GPU and torch sees none here: {remedy}")
    return torch.device("cpu")


def _chosen(asked: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"unknown variant '{unknown[0]}': choose from {', '.join(known)}")
    return tuple(dict.fromkeys(asked))


def _add_common(section: ArgumentParser) -> None:
    default = Path(DEFAULT_OUTPUT) / "bench"
    section.add_argument(
        "--output", type=Path, default=default, metavar="DIR", help="folder of the files (%(default)s)"
    )
    section.add_argument("--json", action="store_true", help="one JSON document on standard output, all else on stderr")


def _resolution(text: str) -> int:
    pixels = positive(text)
    if pixels % PIXELS_PER_TOKEN:
        raise ArgumentTypeError(f"{pixels} is no multiple of {PIXELS_PER_TOKEN}")
    return pixels


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return seconds


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in names(text))


if __name__ == "__main__":
    sys.exit(main())
