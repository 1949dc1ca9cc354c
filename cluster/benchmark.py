"""What the scheduler costs, without models: the time that replicas wait, planning, resuming, the driver's memory.

Drawing by Ray Data stands beside it as the baseline: the same stub work by the same number of actors on the same Ray.
"""

import math
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitflux_core.samples import Sampling
from cluster.audit import scan
from cluster.compaction import compact
from cluster.plan import Plan, build_plan
from cluster.profile import Cost, Models, Profile
from cluster.run import Progress, run
from cluster.store import ResultStore
from cluster.stub_workers import DrawLog, Gate, StubEncoder, StubEvaluator, StubReplica
from cluster.workers import Workers, actor_class
from cluster.workload import PromptRecord, Workload

# The published benchmarks: GenEval's prompts and images of each, and T2I-CompBench's. 26,212 images a variant.
PUBLISHED = ((553, 4), (2400, 10))
SAMPLES = sum(prompts * images for prompts, images in PUBLISHED)
SECONDS_A_SAMPLE = 1.0
BATCH = 4
LONG_SHARD = 8  # batches; a shard of flux-dev holds about as many
STUB_CPUS = 0.01  # as many as are asked for fit on any machine: they only wait

LARGEST_OVERHEAD = 0.02
LONGEST_PLAN_S = 3.0
LONGEST_SCAN_S = 2.0
LARGEST_GROWTH_MB = 100.0


@dataclass(frozen=True)
class Measurement:
    """One thing measured. `draw_s` is what the replicas drew, together; `wall_s` lies between the first one's begin and
    the last one's end; `idle` is the rest of their time, and gaps are those between two calls of a replica."""

    what: str
    replicas: int | None = None
    samples: int | None = None
    wall_s: float | None = None
    draw_s: float | None = None
    busy_share: float | None = None
    idle: float | None = None
    gap_ms: float | None = None
    gap_p99_ms: float | None = None
    growth_mb: float | None = None
    target: str | None = None
    met: bool | None = None
    error: str | None = None


class _Drawn(Exception):
    """All is drawn and committed: what comes after, verifying and merging, is measured by itself."""


def measure(replicas: Sequence[int], seconds: float, samples: int, folder: Path) -> Iterator[Measurement]:
    """Each measurement as it is done: for each number of replicas, `seconds` of drawing by each; then the costs of the
    driver at `samples` images a variant. `folder` takes the results; Ray must be initialised on this machine alone."""
    from cluster.ray_data_benchmark import draw_with_ray_data

    for count in replicas:
        # As long as a replica needs for whole batches of 1-second samples, so that all could end at once.
        a_replica = max(1, round(seconds / (BATCH * SECONDS_A_SAMPLE)))
        plan = _plan(count * a_replica * BATCH, ("stub",), batches_per_shard=1)
        target = f"idle <= {LARGEST_OVERHEAD:.0%}"
        yield attempt(Measurement("scheduler", count, target=target), _drawing, _draw, plan, count, folder)
        yield attempt(Measurement("Ray Data", count), _drawing, draw_with_ray_data, plan, count, folder)
    yield attempt(Measurement("plan", target=f"<= {LONGEST_PLAN_S:g} s"), _planning, samples)
    store = ResultStore(str(folder / "long"), "stub")
    row = Measurement("driver's memory", target=f"growth <= {LARGEST_GROWTH_MB:g} MB")
    yield attempt(row, _growing, samples, store)
    yield attempt(Measurement("resume scan", target=f"<= {LONGEST_SCAN_S:g} s"), _scanning, samples, store)
    yield attempt(replace(row, what="merging the files"), _merging, samples, store)


def attempt(row: Measurement, measured: Callable[..., dict[str, Any]], *arguments: Any) -> Measurement:
    """The row with the columns that `measured` returns, and whether they meet its target; or with its error."""
    try:
        row = replace(row, **measured(*arguments))
    except Exception as error:  # whatever Ray raises: the other rows still count
        return replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return replace(row, met=_met(row)) if row.target else row


def _met(row: Measurement) -> bool:
    if row.idle is not None:
        return row.idle <= LARGEST_OVERHEAD
    if row.growth_mb is not None:
        return row.growth_mb <= LARGEST_GROWTH_MB
    assert row.wall_s is not None
    return row.wall_s <= (LONGEST_PLAN_S if row.what == "plan" else LONGEST_SCAN_S)


def _drawing(
    draw: Callable[[Plan, int, Gate, DrawLog, Path], None], plan: Plan, replicas: int, folder: Path
) -> dict[str, Any]:
    """Draws a plan and looks at when its replicas drew."""
    folder = folder / f"{draw.__name__}-{replicas}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    log = DrawLog(folder)
    draw(plan, replicas, Gate(folder / "gate", replicas), log, folder)
    return idle_time(log.read(), replicas, plan.n_samples)


def idle_time(calls: list[list[tuple[float, float, int]]], replicas: int, samples: int) -> dict[str, Any]:
    """The columns of a drawing, from each process's calls. ValueError where less than `samples` were drawn."""
    drawn = sum(images for process in calls for *_, images in process)
    if drawn < samples:
        raise ValueError(f"{drawn} of {samples} samples were drawn")
    draw_s = sum(ended - begun for process in calls for begun, ended, _ in process)
    wall_s = max(process[-1][1] for process in calls) - min(process[0][0] for process in calls)
    gaps = sorted(1e3 * (later[0] - earlier[1]) for process in calls for earlier, later in pairwise(process))
    busy = draw_s * samples / drawn / (replicas * wall_s)  # what was drawn twice was drawn in vain
    return {
        "samples": samples,
        "wall_s": wall_s,
        "draw_s": draw_s,
        "busy_share": busy,
        "idle": 1 - busy,
        "gap_ms": statistics.median(gaps) if gaps else None,
        "gap_p99_ms": gaps[math.ceil(0.99 * len(gaps)) - 1] if gaps else None,
    }


def _draw(plan: Plan, replicas: int, gate: Gate, log: DrawLog, folder: Path) -> None:
    workers = _workers(SECONDS_A_SAMPLE, gate, log)
    _run(plan, ResultStore(str(folder / "results"), "stub"), workers, replicas)


def _run(
    plan: Plan,
    store: ResultStore,
    workers: Workers,
    replicas: int,
    progress: Callable[[Progress], None] = lambda event: None,
) -> None:
    """Draws and commits all of a plan, and leaves it as a run that was killed at that moment."""

    def watch(event: Progress) -> None:
        progress(event)
        if event.stage == "verifying" and event.done == event.total:
            raise _Drawn

    try:
        summary = run(plan, _profile(), None, store, replicas=replicas, workers=workers, progress=watch)  # type: ignore[arg-type]
    except _Drawn:
        return
    raise RuntimeError(f"the run did not end: {summary.reason}")


def _planning(samples: int) -> dict[str, Any]:
    workloads = _workloads(samples)
    begun = time.perf_counter()
    plan = _planned(workloads, ("bf16", "ternary"), LONG_SHARD)
    assert plan.digest
    return {"samples": plan.n_samples // 2, "wall_s": time.perf_counter() - begun}


def _growing(samples: int, store: ResultStore) -> dict[str, Any]:
    """Draws both variants, without any wait, and watches this process grow from its first committed shard on."""
    plan = _plan(samples, ("bf16", "ternary"), LONG_SHARD)
    sizes: list[float] = []

    def watch(event: Progress) -> None:
        if event.stage == "drawing":
            sizes.append(_resident_mb())

    begun = time.perf_counter()
    _run(plan, store, _workers(0.0, None, None), replicas=2, progress=watch)
    wall_s = time.perf_counter() - begun
    return {"replicas": 2, "samples": plan.n_samples, "wall_s": wall_s, "growth_mb": max(sizes) - sizes[0]}


def _scanning(samples: int, store: ResultStore) -> dict[str, Any]:
    """Finds what the run before has committed of one variant."""
    plan = _plan(samples, ("bf16",), LONG_SHARD)
    begun = time.perf_counter()
    found = scan(store, plan)
    wall_s = time.perf_counter() - begun
    if len(found) < len(plan.shards):
        raise ValueError(f"{len(found)} of {len(plan.shards)} shards were found")
    return {"samples": plan.n_samples, "wall_s": wall_s}


def _merging(samples: int, store: ResultStore) -> dict[str, Any]:
    """Merges what the run before has committed of both variants, as the end of a run does."""
    plan = _plan(samples, ("bf16", "ternary"), LONG_SHARD)
    sizes = [_resident_mb()]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            sizes.append(_resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        compact(store, plan)
    finally:
        wall_s = time.perf_counter() - begun
        over.set()
        watcher.join()
    return {"samples": plan.n_samples, "wall_s": wall_s, "growth_mb": max(sizes) - sizes[0]}


def _workers(seconds_a_sample: float, gate: Gate | None, log: DrawLog | None) -> Workers:
    replica, encoder, evaluator = (actor_class(stub, STUB_CPUS) for stub in (StubReplica, StubEncoder, StubEvaluator))
    return Workers(lambda: replica.remote(seconds_a_sample, gate, log), encoder.remote, evaluator.remote)


def _plan(samples: int, variants: tuple[str, ...], batches_per_shard: int) -> Plan:
    return _planned(_workloads(samples), variants, batches_per_shard)


def _planned(workloads: Sequence[Workload], variants: tuple[str, ...], batches_per_shard: int) -> Plan:
    fingerprints = dict.fromkeys((*variants, "detector", "clip"), "stub")
    return build_plan(_profile(batches_per_shard), workloads, variants, fingerprints=fingerprints)


def _profile(batches_per_shard: int = 1) -> Profile:
    return Profile(
        name="stub",
        models=Models(pipeline="stub", detector="stub", clip="stub"),
        sampling=Sampling(width=1024, height=1024, steps=50, guidance=3.5, max_sequence_length=512),
        batch_size=BATCH,
        # Drawing that takes next to nothing, and a second of scoring: both together make an image's expected seconds.
        cost=Cost(megapixel_step=1e-9, evaluators={"stub": SECONDS_A_SAMPLE}),
        shard_seconds=batches_per_shard * BATCH * SECONDS_A_SAMPLE,
        dtype="bfloat16",
        benchmarks=("stub",),
        variants=("stub",),
    )


def _workloads(samples: int) -> list[Workload]:
    """The published benchmarks' prompts and images by number, or one benchmark of another number of samples."""
    sizes = PUBLISHED if samples == SAMPLES else ((samples, 1),)
    return [
        Workload(
            f"stub-{i}",
            "stub",
            tuple(PromptRecord(p, "stub", f"a photo of {p} stubs in workload {i}", {}) for p in range(prompts)),
            images,
            seed=i,
            digest="stub",
        )
        for i, (prompts, images) in enumerate(sizes)
    ]


def _resident_mb() -> float:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status says nothing of the resident memory")
