"""Where a run's results lie, and the only place that writes them.

    <uri>/run_id=<id>/_plan.json                                            what the run is, written first
    <uri>/run_id=<id>/variant=<v>/benchmark=<b>/shard-00042.parquet         one file a shard, while the run goes on
    <uri>/run_id=<id>/variant=<v>/benchmark=<b>/rows-00000-00511.parquet    at its end: all rows of shards 0 to 511
    <uri>/run_id=<id>/images/<v>/<b>/<prompt>_<image>-<digest>.png          what the rows point to
    <uri>/run_id=<id>/fidelity/variant=<v>/benchmark=<b>/shard-00042.parquet    images against their twins
    <uri>/run_id=<id>/_manifest.json                                        written last: the run is complete

Every file is written once and never changed. A shard is done when its own file or a merged one that covers it exists;
nothing else records progress. Where both exist the merged one is read, so each row is read once, whenever a run is
killed. The shards' own files stay: a merged file that gets damaged costs no image, and they are few beside the images.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from bitflux_core.errors import UserError
from cluster.failing_storage import StorageError, describe, patiently
from cluster.plan import Plan, ShardKey
from cluster.rows import SCHEMA, ModelUse, Row, decode, encode
from cluster.write_once import publish

PLAN = "_plan.json"
MANIFEST = "_manifest.json"
SHARD = re.compile(r"variant=([^/]+)/benchmark=([^/]+)/shard-(\d{5,})\.parquet")
MERGED = re.compile(r"variant=([^/]+)/benchmark=([^/]+)/rows-(\d{5,})-(\d{5,})\.parquet")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

T = TypeVar("T")


class ResultStore:
    """One run's folder at a local path or an fsspec URI. Holds no connection state, so it travels to the actors.

    What S3 needs (credentials, region, endpoint) comes from the environment of each process: AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL_S3 and the like.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        """Raises UserError for a run id that is no file name and for a URI that no installed file system serves."""
        if not RUN_ID.fullmatch(run_id):
            raise UserError(f"run id '{run_id}': use letters, digits, '.', '_' and '-' only")
        try:
            self._fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(f"output {uri}: {error}") from error
        self.uri = root if isinstance(self._fs, LocalFileSystem) else uri.rstrip("/")
        self.run_id = run_id
        self._root = f"{root.rstrip('/')}/run_id={run_id}"

    @property
    def run_uri(self) -> str:
        """The run's folder, in full."""
        return f"{self.uri.rstrip('/')}/run_id={self.run_id}"

    def open(self, plan: Plan) -> None:
        """Begins the run or finds it again. UserError where the output cannot be written or holds another plan."""
        description = json.dumps(plan.describe(), indent=1, ensure_ascii=False).encode()
        try:
            publish(self._fs, self._path(PLAN), description)
        except OSError as error:
            raise UserError(
                f"output {self.uri}: cannot be written ({describe(error)}); name another with --output"
            ) from error
        found = self.plan_digest()
        if found != plan.digest:
            raise UserError(
                f"run {self.run_id} at {self.uri} has another plan (other models, workload or settings); "
                "leave --run-id out, or give a new one"
            )

    def withdraw(self) -> None:
        """Takes back a plan of which nothing was committed, so that the run's name is free for a corrected one."""
        if not self.shards():
            self._reading(PLAN, lambda: self._fs.rm_file(self._path(PLAN)))

    def plan_digest(self) -> str | None:
        """Digest of the plan that the run was begun with, None where there is no such run."""
        plan = self._read_json(PLAN)
        return plan["digest"] if plan else None

    def manifest(self) -> dict[str, Any] | None:
        """The complete run's manifest, None while the run is incomplete."""
        return self._read_json(MANIFEST)

    def write_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Declares the run complete and returns its manifest: another one, where a second driver came first.

        Raises StorageError.
        """
        self._publish(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        return self.manifest() or manifest

    def commit(self, key: ShardKey, rows: list[Row], use: ModelUse | None) -> bool:
        """Writes a shard's file; False where another commit of the same shard came first. Raises StorageError."""
        return self._publish(shard_name(key), encode(rows, use))

    def write_image(self, key: ShardKey, prompt_index: int, image_index: int, digest: str, png: bytes) -> str:
        """Writes an image and returns its path, relative to the run's folder. Raises StorageError.

        The name holds the digest of the pixels, so a second attempt that drew the same finds its file in place.
        """
        name = f"images/{key.variant}/{key.benchmark}/{prompt_index:05}_{image_index:02}-{digest[:8]}.png"
        self._publish(name, png)
        return name

    def commit_merged(self, keys: Sequence[ShardKey], content: bytes) -> None:
        """Writes the rows of consecutive shards of one variant and benchmark into one file. Raises StorageError."""
        self._publish(merged_name(keys[0], keys[-1]), content)

    def shards(self) -> dict[ShardKey, str]:
        """The shards that were committed, with the names of the files that hold them: a merged file's, where there is
        one. Raises StorageError."""
        return _owners(self._result_files())

    def completed_shards(self, plan: Plan) -> set[ShardKey]:
        """Which of the plan's shards were committed."""
        return {shard.key for shard in plan.shards} & self.shards().keys()

    def read(self, name: str) -> bytes:
        """A file of the run, by its name within the run's folder. Raises FileNotFoundError and StorageError."""
        return self._reading(name, lambda: self._fs.cat_file(self._path(name)))

    def keep_record(self, folder: str, name: str, record: dict[str, Any]) -> None:
        """Writes something about the run beside its rows. Raises StorageError."""
        self._publish(f"{folder}/{name}.json", json.dumps(record, indent=1, ensure_ascii=False).encode())

    def write_once(self, name: str, content: bytes) -> bool:
        """Writes a file beside the rows; False where it was there before. Raises StorageError."""
        return self._publish(name, content)

    def names_under(self, folder: str) -> list[str]:
        """Names of the files in `folder`'s folders by variant and benchmark. Raises StorageError."""
        self._fs.invalidate_cache()
        return [
            f"{folder}/{variant}/{benchmark}/{file}"
            for variant in self._list(folder)
            for benchmark in self._list(f"{folder}/{variant}")
            for file in self._list(f"{folder}/{variant}/{benchmark}")
            if file.endswith(".parquet")
        ]

    def records(self, folder: str) -> list[dict[str, Any]]:
        """What `keep_record` put into `folder`, by name. Raises StorageError."""
        self._fs.invalidate_cache()
        names = sorted(name for name in self._list(folder) if name.endswith(".json"))
        return [json.loads(self.read(f"{folder}/{name}")) for name in names]

    def set_aside(self, name: str) -> None:
        """Renames a damaged file, so that its shards are drawn again and nothing is lost. Raises StorageError."""
        aside = f"{self._path(name)}.damaged-{uuid.uuid4().hex[:8]}"
        self._reading(name, lambda: self._fs.mv(self._path(name), aside))

    def files(self, partial: bool = False) -> dict[str, str | None]:
        """The files that hold the rows of a complete run, with their SHA-256 in hex; with `partial` also those of an
        incomplete run so far, None for their digests. Each row is in one of them. UserError for an incomplete run."""
        manifest = self.manifest()
        if manifest is not None:
            return {file["name"]: file["sha256"] for file in manifest["files"]}
        if not partial:
            raise UserError(f"run {self.run_id} at {self.uri} is not complete; finish it, or ask for --partial")
        return dict.fromkeys(sorted({*self.shards().values()}))

    def read_rows(self, partial: bool = False) -> pa.Table:
        """All rows of a complete run, or with `partial` those that are there.

        UserError for an incomplete run, and for a file that is damaged or not the manifest's.
        """
        tables = [table.replace_schema_metadata(None) for table in self.tables(partial)]
        return pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table()

    def tables(self, partial: bool = False) -> Iterator[pa.Table]:
        """The rows file by file, with their metadata; errors as of `read_rows`."""
        return (self._table(name, digest) for name, digest in self.files(partial).items())

    def _table(self, name: str, digest: str | None) -> pa.Table:
        """A shard's rows. UserError where the file is gone or damaged, or is not the one of the manifest's `digest`."""
        try:
            content = self.read(name)
            if digest not in (None, hashlib.sha256(content).hexdigest()):
                raise ValueError("it is not the file that the manifest names")
            return decode(content)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.run_uri}/{name} cannot be used ({error}); "
                f"remove the run's {MANIFEST} and run the same command: that draws the shard again"
            ) from error

    def _publish(self, name: str, content: bytes) -> bool:
        try:
            return publish(self._fs, self._path(name), content)
        except OSError as error:
            raise StorageError(
                f"{self.run_uri}/{name}: cannot be written ({describe(error)}); "
                "once the storage takes it, the same command goes on"
            ) from error

    def _reading(self, name: str, call: Callable[[], T]) -> T:
        try:
            return patiently(call)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.run_uri}/{name}: cannot be read ({describe(error)}); "
                "once the storage gives it, the same command goes on"
            ) from error

    def _result_files(self) -> list[str]:
        """Names of all files that hold rows, or once did."""
        self._fs.invalidate_cache()
        return [
            f"{variant}/{benchmark}/{file}"
            for variant in self._list("")
            if variant.startswith("variant=")
            for benchmark in self._list(variant)
            for file in self._list(f"{variant}/{benchmark}")
        ]

    def _list(self, folder: str) -> list[str]:
        try:
            paths = self._reading(folder, lambda: self._fs.ls(self._path(folder), detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{self.run_uri}/{name} is damaged ({error}); remove it and run the same command again"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def shard_name(key: ShardKey) -> str:
    """The file's name within the run's folder."""
    return f"variant={key.variant}/benchmark={key.benchmark}/shard-{key.number:05}.parquet"


def merged_name(first: ShardKey, last: ShardKey) -> str:
    """The name of the file that holds the rows of all shards from `first` to `last`."""
    return f"variant={first.variant}/benchmark={first.benchmark}/rows-{first.number:05}-{last.number:05}.parquet"


def _owners(names: Iterable[str]) -> dict[ShardKey, str]:
    """Which of the files each shard is to be read from. A merged file goes before the shard's own; of two merged ones
    that overlap only the first by name is read."""
    names = sorted(names)
    owners: dict[ShardKey, str] = {}
    for name in names:
        if match := MERGED.fullmatch(name):
            keys = [ShardKey(match[1], match[2], number) for number in range(int(match[3]), int(match[4]) + 1)]
            if owners.keys().isdisjoint(keys):
                owners.update(dict.fromkeys(keys, name))
    for name in names:
        if match := SHARD.fullmatch(name):
            owners.setdefault(_key(match), name)
    return owners


def _key(match: re.Match[str]) -> ShardKey:
    return ShardKey(match[1], match[2], int(match[3]))
