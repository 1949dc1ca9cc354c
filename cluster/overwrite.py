"""Files that are replaced as a whole: a reader sees the old one or the new one, never a part. The last writer wins.

For verdicts only: results are written once (`cluster.write_once`).
"""

import os
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.write_once import flushed, make_folder


def overwrite(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Writes `content` under `path`, in place of what is there. Creates the folder. Raises OSError."""
    if not isinstance(fs, LocalFileSystem):
        make_folder(fs, path)
        fs.pipe_file(path, content)
        return
    with flushed(Path(path), content) as temporary:
        os.replace(temporary, path)
