"""One denoising step of the transformer: milliseconds and memory, by mode."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitflux_core.accounting import resident_bytes, size_report
from bitflux_core.benchmark.models import MODES, Sizes, attention_name, build_transformer, step_inputs
from bitflux_core.benchmark.rows import GB, attempt
from bitflux_core.checkpoint import empty_transformer
from bitflux_core.variants import VARIANTS

Step = Callable[[], torch.Tensor]

DEFAULT_MODES = ("bf16", "bf16-compiled", "ternary", "ternary-int8", "ternary-int8-eager", "ternary-reference")
TINY_MODES = ("bf16", "ternary", "ternary-int8", "ternary-reference")  # what runs without CUDA
BASELINES = ("bf16-compiled", "bf16")  # the first one measured is what the others are compared with
WARM_UP, STEPS = 3, 12
SLOW_WARM_UP, SLOW_STEPS = 1, 2  # the reference decodes every weight at every step
_PROFILE_ROWS = 60


@dataclass(frozen=True)
class StepRow:
    """One mode. GB are 1e9 bytes; None: not measured.

    Attributes:
        mode: see models.MODES.
        batch, resolution, image_tokens, text_tokens: what a step sees; tokens of one image, pixels a side.
        steps: how many were timed, after warming up.
        step_ms: median milliseconds of a step, steps following each other without a pause.
        step_ms_min, step_ms_max: the fastest and the slowest.
        speedup: step_ms of `baseline` / step_ms.
        resident_gb: allocated once the transformer is loaded (on a CPU: its tensors).
        peak_gb: most that was allocated during the steps (CUDA only).
        peak_ratio: peak_gb of `baseline` / peak_gb.
        storage_gb: the transformer's tensors as stored.
        storage_ratio: bf16's storage / storage_gb.
        attention: implementation of attention.
        baseline: what the ratios compare with.
        error: what went wrong, a line.
    """

    mode: str
    batch: int
    resolution: int
    image_tokens: int
    text_tokens: int
    steps: int | None = None
    step_ms: float | None = None
    step_ms_min: float | None = None
    step_ms_max: float | None = None
    speedup: float | None = None
    resident_gb: float | None = None
    peak_gb: float | None = None
    peak_ratio: float | None = None
    storage_gb: float | None = None
    storage_ratio: float | None = None
    attention: str | None = None
    baseline: str | None = None
    error: str | None = None


def measure_steps(
    modes: Iterable[str], sizes: Sizes, device: torch.device, *, batch: int, resolution: int, profile: Path | None
) -> Iterator[StepRow]:
    """A row a mode, each model freed before the next; ratios need all of them, see `with_ratios`.

    `profile` is a folder for a table of each mode's device time by kernel, `profile-MODE.txt`.
    """
    for mode in modes:
        row = StepRow(mode, batch, resolution, (resolution // 16) ** 2, sizes.text_tokens)
        yield attempt(row, lambda row=row: _measure(row, sizes, device, profile))  # type: ignore[misc]


def with_ratios(rows: list[StepRow]) -> list[StepRow]:
    """The same rows, compared with the baseline where one was measured."""
    timed = {row.mode: row for row in rows if row.step_ms is not None}
    baseline = next((timed[mode] for mode in BASELINES if mode in timed), None)
    if baseline is None:
        return rows
    return [
        replace(
            row,
            baseline=baseline.mode,
            speedup=_quotient(baseline.step_ms, row.step_ms),
            peak_ratio=_quotient(baseline.peak_gb, row.peak_gb),
        )
        for row in rows
    ]


def milliseconds(step: Step, device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each of `steps` steps; on CUDA by events and without waiting in between, as a sampler runs."""
    if device.type != "cuda":
        return [1e3 * _seconds(step) for _ in range(steps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _measure(row: StepRow, sizes: Sizes, device: torch.device, profile: Path | None) -> dict[str, Any]:
    on_cuda, slow = device.type == "cuda", row.mode == "ternary-reference"
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    transformer = build_transformer(row.mode, sizes, device)
    if on_cuda:
        resident = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)  # making random weights took more than the model does
    else:
        resident = resident_bytes(transformer)
    inputs = step_inputs(sizes, row.batch, row.resolution, device)

    def step() -> torch.Tensor:
        return transformer(**inputs, return_dict=False)[0]

    for _ in range(SLOW_WARM_UP if slow else WARM_UP):
        output = step()
    if not output.isfinite().all():
        raise FloatingPointError("the step's output is not finite")
    times = milliseconds(step, device, SLOW_STEPS if slow else STEPS)
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else None
    if profile is not None:
        (profile / f"profile-{row.mode}.txt").write_text(_profiled(step, device))
    report = size_report(empty_transformer(sizes.transformer))
    storage = report.storage_bytes if VARIANTS[MODES[row.mode].variant].ternary else report.bf16_bytes
    return {
        "steps": len(times),
        "step_ms": statistics.median(times),
        "step_ms_min": min(times),
        "step_ms_max": max(times),
        "resident_gb": resident / GB,
        "peak_gb": None if peak is None else peak / GB,
        "storage_gb": storage / GB,
        "storage_ratio": report.bf16_bytes / storage,
        "attention": attention_name(row.mode, sizes, row.text_tokens + row.image_tokens, device),
    }


def _profiled(step: Step, device: torch.device) -> str:
    """One step's time by kernel (by operator on a CPU), the longest first."""
    from torch.profiler import ProfilerActivity

    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        synchronize(device)
    events = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profile.key_averages()
    ]
    total = sum(microseconds for microseconds, _, _ in events) or 1.0
    lines = [f"{total / 1e3:10.3f} ms in all", f"{'ms':>10} {'share':>7} {'calls':>6}  name"]
    for microseconds, count, name in sorted(events, reverse=True)[:_PROFILE_ROWS]:
        lines.append(f"{microseconds / 1e3:10.3f} {microseconds / total:7.1%} {count:6}  {name}")
    return "\n".join(lines) + "\n"


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
