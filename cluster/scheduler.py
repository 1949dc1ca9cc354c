"""The scheduler: replicas pull pieces, evaluators score what they drew, finished shards are committed.

Every replica has two lanes, so that one call is worked on while the next one waits in its queue with its inputs at
hand; evaluators likewise. Images go from replica to evaluator through Ray's object store and never through the driver.
The buffer between them is bounded, so replicas wait for slow evaluators.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitflux_core.errors import UserError
from cluster.actor_slot import ActorLost, ActorSlot, Limits, explain
from cluster.embeddings import Embeddings
from cluster.evaluator import ImageToScore
from cluster.pieces import DrawBatch, Piece, PieceQueue, padded_batches
from cluster.plan import Plan, Shard, ShardKey
from cluster.replica import ModelLoadError
from cluster.rows import DrawReport, ModelUse, Row, ScoredImage, failed_rows, scored_rows
from cluster.store import ResultStore, StorageError
from cluster.workers import Workers

LANES = 2

log = logging.getLogger(__name__)


class RunStopped(Exception):
    """The run cannot go on, or was told to end; what is committed stays, and the same command resumes."""


@dataclass
class _Replica:
    slot: ActorSlot
    variant: str  # of the last piece sent: the next one should be of the same
    in_hand: int = 0  # pieces sent and not yet drawn


@dataclass
class _Drawn:
    piece: Piece
    report: DrawReport
    images: Any
    worker: str


class Scheduler:
    """Draws, scores and commits `shards`. Use one instance for one `run`, inside a running event loop."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        store: ResultStore,
        workers: Workers,
        replicas: int,
        limits: Limits,
        proven: Iterable[str],
        committed: Callable[[list[Row]], None],
    ) -> None:
        """`proven` are the variants that gave an image before; `committed` is called with the rows of every shard once
        its file is in the store."""
        self._plan = plan
        self._store = store
        self._limits = limits
        self._proven = set(proven)
        self._committed = committed
        self._queue = PieceQueue(shards)
        self._drawn: asyncio.Queue[_Drawn] = asyncio.Queue(maxsize=replicas)
        self._unfinished = {shard.key for shard in shards}
        self._rows: dict[ShardKey, dict[int, Row]] = {shard.key: {} for shard in shards}
        self._uses: dict[ShardKey, ModelUse] = {}
        self._encoder = ActorSlot("text-encoder", workers.text_encoder, lambda actor: actor.start.remote(), limits)
        self._evaluator = ActorSlot("evaluator", workers.evaluator, lambda actor: actor.start.remote(), limits)
        variants = list(dict.fromkeys(shard.key.variant for shard in shards))
        self._replicas = [self._replica(f"replica-{i}", variants[i % len(variants)], workers) for i in range(replicas)]
        self._embeddings = Embeddings(self._encoder, shards)
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns once every shard is committed. Raises RunStopped with the reason where it ends before that, and
        UserError for a mistake that an actor found."""
        self._watch(self._start_encoder())
        self._watch(self._serve_evaluator())
        for replica in self._replicas:
            self._watch(self._serve_replica(replica))
        try:
            await self._outcome
        finally:
            if self._commits:
                await asyncio.wait(self._commits, timeout=self._limits.grace_s)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for slot in self._slots():
                slot.stop()

    def stop(self, reason: str) -> None:
        """Ends the run early: commits in hand get a moment, everything else is left for the next run."""
        if not self._outcome.done():
            self._outcome.set_exception(RunStopped(reason))

    def _replica(self, name: str, variant: str, workers: Workers) -> _Replica:
        slot = ActorSlot(name, workers.replica, lambda actor: actor.start.remote(replica.variant), self._limits)
        replica = _Replica(slot, variant)
        return replica

    def _slots(self) -> list[ActorSlot]:
        return [self._encoder, self._evaluator, *(replica.slot for replica in self._replicas)]

    def _watch(self, coroutine: Coroutine[Any, Any, None], commit: bool = False) -> None:
        """Runs `coroutine` beside the others; its exception ends the run."""
        tasks = self._commits if commit else self._tasks
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)

        def finish(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) and not self._outcome.done():
                self._outcome.set_exception(error)

        task.add_done_callback(finish)

    async def _start_encoder(self) -> None:
        await self._encoder.start()
        _check(self._encoder)

    async def _serve_evaluator(self) -> None:
        await self._evaluator.start()
        _check(self._evaluator)
        await asyncio.gather(*(self._score_lane() for _ in range(LANES)))

    async def _serve_replica(self, replica: _Replica) -> None:
        await replica.slot.start()
        await asyncio.gather(*(self._draw_lane(replica) for _ in range(LANES)))
        _check(*(replica.slot for replica in self._replicas))

    async def _draw_lane(self, replica: _Replica) -> None:
        """Pulls and draws pieces until the work is done or the replica's slot is retired."""
        while not replica.slot.retired:
            # The last pieces are for replicas with nothing to do, not for prefetching.
            leave = len(self._replicas) - 1 if replica.in_hand else 0
            piece = await self._queue.take(replica.variant, leave)
            if piece is None:
                return
            replica.variant = piece.shard.key.variant
            replica.in_hand += 1
            prompts, batches = padded_batches(piece, self._plan.batch_size)
            try:
                await self._drawn.put(await self._draw(replica, piece, prompts, batches))
            except UserError:
                raise
            except Exception as error:
                _check(self._encoder)
                self._embeddings.forget(prompts)
                if again := self._failed(piece, "draw", error):
                    self._queue.put(again)
            finally:
                replica.in_hand -= 1

    async def _draw(
        self, replica: _Replica, piece: Piece, prompts: list[str], batches: tuple[DrawBatch, ...]
    ) -> _Drawn:
        embeddings = await self._embeddings.get(prompts)
        report, (images,) = await replica.slot.call(
            lambda actor: actor.draw.options(num_returns=2).remote(piece.shard.key.variant, batches, *embeddings)
        )
        return _Drawn(piece, report, images, replica.slot.name)

    async def _score_lane(self) -> None:
        while True:
            await self._score_drawn(await self._drawn.get())

    async def _score_drawn(self, drawn: _Drawn) -> None:
        """Scores a piece's images and keeps its rows. Where that fails it tries the same images again, until the piece
        has to be cut."""
        piece: Piece | None = drawn.piece
        while piece:
            try:
                scored = await self._score(piece, drawn.images)
            except (UserError, StorageError):
                raise
            except Exception as error:
                _check(self._evaluator)
                piece = self._failed(piece, "score", error)
            else:
                key = piece.shard.key
                if any(image.error is None for image in scored):
                    self._proven.add(key.variant)
                self._uses[key] = drawn.report.use.joined(self._uses.get(key))
                self._settle(
                    piece, scored_rows(self._plan, self._store.run_id, piece, drawn.report, scored, drawn.worker)
                )
                return

    async def _score(self, piece: Piece, images: Any) -> list[ScoredImage]:
        key = piece.shard.key
        prompts = self._plan.workloads[key.benchmark].prompts
        wanted = [
            ImageToScore(sample.prompt_index, sample.image_index, prompts[sample.prompt_index].metadata)
            for sample in piece.samples
        ]
        scored, _ = await self._evaluator.call(lambda actor: actor.score.remote(key, wanted, images))
        return scored

    def _failed(self, piece: Piece, stage: str, error: Exception) -> Piece | None:
        """The piece if it is to be tried again as it is; None once it was cut, or its only sample given up."""
        if isinstance(error, ModelLoadError) or (isinstance(error, ActorLost) and not error.blamed):
            return piece
        message = f"{stage}: {explain(error)}"
        piece = piece.failed()
        log.warning("shard %s, %d images, failure %d: %s", piece.shard.key, len(piece.positions), piece.tries, message)
        if not piece.exhausted(self._limits.attempts):
            return piece
        if len(piece.positions) > 1:
            for half in piece.halves(self._plan.batch_size):
                self._queue.put(half)
        elif piece.shard.key.variant in self._proven:
            self._settle(piece, failed_rows(self._plan, self._store.run_id, piece, message))
        else:
            # Error rows are for good, so they are not written for what may be the models' or the machine's fault.
            raise RunStopped(f"no image of variant {piece.shard.key.variant} could be made: {message}")
        return None

    def _settle(self, piece: Piece, rows: dict[int, Row]) -> None:
        """Keeps a piece's rows until its shard has all of them, then commits the shard."""
        kept = self._rows[piece.shard.key]
        kept.update(rows)
        if len(kept) == len(piece.shard.samples):
            self._watch(self._commit(piece.shard), commit=True)

    async def _commit(self, shard: Shard) -> None:
        by_position = self._rows.pop(shard.key)
        rows = [by_position[position] for position in sorted(by_position)]
        await asyncio.to_thread(self._store.commit, shard.key, rows, self._uses.pop(shard.key, None))
        self._embeddings.release(shard)
        self._unfinished.discard(shard.key)
        self._committed(rows)
        if not self._unfinished:
            self._queue.close()
            if not self._outcome.done():
                self._outcome.set_result(None)


def _check(*slots: ActorSlot) -> None:
    """Ends the run once all these slots are retired: nobody is left to do their work."""
    if all(slot.retired for slot in slots):
        raise RunStopped("; ".join(dict.fromkeys(str(slot.retired) for slot in slots)))
