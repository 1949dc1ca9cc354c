"""One run, from a plan to a complete or resumable folder of results."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitflux_core.errors import UserError
from cluster.audit import ModelMetrics, ShardRecord, build_manifest, metrics, scan
from cluster.compaction import compact
from cluster.faults import RunStopped
from cluster.limits import Limits
from cluster.observer import Observer, SilentObserver
from cluster.plan import Plan, ShardKey
from cluster.pool_size import PoolSize
from cluster.profile import Profile
from cluster.provenance import begin_session, sessions
from cluster.rows import Row
from cluster.scheduler import Scheduler
from cluster.store import ResultStore, StorageError
from cluster.workers import Workers, model_workers

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles


@dataclass(frozen=True)
class Progress:
    """How far the run is, in images of all variants. `done` counts what an earlier run left (`resumed`) and `failed`.

    `stage` is starting, drawing or verifying.
    """

    done: int
    total: int
    failed: int
    resumed: int
    stage: str


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. `reason` says in one line why it is incomplete; the same plan and store resume it."""

    complete: bool
    reason: str | None
    n_expected: int
    n_done: int
    n_failed: int
    models: list[ModelMetrics]


def run(
    plan: Plan,
    profile: Profile,
    files: "ModelFiles | None",
    store: ResultStore,
    *,
    replicas: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    workers: Workers | None = None,
    limits: Limits | None = None,
    observer: Observer | None = None,
) -> RunSummary:
    """Draws and scores what the store lacks of the plan, then verifies the whole and writes the manifest.

    Ray must be initialised. Call it in the main thread: SIGTERM and SIGINT end the run early, with what is scored
    committed. `replicas` None takes as many as the cluster holds, now and later; `workers` replaces the actors that
    hold the models of `files`, which may be None then; `observer` is told what happens meanwhile. Raises UserError for
    what the user can mend: an output that cannot be written or holds another plan, models that cannot be loaded, a
    prompt that is too long. The run's name stays free then, unless something was committed.
    """
    store.open(plan)
    manifest = store.manifest()
    if manifest is not None:
        return _complete(manifest)
    begin_session(store)
    counter = _Counter(plan.n_samples, progress or (lambda event: None))
    found = scan(store, plan)
    counter.resume(found)
    missing = [shard for shard in plan.shards if shard.key not in found]
    reason = None
    if missing:
        size = PoolSize(profile.resources, len(plan.variants), replicas)
        proven = {key.variant for key, record in found.items() if record.n_failed < record.n_rows}
        try:
            size.check()
            if workers is None:
                assert files is not None, "models, or workers that need none"
                workers = model_workers(plan, profile, files, store)
            limits, observer = limits or Limits(), observer or SilentObserver()
            scheduler = Scheduler(plan, missing, store, workers, size, limits, proven, counter.add, observer)
            reason = asyncio.run(_draw(scheduler))
        except UserError:
            with suppress(StorageError):
                store.withdraw()
            raise
        counter.report("verifying")
        try:
            found = scan(store, plan)
        except StorageError as error:
            reason = reason or str(error)
    return _verified(plan, store, found, reason)


async def _draw(scheduler: Scheduler) -> str | None:
    """Runs the scheduler; why it stopped early, or None."""
    try:
        with _stopped_by_signals(scheduler):
            await scheduler.run()
    except (RunStopped, StorageError) as error:
        return str(getattr(error, "cause", None) or error)  # an actor's StorageError comes wrapped in its traceback
    return None


@contextmanager
def _stopped_by_signals(scheduler: Scheduler) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, scheduler.stop, f"stopped by {number.name}")
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler or signal.SIG_DFL)


def _verified(plan: Plan, store: ResultStore, found: Mapping[ShardKey, ShardRecord], reason: str | None) -> RunSummary:
    """Merges the files and declares the run complete where every shard of the plan is there: `scan` has compared its
    ids with the plan's."""
    if len(found) == len(plan.shards) and reason is None:
        try:
            found = compact(store, plan)
            if len(found) == len(plan.shards):
                manifest = build_manifest(plan, store.run_id, found, sessions(store))
                return _complete(store.write_manifest(manifest))
        except StorageError as error:
            reason = str(error)
    missing = len(plan.shards) - len(found)
    return RunSummary(
        complete=False,
        reason=reason or f"{missing} of {len(plan.shards)} shards did not verify",
        n_expected=plan.n_samples,
        n_done=sum(record.n_rows for record in found.values()),
        n_failed=sum(record.n_failed for record in found.values()),
        models=metrics(plan, found),
    )


def _complete(manifest: dict[str, Any]) -> RunSummary:
    return RunSummary(
        complete=True,
        reason=None,
        n_expected=manifest["n_expected"],
        n_done=manifest["n_expected"],
        n_failed=manifest["n_failed"],
        models=[ModelMetrics(**model) for model in manifest["models"]],
    )


class _Counter:
    """Turns committed shards into progress events."""

    def __init__(self, total: int, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._total = total
        self._resumed = self._done = self._failed = 0

    def resume(self, found: Mapping[ShardKey, ShardRecord]) -> None:
        self._resumed = self._done = sum(record.n_rows for record in found.values())
        self._failed = sum(record.n_failed for record in found.values())
        self.report("starting")

    def add(self, rows: list[Row]) -> None:
        self._done += len(rows)
        self._failed += sum(row.get("error") is not None for row in rows)
        self.report("drawing")

    def report(self, stage: str) -> None:
        self._tell(Progress(self._done, self._total, self._failed, self._resumed, stage))
