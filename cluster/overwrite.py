"""Files that are replaced as a whole: a reader sees the old one or the new one, never a part. The last writer wins.

For verdicts only: results are written once (`cluster.write_once`).
"""

import os
import uuid
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.write_once import OBJECT_STORES


def overwrite(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Writes `content` under `path`, in place of what is there. Creates the folder. Raises OSError."""
    if not isinstance(fs, LocalFileSystem):
        if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, content)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
