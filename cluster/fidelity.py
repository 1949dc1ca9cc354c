"""Every variant's images beside their full-precision twins, once a run is complete: one file a shard, resumable.

    <uri>/run_id=<id>/fidelity/variant=<v>/benchmark=<b>/shard-00042.parquet

It reads what the run has stored and changes none of it, so it may be repeated, killed or left out.
"""

import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util import ActorPool

from cluster.device import claim_device
from cluster.plan import Plan, ShardKey
from cluster.pool_size import HELPER_CPUS, uses_gpus
from cluster.profile import Profile
from cluster.store import ResultStore, shard_name
from cluster.stored_images import read_image
from cluster.workers import actor_class

if TYPE_CHECKING:
    from evaluators.fidelity import FidelityMeter

BASELINE = "bf16"
FOLDER = "fidelity"
BATCH = 8  # pairs in memory at a time
SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("variant", pa.string()),
        ("benchmark", pa.string()),
        ("tag", pa.string()),
        ("pair_id", pa.string()),
        ("prompt_index", pa.int32()),
        ("image_index", pa.int32()),
        ("psnr_db", pa.float64()),
        ("ssim", pa.float64()),
        ("clip_similarity", pa.float64()),
        ("lpips", pa.float64()),
        # Mean squares in 8-bit levels, by octave of spatial frequency: evaluators/fidelity.py names them.
        ("band_error", pa.list_(pa.float64())),
        ("band_signal", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class ImagePair:
    """A sample's images: the baseline's and the variant's file, None where one was not drawn."""

    tag: str
    pair_id: str
    prompt_index: int
    image_index: int
    reference: str | None
    image: str | None


class FidelityActor:
    """Compares stored images."""

    def __init__(self, clip_dir: Path | None, store: ResultStore) -> None:
        self._clip_dir = clip_dir
        self._store = store
        self._meter: FidelityMeter | None = None

    def measure(self, key: ShardKey, pairs: list[ImagePair]) -> None:
        """Writes the file of a shard. Raises StorageError, and UserError for a CLIP that cannot be loaded."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(pairs), BATCH):
            rows += self._rows(key, pairs[start : start + BATCH])
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
        self._store.write_once(file_name(key), sink.getvalue())

    def _rows(self, key: ShardKey, pairs: list[ImagePair]) -> list[dict[str, Any]]:
        references = [self._read(pair.reference) for pair in pairs]
        found = self._loaded().measure(references, [self._read(pair.image) for pair in pairs])
        rows = []
        for pair, result in zip(pairs, found, strict=True):
            about = {
                "run_id": self._store.run_id,
                "variant": key.variant,
                "benchmark": key.benchmark,
                "tag": pair.tag,
                "pair_id": pair.pair_id,
                "prompt_index": pair.prompt_index,
                "image_index": pair.image_index,
            }
            rows.append({**about, "error": result} if isinstance(result, str) else {**about, **vars(result)})
        return rows

    def _read(self, name: str | None) -> Any:
        """The image's pixels; None where it was not drawn or is damaged, which the meter names."""
        try:
            return None if name is None else read_image(self._store, name)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for a file that is no image
            return None

    def _loaded(self) -> "FidelityMeter":
        if self._meter is None:
            from evaluators.clip import ClipModel
            from evaluators.fidelity import FidelityMeter

            device = claim_device()
            clip = None if self._clip_dir is None else ClipModel(self._clip_dir, device)
            self._meter = FidelityMeter(clip, device)
        return self._meter


def file_name(key: ShardKey) -> str:
    """Where a shard's comparison lies within the run's folder."""
    return f"{FOLDER}/{shard_name(key)}"


def unmeasured(plan: Plan, store: ResultStore) -> list[ShardKey]:
    """The shards of a complete run that are not compared yet; none for a run without the baseline."""
    if BASELINE not in plan.variants:
        return []
    there = set(store.names_under(FOLDER))
    return [shard.key for shard in plan.shards if shard.key.variant != BASELINE and file_name(shard.key) not in there]


def measure_fidelity(
    plan: Plan, keys: Iterable[ShardKey], profile: Profile, clip_dir: Path | None, store: ResultStore
) -> None:
    """Compares these shards of a complete run on actors of their own. Ray must be initialised.

    Raises StorageError, and UserError for a CLIP that cannot be loaded.
    """
    asked = profile.resources
    gpus = asked.evaluator_gpus if uses_gpus(asked) else 0
    actor = actor_class(FidelityActor, HELPER_CPUS, gpus)
    pairs = _pairs(plan, store)
    tasks = [(key, pairs[key]) for key in keys]
    workers = [actor.remote(clip_dir, store) for _ in range(min(asked.evaluators, len(tasks)))]
    try:
        pool = ActorPool(workers)
        for _ in pool.map_unordered(lambda worker, task: worker.measure.remote(*task), tasks):
            pass
    finally:
        for worker in workers:
            ray.kill(worker)


def read_fidelity(store: ResultStore) -> pa.Table:
    """All comparisons of a run. Raises FileNotFoundError, StorageError, and ValueError or OSError for damage."""
    names = sorted(store.names_under(FOLDER))
    tables = [pq.read_table(pa.BufferReader(store.read(name))) for name in names]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def _pairs(plan: Plan, store: ResultStore) -> dict[ShardKey, list[ImagePair]]:
    """The pairs of every shard that is to be compared, in the order of its samples."""
    files: dict[tuple[str, str], str | None] = {}
    for table in store.tables():
        for row in table.select(["variant", "pair_id", "image_path"]).to_pylist():
            files[row["variant"], row["pair_id"]] = row["image_path"]
    pairs: dict[ShardKey, list[ImagePair]] = defaultdict(list)
    for shard in plan.shards:
        if shard.key.variant == BASELINE:
            continue
        for sample in shard.samples:
            reference = files.get((BASELINE, sample.pair_id))
            image = files.get((shard.key.variant, sample.pair_id))
            place = (sample.tag, sample.pair_id, sample.prompt_index, sample.image_index)
            pairs[shard.key].append(ImagePair(*place, reference, image))
    return pairs
