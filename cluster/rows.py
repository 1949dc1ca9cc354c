"""Result rows: one for every sample of the plan, whether it was drawn and scored or not; and their Parquet form."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.pieces import Piece
from cluster.plan import Plan

# Columns are only ever added, and may then be null in older files.
SCHEMA_VERSION = 2
SCHEMA = pa.schema(
    [
        ("schema_version", pa.int16()),
        ("run_id", pa.string()),
        ("sample_id", pa.string()),
        ("pair_id", pa.string()),
        ("variant", pa.string()),
        ("benchmark", pa.string()),
        ("tag", pa.string()),
        ("prompt", pa.string()),
        ("prompt_index", pa.int32()),
        ("image_index", pa.int32()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("detections", pa.string()),  # JSON list, the evaluator's own fields
        ("image_path", pa.string()),  # relative to the run's folder
        ("image_digest", pa.string()),
        ("seconds", pa.float64()),
        ("worker", pa.string()),
        ("dtype", pa.string()),
        ("batch_size", pa.int32()),
        ("attempts", pa.int32()),  # tries of the pieces that held this sample, the last one included
        ("model_fingerprint", pa.string()),
        ("evaluator_fingerprint", pa.string()),
        ("error", pa.string()),
        # Set where memory sufficed only for batches smaller than the plan's: the image may differ in its last bits.
        ("drawn_batch_size", pa.int32()),
    ]
)
METADATA_KEY = b"bitflux"
# Rows of a merged file that a query reads or skips together.
ROWS_A_GROUP = 4_096

Row = dict[str, Any]
MemoryKind = Literal["cuda-peak", "cpu-resident"]


@dataclass(frozen=True)
class ModelUse:
    """What the model of a shard took: kept in its file's metadata, so that a resumed run reports it as well.

    `peak_memory_bytes` is the device's peak allocation on CUDA, the transformer's resident bytes on the CPU.
    `driver` is the GPU driver's version.
    """

    storage_bytes: int
    peak_memory_bytes: int
    memory_kind: MemoryKind
    device: str
    driver: str | None = None

    def joined(self, other: "ModelUse | None") -> "ModelUse":
        """The use of both: the larger peak counts, of those on CUDA where only some were drawn there."""
        if other is None or other.memory_kind != self.memory_kind:
            return other if other and other.memory_kind == "cuda-peak" else self
        return replace(self, peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes))


@dataclass(frozen=True)
class DrawReport:
    """What a replica says about the images of one call: seconds of each, in the order of the kept slots. The Nones
    stand where no model drew them here.

    `batch_sizes`, in the same order: None for an image drawn in the plan's batch, else the size that memory sufficed
    for. Empty where all were drawn in the plan's batches.
    """

    seconds: tuple[float | None, ...]
    host: str
    use: ModelUse | None
    batch_sizes: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class ScoredImage:
    """What an evaluator says about one image. `detections` is JSON; `error` is set where it could not be scored, and
    path and digest are None where it is no image."""

    score: float | None
    correct: bool | None
    reason: str
    detections: str
    error: str | None
    image_path: str | None
    image_digest: str | None
    evaluator_fingerprint: str


def scored_rows(
    plan: Plan, run_id: str, piece: Piece, report: DrawReport, scored: list[ScoredImage], worker: str
) -> dict[int, Row]:
    """Rows of a piece that was drawn and scored, by position."""
    sizes = report.batch_sizes or (None,) * len(scored)
    results = [
        asdict(image) | {"seconds": seconds, "worker": f"{worker}@{report.host}", "drawn_batch_size": size}
        for image, seconds, size in zip(scored, report.seconds, sizes, strict=True)
    ]
    return _rows(plan, run_id, piece, piece.attempts + 1, results)


def failed_rows(plan: Plan, run_id: str, piece: Piece, error: str) -> dict[int, Row]:
    """Rows of a piece that was given up, by position: no score, no image, the error."""
    return _rows(plan, run_id, piece, piece.attempts, [{"error": error} for _ in piece.positions])


def _rows(plan: Plan, run_id: str, piece: Piece, attempts: int, results: list[Row]) -> dict[int, Row]:
    key = piece.shard.key
    sample_ids = plan.sample_ids(piece.shard)
    rows = {}
    for position, sample, result in zip(piece.positions, piece.samples, results, strict=True):
        rows[position] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "sample_id": sample_ids[position],
            "pair_id": sample.pair_id,
            "variant": key.variant,
            "benchmark": key.benchmark,
            "tag": sample.tag,
            "prompt": sample.prompt,
            "prompt_index": sample.prompt_index,
            "image_index": sample.image_index,
            "seed": sample.seed,
            "dtype": plan.dtype,
            "batch_size": plan.batch_size,
            "attempts": attempts,
            "model_fingerprint": plan.fingerprint(key.variant),
            **result,
        }
    return rows


def encode(rows: list[Row], use: ModelUse | None) -> bytes:
    """A shard's Parquet file. `use` is None where no sample of the shard could be drawn."""
    metadata = {METADATA_KEY: json.dumps(asdict(use) if use else None)}
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(metadata)
    # A few rows: dictionaries and statistics would double the file and the time to read it.
    return _parquet(table, use_dictionary=False, write_statistics=False)


def merge(tables: Sequence[pa.Table]) -> bytes:
    """One Parquet file of several shards' tables, in their order; each shard's model use is kept."""
    uses = [use for table in tables for use in shard_uses(table)]
    distinct = list(dict.fromkeys(use for use in uses if use))
    kept = {"uses": [asdict(use) for use in distinct], "shards": [distinct.index(use) if use else None for use in uses]}
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables], promote_options="default")
    return _parquet(
        rows.replace_schema_metadata({METADATA_KEY: json.dumps(kept)}),
        compression="zstd",
        row_group_size=ROWS_A_GROUP,
    )


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, **options)
    return sink.getvalue().to_pybytes()


def decode(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a Parquet file's bytes, or some of its columns. ValueError (pyarrow.ArrowInvalid) or OSError where
    what is read of it is damaged."""
    # Not pq.read_table: it goes through a data set, which takes three times as long for a small file.
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False)
    return file.read(columns, use_threads=False)


def shard_uses(table: pa.Table) -> tuple[ModelUse | None, ...]:
    """The model use of each shard in the table's file, in the order of their rows."""
    return _uses((table.schema.metadata or {}).get(METADATA_KEY, b"null"))


@lru_cache  # a run's files hold few different ones
def _uses(metadata: bytes) -> tuple[ModelUse | None, ...]:
    kept = json.loads(metadata)
    if kept and "shards" in kept:
        uses = [ModelUse(**use) for use in kept["uses"]]
        return tuple(None if index is None else uses[index] for index in kept["shards"])
    return (ModelUse(**kept) if kept else None,)
