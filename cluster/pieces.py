"""Pieces of shards: what one call draws, how a failing one is cut, and the queue that replicas pull them from.

A shard starts as one piece. A piece that keeps failing is halved until the poisoned sample is alone. A piece keeps the
plan's batches: the places of samples that it leaves out hold padding, so its images do not depend on the cutting.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bitflux_core.samples import Sample
from cluster.plan import Shard


@dataclass(frozen=True)
class Piece:
    """Some samples of one shard, by ascending position. `tries` counts this piece's failures, `attempts` also those of
    the pieces that it was cut from, `excused` those that were the machine's fault."""

    shard: Shard
    positions: tuple[int, ...]
    tries: int = 0
    attempts: int = 0
    excused: int = 0

    @property
    def samples(self) -> list[Sample]:
        """The piece's samples, one for each position."""
        return [self.shard.samples[position] for position in self.positions]

    def failed(self) -> "Piece":
        """The piece after one more failure of its own."""
        return replace(self, tries=self.tries + 1, attempts=self.attempts + 1)

    def exhausted(self, attempts: int) -> bool:
        """Whether it is time to cut the piece, or to give its only sample up.

        Whole shards and single samples get all `attempts`; what lies between only narrows the search, and gets one.
        """
        whole = len(self.positions) == len(self.shard.samples)
        return self.tries >= (attempts if whole or len(self.positions) == 1 else 1)

    def halves(self, batch_size: int) -> tuple["Piece", "Piece"]:
        """The piece cut in two: between batches where it spans several, so that no batch is drawn twice."""
        batch_of = [position // batch_size for position in self.positions]
        middle = len(self.positions) // 2
        borders = [i for i in range(1, len(batch_of)) if batch_of[i] != batch_of[i - 1]]
        cut = min(borders, key=lambda i: abs(i - middle), default=middle)
        return tuple(  # type: ignore[return-value]
            replace(self, positions=part, tries=0) for part in (self.positions[:cut], self.positions[cut:])
        )


@dataclass(frozen=True)
class DrawBatch:
    """One batch as a replica draws it, slot by slot: the prompt's place among the call's embeddings, the noise seed.

    Only the `kept` slots' images are returned; the others are padding.
    """

    prompts: tuple[int, ...]
    noise_seeds: tuple[int, ...]
    kept: tuple[int, ...]


def padded_batches(piece: Piece, batch_size: int) -> tuple[list[str], tuple[DrawBatch, ...]]:
    """The piece's distinct prompts, and its batches of exactly `batch_size` slots.

    A sample stands in the slot that the plan gave it, since the last bits of a product may depend on it; every slot
    without a sample of the piece repeats the first one that has.
    """
    prompts = list(dict.fromkeys(sample.prompt for sample in piece.samples))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    wanted = set(piece.positions)
    batches = []
    for start in range(0, len(piece.shard.samples), batch_size):
        kept = tuple(slot for slot in range(batch_size) if start + slot in wanted)
        if not kept:
            continue
        slots = [piece.shard.samples[start + (slot if slot in kept else kept[0])] for slot in range(batch_size)]
        batches.append(
            DrawBatch(
                prompts=tuple(places[sample.prompt] for sample in slots),
                noise_seeds=tuple(sample.noise_seed for sample in slots),
                kept=kept,
            )
        )
    return prompts, tuple(batches)


class PieceQueue:
    """What is still to be drawn, by variant, the longest first. Replicas pull from it; pieces that failed come back at
    the end."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._waiting: dict[str, deque[Piece]] = {}
        self._arrived = asyncio.Event()
        self.closed = False
        # The longest first, so that the short ones even out the end of the run.
        for shard in sorted(shards, key=lambda shard: -shard.expected_s):
            self.put(Piece(shard, tuple(range(len(shard.samples)))))

    def put(self, piece: Piece) -> None:
        """Adds a piece behind all others of its variant: healthy ones go first, and show that the replicas work."""
        self._waiting.setdefault(piece.shard.key.variant, deque()).append(piece)
        self._arrived.set()

    def close(self) -> None:
        """Ends every waiting and later `take`."""
        self.closed = True
        self._arrived.set()

    def neediest(self, replicas: Mapping[str, int]) -> str:
        """The variant with the most pieces waiting for each replica that draws it, itself and one more counted."""
        return max(self._waiting, key=lambda variant: len(self._waiting[variant]) / (1 + replicas.get(variant, 0)))

    async def take(self, preferred: str, leave: int = 0, patience_s: float | None = None) -> Piece | None:
        """The next piece of the `preferred` variant, else of the variant with the most left. None once closed.

        Waits while no more than `leave` pieces are there: for others to take, or because one in hand may come back;
        None after `patience_s` of that.
        """
        try:
            async with asyncio.timeout(patience_s):
                while not self.closed:
                    if sum(map(len, self._waiting.values())) > leave:
                        pieces = self._waiting.get(preferred) or max(self._waiting.values(), key=len)
                        return pieces.popleft()
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
        return None
