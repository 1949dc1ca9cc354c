"""The end of a run: its many small shard files become a few larger ones, in the order of the plan.

Merging only adds files, so it may be killed or repeated anywhere; the manifest is written from what is read back.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from cluster.audit import READERS, ShardRecord, scan
from cluster.plan import Plan, ShardKey
from cluster.rows import decode, merge
from cluster.store import MERGED, ResultStore

# A few MB: the driver holds one file's rows at a time, and a benchmark of 24,000 images is six files.
ROWS_A_FILE = 4_096

log = logging.getLogger(__name__)


def compact(store: ResultStore, plan: Plan) -> Mapping[ShardKey, ShardRecord]:
    """Merges the files of a run whose shards are all there, and reads the result back.

    A shard that turns out to be damaged is set aside and missing from the result. Raises StorageError.
    """
    names = store.shards()
    with ThreadPoolExecutor(READERS) as pool:
        for keys in _groups(plan):
            if any(MERGED.fullmatch(names[key]) for key in keys):
                continue
            tables = [*pool.map(lambda key: _table(store, names[key]), keys)]
            whole = [table for table in tables if table is not None]
            if len(whole) == len(keys):
                store.commit_merged(keys, merge(whole))
    return scan(store, plan)


def _groups(plan: Plan) -> Iterator[list[ShardKey]]:
    """The shards of each file: consecutive ones of one variant and benchmark, so that the plan alone decides."""
    of_benchmark: dict[tuple[str, str], list[ShardKey]] = {}
    rows = {shard.key: len(shard.samples) for shard in plan.shards}
    for key in sorted(rows):
        of_benchmark.setdefault((key.variant, key.benchmark), []).append(key)
    for keys in of_benchmark.values():
        group: list[ShardKey] = []
        held = 0
        for key in keys:
            if group and held + rows[key] > ROWS_A_FILE:
                yield group
                group, held = [], 0
            group.append(key)
            held += rows[key]
        yield group


def _table(store: ResultStore, name: str) -> pa.Table | None:
    """A shard's rows; None where its file is damaged, which `scan` does not see in columns that it leaves out."""
    content = store.read(name)
    try:
        return decode(content)
    except (OSError, ValueError) as error:
        log.warning("%s: set aside, its shard is drawn again (%s)", name, error)
        store.set_aside(name)
        return None
