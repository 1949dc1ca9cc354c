"""Reading a run back: which shards are really there, whether their ids are the plan's, and what the models took.

The manifest is written from this, never from what the scheduler remembers.
"""

import hashlib
import logging
import statistics
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

from cluster.plan import Plan, Shard, ShardKey
from cluster.rows import SCHEMA_VERSION, MemoryKind, ModelUse, decode, model_use
from cluster.store import ResultStore

# Reading is waiting, mostly: for a remote storage, or for a disk.
READERS = 8
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "ray", "pyarrow")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """What one committed file holds. `seconds` are those of its drawn images."""

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
    """Reads every committed shard of the plan. A file that is damaged, or whose ids are not exactly the plan's, is set
    aside, and its shard counts as missing."""
    names = store.shards()
    present = [shard for shard in plan.shards if shard.key in names]
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda shard: _read(store, plan, shard, names[shard.key]), present)
        return {shard.key: record for shard, record in zip(present, records, strict=True) if record}


def _read(store: ResultStore, plan: Plan, shard: Shard, name: str) -> ShardRecord | None:
    content = store.read(name)
    try:
        table = decode(content)
        sample_ids = table["sample_id"].to_pylist()
        if sample_ids != plan.sample_ids(shard):
            raise ValueError("its sample ids are not the plan's")
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s: set aside, its shard is drawn again (%s)", name, error)
        store.set_aside(name)
        return None
    return ShardRecord(
        name,
        hashlib.sha256(content).hexdigest(),
        len(content),
        table.num_rows,
        table.num_rows - table["error"].null_count,
        table["seconds"].drop_null().to_pylist(),
        model_use(table),
    )


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


def build_manifest(plan: Plan, run_id: str, records: Mapping[ShardKey, ShardRecord]) -> dict:
    """The manifest of a complete run. `records` must hold every shard of the plan (KeyError)."""
    ordered = [records[shard.key] for shard in plan.shards]
    devices = sorted({record.use.device for record in ordered if record.use})
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "plan": plan.describe(),
        "n_expected": plan.n_samples,
        "n_failed": sum(record.n_failed for record in ordered),
        "models": [vars(model) for model in metrics(plan, records)],
        "devices": devices,
        "packages": {package: version(package) for package in PACKAGES},
        "files": [
            {"name": record.name, "rows": record.n_rows, "bytes": record.size, "sha256": record.sha256}
            for record in ordered
        ],
    }
