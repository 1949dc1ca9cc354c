"""The evaluators' side of a run: drawn pieces wait in a bounded buffer for whichever evaluator is free."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bitflux_core.errors import UserError
from cluster.actor_slot import LANES, ActorSlot, check_left
from cluster.evaluator import ImageToScore
from cluster.faults import is_lost_object
from cluster.limits import Limits
from cluster.observer import Observer
from cluster.pace import Pace
from cluster.pieces import Piece
from cluster.plan import Plan
from cluster.rows import DrawReport, ScoredImage
from cluster.store import StorageError
from cluster.workers import Workers


@dataclass(frozen=True)
class Drawn:
    """A piece with its images (a reference into Ray's store) and what drawing them took."""

    piece: Piece
    report: DrawReport
    images: Any
    worker: str


class Scoring:
    """Scores drawn pieces. What becomes of each is told by one of three functions.

    `scored` gets a piece's scores. `failed` gets a failure, and returns the piece if it is to be tried again as it is:
    the same images then, or, where those are lost, others by `redraw`.
    """

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        limits: Limits,
        pace: Pace,
        observer: Observer,
        *,
        scored: Callable[[Drawn, list[ScoredImage]], None],
        failed: Callable[[Piece, Exception], Piece | None],
        redraw: Callable[[Piece], None],
    ) -> None:
        self.slots = [
            ActorSlot(f"evaluator-{i}", workers.evaluator, lambda actor: actor.start.remote(), limits)
            for i in range(workers.evaluators)
        ]
        self._plan = plan
        self._pace = pace
        self._observer = observer
        self._scored = scored
        self._failed = failed
        self._redraw = redraw
        self._waiting: asyncio.Queue[Drawn] = asyncio.Queue()
        # Pieces that may be drawn and not yet scored: those in the evaluators' hands, and one more for each replica.
        self._buffer = asyncio.Semaphore(LANES * workers.evaluators)

    def widen(self) -> None:
        """Gives the buffer one more place."""
        self._buffer.release()

    async def put(self, drawn: Drawn) -> None:
        """Adds a piece, once the buffer has a place for it."""
        await self._buffer.acquire()
        self._waiting.put_nowait(drawn)

    async def serve(self, slot: ActorSlot) -> None:
        """Scores with one evaluator until it is retired. Raises UserError and StorageError of the evaluator, and
        RunStopped once none is left."""
        await asyncio.gather(*(self._lane(slot) for _ in range(LANES)))
        check_left(self.slots)

    async def _lane(self, slot: ActorSlot) -> None:
        while await slot.ready():
            await slot.rest(self.slots)
            await self._score(slot, await self._waiting.get())

    async def _score(self, slot: ActorSlot, drawn: Drawn) -> None:
        try:
            scores = await self._scores(slot, drawn)
        except (UserError, StorageError):
            raise
        except Exception as error:
            check_left(self.slots)
            again = self._failed(drawn.piece, error)
            if again and not is_lost_object(error):
                self._waiting.put_nowait(replace(drawn, piece=again))
                return
            if again:
                self._redraw(again)
        else:
            self._scored(drawn, scores)
        self._buffer.release()

    async def _scores(self, slot: ActorSlot, drawn: Drawn) -> list[ScoredImage]:
        key = drawn.piece.shard.key
        prompts = self._plan.workloads[key.benchmark].prompts
        wanted = [
            ImageToScore(sample.prompt_index, sample.image_index, prompts[sample.prompt_index].metadata)
            for sample in drawn.piece.samples
        ]
        kind = ("score", key.benchmark)
        scores, _, seconds = await slot.call(
            lambda actor: actor.score.remote(key, wanted, drawn.images), lambda: self._pace.timeout(kind, len(wanted))
        )
        self._pace.observe(kind, len(wanted), seconds)
        self._observer.stage_ended("score", seconds)
        return scores
