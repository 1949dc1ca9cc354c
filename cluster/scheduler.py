"""The scheduler: replicas pull pieces, evaluators score what they drew, finished shards are committed.

Every replica has two lanes, so that one call is worked on while the next one waits in its queue with its inputs at
hand; evaluators likewise. Images go from replica to evaluator through Ray's object store and never through the driver.
The buffer between them is bounded, so replicas wait for slow evaluators.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from bitflux_core.errors import UserError
from cluster.actor_slot import LANES, ActorSlot, check_left
from cluster.embeddings import Embeddings
from cluster.faults import RunStopped, explain, is_machines_fault
from cluster.ledger import Ledger
from cluster.limits import Limits
from cluster.observer import Observer, Stage
from cluster.pace import Pace
from cluster.pieces import Piece, PieceQueue, padded_batches
from cluster.plan import Plan, Shard
from cluster.pool import Replica, ReplicaPool
from cluster.pool_size import GpuType, PoolSize
from cluster.rows import ModelUse, Row, ScoredImage, failed_rows, scored_rows
from cluster.scoring import Drawn, Scoring
from cluster.store import ResultStore
from cluster.stragglers import Assignment, Assignments
from cluster.workers import Workers

log = logging.getLogger(__name__)


class Scheduler:
    """Draws, scores and commits `shards`. Use one instance for one `run`."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        store: ResultStore,
        workers: Workers,
        size: PoolSize,
        limits: Limits,
        proven: Iterable[str],
        committed: Callable[[list[Row]], None],
        observer: Observer,
    ) -> None:
        """`proven` are the variants that gave an image before; `committed` is called as Ledger calls it."""
        self._plan = plan
        self._run_id = store.run_id
        self._size = size
        self._limits = limits
        self._told_size = -1
        self._proven = set(proven)
        self._drawable = set(self._proven)  # variants that gave an image, scored or not
        self._observer = observer
        self._ledger = Ledger(shards, store, committed, observer)
        self._pace = Pace(limits)
        self._queue = PieceQueue(shards)
        self._assignments = Assignments(self._pace, limits.late_floor_s / 4)
        self._pool = ReplicaPool(workers, limits, size.speed)
        self._encoder = ActorSlot("text-encoder", workers.text_encoder, lambda actor: actor.start.remote(), limits)
        self._embeddings = Embeddings(self._encode, shards)
        self._scoring = Scoring(
            plan,
            workers,
            limits,
            self._pace,
            observer,
            scored=self._keep_scores,
            failed=lambda piece, error: self._failed(piece, "score", error),
            redraw=self._queue.put,
        )
        self._ended = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns once every shard is committed. Raises RunStopped with the reason where it ends before that, and
        UserError for a mistake that an actor found."""
        self._watch(self._start_encoder())
        for slot in self._scoring.slots:
            self._watch(self._scoring.serve(slot))
        self._watch(self._keep_pool())
        try:
            await self._ended.wait()
        finally:
            if self._commits:
                await asyncio.wait(self._commits, timeout=self._limits.grace_s)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for slot in (self._encoder, *self._scoring.slots, *self._replica_slots()):
                slot.stop()
        if self._error:
            raise self._error

    def stop(self, reason: str) -> None:
        """Ends the run early: commits in hand get a moment, everything else is left for the next run."""
        self._end(RunStopped(reason))

    def _end(self, error: BaseException | None) -> None:
        """Ends the run; the first reason counts."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()

    def _watch(self, coroutine: Coroutine[Any, Any, None], commit: bool = False) -> None:
        """Runs `coroutine` beside the others; its exception ends the run."""
        tasks = self._commits if commit else self._tasks
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)

        def finish(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                self._end(error)

        task.add_done_callback(finish)

    async def _keep_pool(self) -> None:
        """Starts replicas as the cluster gets room for them, and ends the run where actors of one kind are all gone."""
        wanted: Mapping[GpuType, int] = {}
        while True:
            try:
                wanted = await asyncio.to_thread(self._size.wanted)
            except RayError as error:
                log.warning("the cluster does not say what it holds: %s", explain(error))
            for replica in self._pool.grow(wanted, len(self._ledger.unfinished), self._queue.neediest):
                self._scoring.widen()
                self._watch(self._serve_replica(replica))
            for slots in ([self._encoder], self._scoring.slots, self._replica_slots()):
                check_left(slots)
            self._tell_size()
            await asyncio.sleep(self._limits.pool_period_s)

    def _tell_size(self) -> None:
        if self._pool.running != self._told_size:
            self._told_size = self._pool.running
            self._observer.pool_size(self._told_size)

    def _replica_slots(self) -> list[ActorSlot]:
        return [replica.slot for replica in self._pool.replicas]

    async def _start_encoder(self) -> None:
        await self._encoder.ready()
        check_left([self._encoder])

    async def _serve_replica(self, replica: Replica) -> None:
        if await replica.slot.ready():
            self._tell_size()
        await asyncio.gather(*(self._draw_lane(replica) for _ in range(LANES)))
        check_left(self._replica_slots())

    async def _draw_lane(self, replica: Replica) -> None:
        """Pulls and draws pieces until the work is done or the replica's slot is retired."""
        while await replica.slot.ready() and not self._queue.closed:
            await replica.slot.rest(self._replica_slots())
            assignment = await self._take(replica)
            if assignment is None:
                continue
            key = assignment.piece.shard.key
            self._ledger.begin(key)
            replica.variant = key.variant
            replica.in_hand += 1
            try:
                drawn = await self._draw(replica, assignment)
            finally:
                replica.in_hand -= 1
            if drawn:
                await self._scoring.put(drawn)
                del drawn  # the evaluators hold its images from here on

    async def _take(self, replica: Replica) -> Assignment | None:
        """The next piece for a replica: a new one, or one that is late elsewhere. None where it should ask again."""
        name = replica.slot.name
        # The last pieces are for replicas with nothing to do, not for prefetching.
        leave = max(0, self._pool.running - 1) if replica.in_hand else 0
        patience_s = None if replica.in_hand else self._assignments.next_late_s(name)
        piece = await self._queue.take(replica.variant, leave, patience_s)
        if piece:
            return self._assignments.begin(piece, self._plan.batch_size, name, replica.speed)
        if self._queue.closed or replica.in_hand:
            return None
        return self._assignments.late(name)

    async def _draw(self, replica: Replica, assignment: Assignment) -> Drawn | None:
        """What the replica drew. None where that failed, or where another replica was quicker."""
        piece, slot = assignment.piece, replica.slot
        variant = piece.shard.key.variant
        prompts, batches = padded_batches(piece, self._plan.batch_size)
        try:
            embeddings = await self._embeddings.get(prompts)
            self._assignments.sent(assignment)
            report, (images,), seconds = await slot.call(
                lambda actor: actor.draw.options(num_returns=2).remote(variant, batches, *embeddings),
                lambda: self._pace.timeout(variant, assignment.slots / replica.speed),
            )
        except UserError:
            raise
        except Exception as error:
            check_left([self._encoder])
            self._embeddings.forget(prompts)
            if self._assignments.end(assignment, slot.name, drawn=False):
                if again := self._failed(assignment.piece, "draw", error):
                    self._queue.put(again)
            elif not is_machines_fault(error):
                assignment.piece = assignment.piece.failed()  # the other replica goes on with it
            return None
        self._drawable.add(variant)
        self._pace.observe(variant, assignment.slots / replica.speed, seconds)
        self._observer.stage_ended("draw", seconds)
        self._observer.replica_busy(slot.name, sum(filter(None, report.seconds)))
        if self._assignments.end(assignment, slot.name, drawn=True):
            return Drawn(assignment.piece, report, images, slot.name)
        return None

    async def _encode(self, prompts: list[str]) -> list[Any]:
        _, references, seconds = await self._encoder.call(
            lambda actor: actor.encode.options(num_returns=len(prompts) + 1).remote(prompts),
            lambda: self._pace.timeout("encode", len(prompts)),
        )
        self._pace.observe("encode", len(prompts), seconds)
        self._observer.stage_ended("encode", seconds)
        return references

    def _keep_scores(self, drawn: Drawn, scores: list[ScoredImage]) -> None:
        if any(image.error is None for image in scores):
            self._proven.add(drawn.piece.shard.key.variant)
        rows = scored_rows(self._plan, self._run_id, drawn.piece, drawn.report, scores, drawn.worker)
        self._settle(drawn.piece, rows, drawn.report.use)

    def _failed(self, piece: Piece, stage: Stage, error: Exception) -> Piece | None:
        """The piece if it is to be tried again as it is; None once it was cut, or its only sample given up."""
        if is_machines_fault(error) and piece.excused < self._limits.excused:
            log.warning("shard %s is tried again: %s: %s", piece.shard.key, stage, explain(error))
            self._observer.retried(stage)
            return replace(piece, excused=piece.excused + 1)
        message = f"{stage}: {explain(error)}"
        piece = piece.failed()
        log.warning("shard %s, %d images, failure %d: %s", piece.shard.key, len(piece.positions), piece.tries, message)
        if not piece.exhausted(self._limits.attempts):
            self._observer.retried(stage)
            return piece
        if len(piece.positions) > 1:
            self._observer.retried(stage)
            for half in piece.halves(self._plan.batch_size):
                self._queue.put(half)
        elif piece.shard.key.variant in (self._drawable if stage == "draw" else self._proven):
            self._observer.quarantined(1)
            self._settle(piece, failed_rows(self._plan, self._run_id, piece, message))
        else:
            # Error rows are for good, so they are not written for what may be the models' or the machine's fault.
            raise RunStopped(f"no image of variant {piece.shard.key.variant} could be made: {message}")
        return None

    def _settle(self, piece: Piece, rows: dict[int, Row], use: ModelUse | None = None) -> None:
        """Keeps a piece's rows, and commits its shard once that is whole."""
        if self._ledger.keep(piece, rows, use):
            self._watch(self._commit(piece.shard), commit=True)

    async def _commit(self, shard: Shard) -> None:
        await self._ledger.commit(shard)
        self._embeddings.release(shard)
        if not self._ledger.unfinished:
            self._queue.close()
            self._end(None)
