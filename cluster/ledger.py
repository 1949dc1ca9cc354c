"""Rows that wait for their shard to be whole, and its commit then. What is committed leaves the driver's memory."""

import asyncio
from collections.abc import Callable, Iterable

from cluster.observer import Observer
from cluster.pieces import Piece
from cluster.plan import Shard, ShardKey
from cluster.rows import ModelUse, Row
from cluster.store import ResultStore


class Ledger:
    """The shards of a run that are not committed yet."""

    def __init__(
        self,
        shards: Iterable[Shard],
        store: ResultStore,
        committed: Callable[[list[Row]], None],
        observer: Observer,
    ) -> None:
        """`committed` is called with the rows of every shard once its file is in the store."""
        self._store = store
        self._committed = committed
        self._observer = observer
        self.unfinished = {shard.key for shard in shards}
        self._begun: dict[ShardKey, float] = {}
        self._rows: dict[ShardKey, dict[int, Row]] = {}
        self._uses: dict[ShardKey, ModelUse] = {}

    def begin(self, key: ShardKey) -> None:
        """Notes that a replica was given a piece of the shard; the first time counts."""
        self._begun.setdefault(key, _now())

    def keep(self, piece: Piece, rows: dict[int, Row], use: ModelUse | None = None) -> bool:
        """Keeps a piece's rows, by position; whether its shard has all of them now, and is to be committed."""
        key = piece.shard.key
        if use:
            self._uses[key] = use.joined(self._uses.get(key))
        kept = self._rows.setdefault(key, {})
        kept.update(rows)
        return len(kept) == len(piece.shard.samples)

    async def commit(self, shard: Shard) -> None:
        """Writes a whole shard. Raises StorageError."""
        begun, key = _now(), shard.key
        by_position = self._rows.pop(key)
        rows = [by_position[position] for position in sorted(by_position)]
        await asyncio.to_thread(self._store.commit, key, rows, self._uses.pop(key, None))
        self.unfinished.discard(key)
        self._observer.stage_ended("commit", _now() - begun)
        self._observer.shard_committed(key.variant, key.benchmark, len(rows), _now() - self._begun.pop(key))
        self._committed(rows)


def _now() -> float:
    return asyncio.get_running_loop().time()
