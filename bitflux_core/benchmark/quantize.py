"""What the quantizer does before training end to end, block by block at full size with random weights: time and memory.

Two double blocks and a single one lie in a pipeline's folder and are walked by the quantizer's own functions. The first
is ternary beforehand: what is measured then stands behind a ternary block, and teacher and student hold states of their
own, as from the second block on. Files are read from the page cache, as they are wherever a host's memory holds them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from bitflux_core.benchmark.models import DTYPE, Sizes, random_transformer
from bitflux_core.benchmark.rows import GB, attempt, release
from bitflux_core.benchmark.steps import synchronize
from bitflux_core.checkpoint import empty_transformer
from bitflux_core.distill import Conditions, sampler_sigmas
from bitflux_core.quantizer.block_walk import CalibrationSet, WalkSettings, assemble, quantize_blocks
from bitflux_core.quantizer.blocks import BlockSource, Stream
from bitflux_core.quantizer.calibration import Calibration, States
from bitflux_core.quantizer.memory import check_memory, required_bytes
from bitflux_core.quantizer.reconstruction import ReconstructionSettings, reconstruct
from bitflux_core.quantizer.work import WorkFolder
from bitflux_core.samples import PIXELS_PER_TOKEN
from bitflux_core.ternary import TernaryWeight
from bitflux_core.training import plain_arithmetic
from kernels.packing import unpack_planes

DOUBLE, SINGLE, OUTSIDE = "double", "single", "outside"
CALIBRATION, CODES, RECONSTRUCTION = "calibration", "codes", "reconstruction"
KINDS = {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}
WRITTEN = {DOUBLE: 2, SINGLE: 1, OUTSIDE: 1}  # in the pipeline's folder
SAMPLER_WARM_UP, SAMPLER_STEPS = 1, 3
TRAINING_WARM_UP, TRAINING_STEPS = 2, 10
GUIDANCE = 3.5


@dataclass(frozen=True)
class Recipe:
    """How the blocks of a profile are quantized, see quantizer/quantize.py.

    Attributes:
        prompts, states_a_prompt: calibration prompts, and the points kept of each one's trajectory.
        batch: states that pass a block at once.
        sampler_steps: of a trajectory.
        reconstruction_steps: of each block, where blocks are trained.
    """

    prompts: int
    states_a_prompt: int
    batch: int
    sampler_steps: int
    reconstruction_steps: int

    @property
    def states(self) -> int:
        return self.prompts * self.states_a_prompt


# manifests/profiles/flux-dev.yaml with the defaults of jobs/quantize.py, and the training that its help shows.
FLUX_DEV = Recipe(prompts=64, states_a_prompt=4, batch=4, sampler_steps=50, reconstruction_steps=300)
TINY = Recipe(prompts=3, states_a_prompt=2, batch=2, sampler_steps=4, reconstruction_steps=20)


@dataclass(frozen=True)
class QuantizeRow:
    """One part of the work on the blocks. GB are 1e9 bytes; None: not measured.

    Attributes:
        part: "calibration" (one step of every prompt's trajectory, through one block), "codes" (one block by
            compensated rounding: read, quantized, its ratios measured, saved, stepped over), "reconstruction" (what
            the training of one block adds to that), or all of them, with and without the last.
        block: "double" or "single"; "outside" is what lies around the blocks, of every step or once; None: of all.
        times: how often the recipe does this.
        planned_gb: what quantizer/memory.py estimates for the whole recipe, with blocks trained or not as the row has
            it; the job checks that before it loads.
        peak_gb: most that was allocated (CUDA only), the calibration states that a GPU keeps included.
        seconds: of one time.
        read_s: of them spent on reading the block's weights from the page cache.
        step_s: median seconds of a training step; seconds has as many steps as the recipe.
        hours: of all times. Without encoding the prompts and writing the checkpoint.
        error: what went wrong, a line.
    """

    part: str
    block: str | None
    times: int
    planned_gb: float
    peak_gb: float | None = None
    seconds: float | None = None
    read_s: float | None = None
    step_s: float | None = None
    hours: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Span:
    """What a walk did from one call for a block to the next, or outside the blocks. `read_s` are of `seconds`."""

    name: str
    seconds: float
    read_s: float
    peak_bytes: int | None

    @property
    def kind(self) -> str:
        return KINDS.get(self.name.split(".")[0], OUTSIDE)


class WatchedSource(BlockSource):
    """A source that notes how long a walk stays with each block that it asks for, and how much memory that takes."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype):
        super().__init__(directory, device, dtype)
        self._spans: list[Span] = []
        self._name: str | None = None  # of the block with which the walk is, or OUTSIDE
        self._since = self._read_s = 0.0

    @contextmanager
    def watched(self) -> Iterator[list[Span]]:
        """Fills the list while open, from the first call on."""
        self._spans, self._name = [], None
        yield self._spans
        self._turn_to(None)

    def block(self, name: str) -> nn.Module:
        self._turn_to(name)
        start = _now(self.device)
        block = super().block(name)
        self._read_s = _now(self.device) - start
        return block

    def enter(self, **inputs: Tensor) -> Stream:
        self._turn_to(OUTSIDE)
        return super().enter(**inputs)

    def leave(self, stream: Stream, **inputs: Tensor) -> Tensor:
        self._turn_to(OUTSIDE)
        return super().leave(stream, **inputs)

    def _turn_to(self, name: str | None) -> None:
        if name == self._name:
            return
        now = _now(self.device)
        if self._name is not None:
            self._spans.append(Span(self._name, now - self._since, self._read_s, _peak_bytes(self.device)))
        _forget_peak(self.device)
        self._name, self._since, self._read_s = name, now, 0.0


@dataclass(frozen=True)
class _Measured:
    """Columns of a part's rows, by `block`."""

    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None


def measure_quantizing(recipe: Recipe, sizes: Sizes, device: torch.device, folder: Path) -> Iterator[QuantizeRow]:
    """A row a part and kind of block, then two for all of them; the pipeline, 1.8 GB of FLUX.1-dev's, lies in `folder`.

    UserError where the GPU's free memory is less than planned.
    """
    empty = empty_transformer(sizes.transformer)
    blocks = {DOUBLE: empty.config.num_layers, SINGLE: empty.config.num_single_layers, OUTSIDE: 1}
    plain, trained = _required(recipe, sizes, trained=False), _required(recipe, sizes, trained=True)
    check_memory(trained, device)
    rows: list[QuantizeRow] = []
    with TemporaryDirectory(prefix="quantize-", dir=folder) as made:
        work = _Work(recipe, sizes, device, Path(made))
        parts: list[tuple[str, Callable[[], dict], int, int, tuple[str, ...]]] = [
            (CALIBRATION, work.calibrate, recipe.sampler_steps, plain, (DOUBLE, SINGLE, OUTSIDE)),
            (CODES, work.quantize, 1, plain, (DOUBLE, SINGLE, OUTSIDE)),
            (RECONSTRUCTION, work.reconstruct, 1, trained, (DOUBLE, SINGLE)),
        ]
        for part, measure, times, planned, kinds in parts:
            measured = attempt(_Measured(), lambda measure=measure: {"columns": measure()})  # type: ignore[misc]
            for kind in kinds:
                row = QuantizeRow(part, kind, times * blocks[kind], planned / GB, error=measured.error)
                rows.append(_with_hours(replace(row, **measured.columns.get(kind, {}))))
                yield rows[-1]
    yield _all([row for row in rows if row.part != RECONSTRUCTION], "all without reconstruction", plain)
    yield _all(rows, "all with reconstruction", trained)


def teacher_step_seconds(rows: list[QuantizeRow], recipe: Recipe) -> float | None:
    """Of one sampler step of every calibration prompt through the whole teacher."""
    hours = [row.hours for row in rows if row.part == CALIBRATION]
    return None if None in hours else 3600 * sum(hours) / recipe.sampler_steps  # type: ignore[arg-type]


def _all(rows: list[QuantizeRow], part: str, planned: int) -> QuantizeRow:
    """What does not fit, or goes wrong, in one part does so in all."""
    error = next((row.error for row in rows if row.error), None)
    row = QuantizeRow(part, None, 1, planned / GB, error=error)
    if error:
        return row
    peaks = [row.peak_gb for row in rows if row.peak_gb is not None]
    seconds = 3600 * sum(row.hours for row in rows if row.hours is not None)
    return _with_hours(replace(row, seconds=seconds, peak_gb=max(peaks, default=None)))


def _with_hours(row: QuantizeRow) -> QuantizeRow:
    return row if row.seconds is None else replace(row, hours=row.times * row.seconds / 3600)


def _required(recipe: Recipe, sizes: Sizes, trained: bool) -> int:
    """As quantizer/quantize.py asks for it."""
    return required_bytes(
        empty_transformer(sizes.transformer),
        states=recipe.states,
        batch=recipe.batch,
        tokens=(sizes.resolution // PIXELS_PER_TOKEN) ** 2 + sizes.text_tokens,
        compensated=True,
        corrected=False,
        trained=trained,
        dtype=DTYPE,
    )


class _Work:
    """The few blocks of a random FLUX in `folder`, and each part of the work on them."""

    def __init__(self, recipe: Recipe, sizes: Sizes, device: torch.device, folder: Path):
        self.recipe, self.sizes, self.device, self.folder = recipe, sizes, device, folder

    def calibrate(self) -> dict[str, dict[str, Any]]:
        """Each kind of block's columns in a sampler step."""
        scheduler = FlowMatchEulerDiscreteScheduler(**self.sizes.scheduler)
        tokens = len(self.calibration.conditions.image_ids_L3)
        for steps in (SAMPLER_WARM_UP, SAMPLER_STEPS):
            sigmas = sampler_sigmas(scheduler, steps, tokens, torch.device("cpu"))
            with self.source.watched() as spans:
                self.calibration.trajectories(self.source, sigmas, states_a_prompt=1, seed=0)
        return {kind: _columns(spans, kind, count * SAMPLER_STEPS) for kind, count in WRITTEN.items()}

    def quantize(self) -> dict[str, dict[str, Any]]:
        """Each kind of block's columns where it gets compensated codes."""
        first, *measured = self.source.names
        work = WorkFolder(self.folder / CODES, {})
        work.save(first, *self.rounded.load(first))
        calibration = CalibrationSet(self.calibration, self.states)
        with self.source.watched() as spans:
            quantize_blocks(self.source, calibration, WalkSettings("compensated"), work, _report)
        counted = [span for span in spans if span.name in (OUTSIDE, *measured)]
        return {kind: _columns(counted, kind, 1) for kind in WRITTEN}

    @torch.no_grad()
    @plain_arithmetic()
    def reconstruct(self) -> dict[str, dict[str, Any]]:
        """Each kind of block's columns where it is trained, from rounded codes: they cost nothing."""
        first, *measured = self.source.names
        teacher = self.source.block(first)
        student = assemble(teacher, self.rounded.load(first)[0])
        teacher_streams = self.calibration.streams(self.source, self.states)
        student_streams = [stream.through(student) for stream in teacher_streams]
        teacher_streams = [stream.through(teacher) for stream in teacher_streams]
        del teacher, student
        kinds = (KINDS[name.split(".")[0]] for name in measured)
        return {
            kind: self._train(name, teacher_streams, student_streams)
            for kind, name in zip(kinds, measured, strict=True)
        }

    def _train(self, name: str, teacher_streams: list[Stream], student_streams: list[Stream]) -> dict[str, Any]:
        teacher, (tensors, _) = self.source.block(name), self.rounded.load(name)
        student = assemble(teacher, tensors)
        weights = {}
        for layer, linear in teacher.named_modules():
            if isinstance(linear, nn.Linear):
                codes_NK = unpack_planes(tensors[f"{layer}.packed"].to(self.device), linear.in_features)
                weights[layer] = TernaryWeight(codes_NK, tensors[f"{layer}.scale"].to(self.device))
        # The teacher sees every batch before the training, one in each step, and every batch afterwards.
        passes: list[float] = []
        teacher.register_forward_pre_hook(lambda _module, _args: passes.append(_now(self.device)))
        steps, batches = TRAINING_WARM_UP + TRAINING_STEPS, len(teacher_streams)
        release()
        start = _now(self.device)
        settings = ReconstructionSettings(steps)
        reconstruct(name, teacher, student, weights, teacher_streams, student_streams, settings)
        seconds, peak = _now(self.device) - start, _peak_bytes(self.device)
        assert len(passes) == 2 * batches + steps
        training = passes[batches : batches + steps + 1]
        measured = training[TRAINING_WARM_UP:]
        step_s = statistics.median(after - before for before, after in itertools.pairwise(measured))
        around_s = seconds - (training[-1] - training[0])
        return {
            "seconds": around_s + self.recipe.reconstruction_steps * step_s,
            "step_s": step_s,
            "peak_gb": None if peak is None else peak / GB,
        }

    @cached_property
    def source(self) -> WatchedSource:
        few = {**self.sizes.transformer, "num_layers": WRITTEN[DOUBLE], "num_single_layers": WRITTEN[SINGLE]}
        torch.manual_seed(0)
        directory = self.folder / "transformer"
        random_transformer("bf16", replace(self.sizes, transformer=few), self.device).save_pretrained(directory)
        release()
        # As jobs/quantize.py chooses.
        return WatchedSource(directory, self.device, DTYPE if self.device.type == "cuda" else torch.float32)

    @cached_property
    def calibration(self) -> Calibration:
        prompts, config = self.recipe.prompts, self.source.empty.config
        side = self.sizes.resolution // PIXELS_PER_TOKEN
        conditions = Conditions(
            torch.randn(prompts, self.sizes.text_tokens, config.joint_attention_dim, dtype=self.source.dtype),
            torch.randn(prompts, config.pooled_projection_dim, dtype=self.source.dtype),
            FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32),
        )
        return Calibration(conditions, GUIDANCE, self.recipe.batch)

    @cached_property
    def states(self) -> States:
        tokens = len(self.calibration.conditions.image_ids_L3)
        return States(
            torch.randn(self.recipe.states, tokens, self.source.empty.config.in_channels),
            torch.rand(self.recipe.states),
            torch.arange(self.recipe.states) % self.recipe.prompts,
        )

    @cached_property
    def rounded(self) -> WorkFolder:
        """All blocks in codes that need no calibration."""
        work = WorkFolder(self.folder / "rounded", {})
        quantize_blocks(self.source, None, WalkSettings("absmean"), work)
        return work


def _columns(spans: list[Span], kind: str, count: int) -> dict[str, Any]:
    """The means over `count` times of a kind of block, and the peak of all."""
    mine = [span for span in spans if span.kind == kind]
    peaks = [span.peak_bytes for span in mine if span.peak_bytes is not None]
    return {
        "seconds": sum(span.seconds for span in mine) / count,
        "read_s": None if kind == OUTSIDE else sum(span.read_s for span in mine) / count,
        "peak_gb": max(peaks) / GB if peaks else None,
    }


def _report(name: str, _: object) -> None:
    print(f"{name}: quantized", flush=True)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
