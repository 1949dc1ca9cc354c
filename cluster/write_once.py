"""Files that appear whole or not at all, and never change: the first writer wins.

On a local or shared volume: a temporary file in the same folder, flushed to disk, then a hard link to the final name,
which the file system refuses where that name exists. A crash leaves at most a temporary file, whose name starts with a
dot and ends in `.tmp`; readers never match it. Elsewhere: the exclusive create of the fsspec file system, which on S3
is one PutObject with `If-None-Match: *`.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.failing_storage import patiently

# They have no folders; asked to make one, s3fs would make a bucket of a misspelt name.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}


def publish(fs: AbstractFileSystem, path: str, content: bytes) -> bool:
    """Writes `content` under `path` and says whether this call did it; False where the file was there before.

    Creates the folder. Tries again while the storage fails in a way that may pass; a try that took effect without an
    answer also ends in False. Raises OSError where the storage refuses.
    """
    write = _publish_locally if isinstance(fs, LocalFileSystem) else _publish_remotely
    return patiently(lambda: write(fs, path, content))


def make_folder(fs: AbstractFileSystem, path: str) -> None:
    """Makes the folder of the remote file `path`, where the storage has folders."""
    if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        fs.makedirs(fs._parent(path), exist_ok=True)


@contextmanager
def flushed(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside the local `path`, with `content` on disk, to be linked or renamed; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _publish_remotely(fs: AbstractFileSystem, path: str, content: bytes) -> bool:
    make_folder(fs, path)
    try:
        fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if _precondition_failed(error):
            return False
        raise
    return True


def _precondition_failed(error: OSError) -> bool:
    """Whether S3 refused because the object is there. s3fs says so in words that only Amazon's own answer has."""
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _publish_locally(_: AbstractFileSystem, name: str, content: bytes) -> bool:
    path = Path(name)
    try:
        with flushed(path, content) as temporary:
            os.link(temporary, path)
    except FileExistsError:
        return False
    _flush_folder(path.parent)
    return True


def _flush_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
