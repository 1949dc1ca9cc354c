"""Files that appear whole or not at all, and never change: the first writer wins.

On a local or shared volume: a temporary file in the same folder, flushed to disk, then a hard link to the final name,
which the file system refuses where that name exists. A crash leaves at most a temporary file, whose name starts with a
dot and ends in `.tmp`; readers never match it. Elsewhere: the exclusive create of the fsspec file system.
"""

import os
import uuid
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


def publish(fs: AbstractFileSystem, path: str, content: bytes) -> bool:
    """Writes `content` under `path` and says whether this call did it; False where the file was there before.

    Creates the folder. Raises OSError where the storage refuses.
    """
    if isinstance(fs, LocalFileSystem):
        return _publish_locally(Path(path), content)
    try:
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _publish_locally(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)
    return True


def _flush_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
