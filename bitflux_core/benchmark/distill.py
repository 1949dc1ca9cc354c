"""End-to-end training of a ternary student at full size, with random weights: memory, seconds a step, hours in all."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch.distributed.device_mesh import DeviceMesh

from bitflux_core.benchmark.models import DTYPE, Sizes, random_transformer
from bitflux_core.benchmark.rows import GB, attempt
from bitflux_core.benchmark.steps import synchronize
from bitflux_core.checkpoint import empty_transformer
from bitflux_core.distill import Conditions
from bitflux_core.distill_memory import check_memory, memory_plan
from bitflux_core.distill_recipe import RECIPE
from bitflux_core.distill_training import EndToEnd, velocities_before
from bitflux_core.samples import PIXELS_PER_TOKEN

WARM_UP, STEPS = 2, 5
PROMPTS = 3  # two trained on, one held out
SAMPLER_STEPS = 2  # the states' way to their places is not measured


@dataclass(frozen=True)
class DistillRow:
    """Training on a number of GPUs. GB are 1e9 bytes; None: not measured.

    Attributes:
        gpus, batch, resolution: GPUs, images a step on all of them together, pixels a side.
        planned_gb: distill_memory.py's estimate of peak_gb.
        resident_gb: allocated between steps, on the first GPU.
        peak_gb: most that was allocated there in a step (CUDA only).
        step_s, int8_step_s: median seconds of a step in either phase.
        held_out_s: of teacher and student on one held-out state.
        save_s: of writing a checkpoint to --output.
        recipe_steps: of the recipe in distill_recipe.py.
        recipe_hours: what its steps, evaluations and checkpoints take by these figures.
        error: what went wrong, a line.
    """

    gpus: int
    batch: int
    resolution: int
    planned_gb: float | None = None
    resident_gb: float | None = None
    peak_gb: float | None = None
    step_s: float | None = None
    int8_step_s: float | None = None
    held_out_s: float | None = None
    save_s: float | None = None
    recipe_steps: int | None = None
    recipe_hours: float | None = None
    error: str | None = None


def measure_training(
    row: DistillRow, sizes: Sizes, device: torch.device, folder: Path, mesh: DeviceMesh | None = None
) -> DistillRow:
    """`row` with its figures or its error; checkpoints go to a folder in `folder`.

    With `mesh` every rank calls it, and an error is raised: the others would wait for a rank that went on alone.
    UserError where the GPU's free memory is less than planned.
    """
    plan = memory_plan(
        empty_transformer(sizes.transformer),
        batch=row.batch // row.gpus,
        tokens=(row.resolution // PIXELS_PER_TOKEN) ** 2 + sizes.text_tokens,
        features=RECIPE.features,
        gpus=row.gpus,
        dtype=DTYPE,
    )
    check_memory(plan, device)
    row = replace(row, planned_gb=plan.step / GB)
    with tempfile.TemporaryDirectory(prefix="distill-", dir=folder) as made:
        if mesh:
            return replace(row, **_measure(row, sizes, device, Path(made), mesh))
        return attempt(row, lambda: _measure(row, sizes, device, Path(made), None))


def _measure(
    row: DistillRow, sizes: Sizes, device: torch.device, folder: Path, mesh: DeviceMesh | None
) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    training = _training(row, sizes, device, folder, mesh)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)  # making the models is not a step
    step_s = _seconds(training.train_step, device)
    training.step = training.native_steps
    int8_step_s = _seconds(training.train_step, device)
    if not math.isfinite(training.held_out_error()):
        raise FloatingPointError("the student's velocity is not finite")
    figures = {
        "step_s": step_s,
        "int8_step_s": int8_step_s,
        "resident_gb": torch.cuda.memory_allocated(device) / GB if on_cuda else None,
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB if on_cuda else None,
        "held_out_s": _seconds(training.held_out_error, device),
        "save_s": _seconds(training.save, device, warm_up=0, steps=1),
        "recipe_steps": RECIPE.steps,
    }
    return {**figures, "recipe_hours": recipe_hours(**figures)}  # type: ignore[arg-type]


def recipe_hours(*, step_s: float, int8_step_s: float, held_out_s: float, save_s: float, **_: object) -> float:
    """Hours of the recipe: what comes before its steps, they, evaluations with a checkpoint each; no early stop."""
    steps = (RECIPE.steps - RECIPE.int8_steps) * step_s + RECIPE.int8_steps * int8_step_s
    pauses = RECIPE.steps // RECIPE.interval * (RECIPE.held_out * held_out_s + save_s)
    return (velocities_before(RECIPE) * held_out_s / 2 + steps + pauses) / 3600


def _training(row: DistillRow, sizes: Sizes, device: torch.device, folder: Path, mesh: DeviceMesh | None) -> EndToEnd:
    torch.manual_seed(0)  # the same weights on every rank
    teacher = random_transformer("bf16", sizes, device)
    start = random_transformer("ternary", sizes, torch.device("cpu"))
    side = row.resolution // PIXELS_PER_TOKEN
    conditions = Conditions(
        torch.randn(PROMPTS, sizes.text_tokens, teacher.config.joint_attention_dim, dtype=DTYPE),
        torch.randn(PROMPTS, teacher.config.pooled_projection_dim, dtype=DTYPE),
        FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32),
    )
    settings = replace(RECIPE, batch=row.batch, slots=row.batch, sampler_steps=SAMPLER_STEPS, weighted=False)
    scheduler = FlowMatchEulerDiscreteScheduler(**sizes.scheduler)
    return EndToEnd(
        teacher,
        start,
        scheduler,
        conditions,
        range(PROMPTS - 1),
        [PROMPTS - 1],
        settings,
        device,
        folder,
        mesh,
    )


def _seconds(work: Callable[[], object], device: torch.device, warm_up: int = WARM_UP, steps: int = STEPS) -> float:
    """The median time of `work`."""
    times = []
    for _ in range(warm_up + steps):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])
