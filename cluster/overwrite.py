"""Files that are replaced as a whole: a reader sees the old one or the new one, never a part. The last writer wins.

For verdicts only: results are written once (`cluster.write_once`).
"""

import os
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.failing_storage import patiently
from cluster.write_once import flushed, make_folder


def overwrite(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Writes `content` under `path`, in place of what is there. Creates the folder.

    Tries again while the storage fails in a way that may pass. Raises OSError where it refuses.
    """
    write = _overwrite_locally if isinstance(fs, LocalFileSystem) else _overwrite_remotely
    patiently(lambda: write(fs, path, content))


def _overwrite_remotely(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    make_folder(fs, path)
    fs.pipe_file(path, content)


def _overwrite_locally(_: AbstractFileSystem, path: str, content: bytes) -> None:
    with flushed(Path(path), content) as temporary:
        os.replace(temporary, path)
