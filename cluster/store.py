"""Where a run's results lie, and the only place that writes them.

    <uri>/run_id=<id>/_plan.json                                            what the run is, written first
    <uri>/run_id=<id>/variant=<v>/benchmark=<b>/shard-00042.parquet         one file a shard
    <uri>/run_id=<id>/images/<v>/<b>/<prompt>_<image>-<digest>.png          what the rows point to
    <uri>/run_id=<id>/_manifest.json                                        written last: the run is complete

Every file is written once and never changed. A shard is done when its file exists; nothing else records progress.
"""

import hashlib
import json
import re
import uuid
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from bitflux_core.errors import UserError
from cluster.plan import Plan, ShardKey
from cluster.rows import SCHEMA, ModelUse, Row, decode, encode
from cluster.write_once import publish

PLAN = "_plan.json"
MANIFEST = "_manifest.json"
SHARD = re.compile(r"variant=([^/]+)/benchmark=([^/]+)/shard-(\d{5,})\.parquet")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class StorageError(Exception):
    """The storage refused a result; what was committed before stays good."""


class ResultStore:
    """One run's folder at a local path or an fsspec URI. Holds no connection state, so it travels to the actors."""

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
            found = self.plan_digest()
        except OSError as error:
            raise UserError(
                f"output {self.uri}: cannot be written ({error.strerror or error}); name another with --output"
            ) from error
        if found != plan.digest:
            raise UserError(
                f"run {self.run_id} at {self.uri} has another plan (other models, workload or settings); "
                "leave --run-id out, or give a new one"
            )

    def plan_digest(self) -> str | None:
        """Digest of the plan that the run was begun with, None where there is no such run."""
        plan = self._read_json(PLAN)
        return plan["digest"] if plan else None

    def manifest(self) -> dict[str, Any] | None:
        """The complete run's manifest, None while the run is incomplete."""
        return self._read_json(MANIFEST)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Declares the run complete. Raises StorageError."""
        self._publish(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())

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

    def shards(self) -> dict[ShardKey, str]:
        """The shards that were committed, with their files' names."""
        self._fs.invalidate_cache()
        names = [
            f"{variant}/{benchmark}/{file}"
            for variant in self._list("")
            if variant.startswith("variant=")
            for benchmark in self._list(variant)
            for file in self._list(f"{variant}/{benchmark}")
        ]
        matches = [match for match in map(SHARD.fullmatch, names) if match]
        return {ShardKey(match[1], match[2], int(match[3])): match[0] for match in matches}

    def completed_shards(self, plan: Plan) -> set[ShardKey]:
        """Which of the plan's shards were committed."""
        return {shard.key for shard in plan.shards} & self.shards().keys()

    def read(self, name: str) -> bytes:
        """A file of the run, by its name within the run's folder."""
        return self._fs.cat_file(self._path(name))

    def set_aside(self, name: str) -> None:
        """Renames a damaged file, so that its shard is drawn again and nothing is lost."""
        self._fs.mv(self._path(name), f"{self._path(name)}.damaged-{uuid.uuid4().hex[:8]}")

    def read_rows(self, partial: bool = False) -> pa.Table:
        """All rows of a complete run, or with `partial` those that are there.

        UserError for an incomplete run, and for a file that is damaged or not the manifest's.
        """
        manifest = self.manifest()
        if manifest is None and not partial:
            raise UserError(f"run {self.run_id} at {self.uri} is not complete; finish it, or ask for --partial")
        digests: dict[str, str | None] = (
            {file["name"]: file["sha256"] for file in manifest["files"]}
            if manifest
            else dict.fromkeys(sorted(self.shards().values()))
        )
        tables = [self._table(name, digest).replace_schema_metadata(None) for name, digest in digests.items()]
        return pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table()

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
            raise StorageError(f"{self._path(name)}: cannot be written ({error.strerror or error})") from error

    def _list(self, folder: str) -> list[str]:
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(folder), detail=False)]
        except FileNotFoundError:
            return []

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
