"""Reading a run back: which shards are really there, whether their ids are the plan's, and what the models took.

The manifest is written from this, never from what the scheduler remembers.
"""

import hashlib
import logging
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.plan import Plan, Shard, ShardKey
from cluster.provenance import distinct_codes
from cluster.rows import SCHEMA_VERSION, MemoryKind, ModelUse, decode, shard_uses
from cluster.store import MERGED, ResultStore

# Reading is waiting, mostly: for a remote storage, or for a disk.
READERS = 4
SCANNED = ["sample_id", "error", "seconds"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """What one committed shard holds, and its file, which may hold others as well: `name`, `sha256` and `size` are the
    file's. `seconds` are those of its drawn images."""

    key: ShardKey
    name: str
    sha256: str
    size: int
    n_rows: int
    n_failed: int
    seconds: list[float]
    use: ModelUse | None


@dataclass(frozen=True)
class ModelMetrics:
    """What one variant took. The Nones stand where no image of it was drawn.

    `seconds_per_image` is the median over images of a batch's seconds divided by its slots: the first batch of a
    replica, which pays for warming up, does not shift it. `fingerprint` is that of the weights.
    """

    variant: str
    storage_bytes: int | None
    peak_memory_bytes: int | None
    memory_kind: MemoryKind | None
    seconds_per_image: float | None
    fingerprint: str


def scan(store: ResultStore, plan: Plan) -> dict[ShardKey, ShardRecord]:
    """Reads the ids of every committed shard of the plan. A file that is damaged, or whose ids are not exactly the
    plan's, is set aside, and its shards count as missing. Raises StorageError."""
    planned = {shard.key: shard for shard in plan.shards}
    files: dict[str, list[ShardKey]] = defaultdict(list)
    for key, name in store.shards().items():
        files[name].append(key)
    wanted = {name: keys for name, keys in files.items() if not planned.keys().isdisjoint(keys)}
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda name: _read(store, plan, planned, sorted(wanted[name]), name), wanted)
        found = dict(zip(wanted, records, strict=True))
    if any(records is None and MERGED.fullmatch(name) for name, records in found.items()):
        return scan(store, plan)  # the shards' own files may still be there
    return {record.key: record for records in found.values() for record in records or ()}


def _read(
    store: ResultStore, plan: Plan, planned: Mapping[ShardKey, Shard], keys: list[ShardKey], name: str
) -> list[ShardRecord] | None:
    """The records of the shards in one file; None where it cannot be used and was set aside."""
    try:
        content = store.read(name)
        table = decode(content, SCANNED)
        sample_ids = [sample_id for key in keys for sample_id in plan.sample_ids(planned[key])]
        uses = shard_uses(table)
        if table["sample_id"].to_pylist() != sample_ids or len(uses) != len(keys):
            raise ValueError("its sample ids are not the plan's")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s: set aside, its shards are drawn again (%s)", name, error)
        store.set_aside(name)
        return None
    sha256, start, records = hashlib.sha256(content).hexdigest(), 0, []
    errors, seconds = table["error"].to_pylist(), table["seconds"].to_pylist()
    for key, use in zip(keys, uses, strict=True):
        part = slice(start, start + len(planned[key].samples))
        n_failed = sum(error is not None for error in errors[part])
        drawn = [value for value in seconds[part] if value is not None]
        records.append(ShardRecord(key, name, sha256, len(content), part.stop - start, n_failed, drawn, use))
        start = part.stop
    return records


def metrics(plan: Plan, records: Mapping[ShardKey, ShardRecord]) -> list[ModelMetrics]:
    """What each variant of the plan took, from the shards that are there."""
    return [
        _metrics(variant, plan.fingerprint(variant), [r for key, r in records.items() if key.variant == variant])
        for variant in plan.variants
    ]


def _metrics(variant: str, fingerprint: str, records: Iterable[ShardRecord]) -> ModelMetrics:
    use: ModelUse | None = None
    seconds: list[float] = []
    for record in records:
        seconds += record.seconds
        use = record.use.joined(use) if record.use else use
    return ModelMetrics(
        variant,
        use.storage_bytes if use else None,
        use.peak_memory_bytes if use else None,
        use.memory_kind if use else None,
        statistics.median(seconds) if seconds else None,
        fingerprint,
    )


def build_manifest(
    plan: Plan, run_id: str, records: Mapping[ShardKey, ShardRecord], sessions: list[dict[str, Any]]
) -> dict:
    """The manifest of a complete run, which `sessions` worked on. `records` must hold every shard (KeyError)."""
    ordered = [records[shard.key] for shard in plan.shards]
    uses = [record.use for record in ordered if record.use]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "plan": plan.describe(),
        "n_expected": plan.n_samples,
        "n_failed": sum(record.n_failed for record in ordered),
        "models": [vars(model) for model in metrics(plan, records)],
        "devices": sorted({use.device for use in uses}),
        "drivers": sorted({use.driver for use in uses if use.driver}),
        "code": distinct_codes(sessions),
        "sessions": sessions,
        "files": list(_files(ordered).values()),
    }


def _files(records: Iterable[ShardRecord]) -> dict[str, dict]:
    """The records' files as the manifest lists them, by name."""
    files: dict[str, dict] = {}
    for record in records:
        empty = {"name": record.name, "rows": 0, "bytes": record.size, "sha256": record.sha256}
        files.setdefault(record.name, empty)["rows"] += record.n_rows
    return files
