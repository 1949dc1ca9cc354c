"""What code runs here, with what and on what: facts that make a result traceable. Imports nothing heavy."""

import os
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REVISION_VARIABLE = "BITFLUX_REVISION"  # set by the image, and by whoever submits a job without its .git
DIRTY = "-dirty"


def git_revision(repository: Path) -> str | None:
    """The commit of the source code in `repository`, with `-dirty` where a tracked file was changed.

    Where `repository` is no checkout (an image, a job's copy of the code): what BITFLUX_REVISION says, else None.
    """
    git = ["git", "-C", str(repository)]
    top, commit = said([*git, "rev-parse", "--show-toplevel"]), said([*git, "rev-parse", "HEAD"])
    if top is None or commit is None or Path(top).resolve() != repository.resolve():
        return os.environ.get(REVISION_VARIABLE) or None
    changed = said([*git, "status", "--porcelain", "--untracked-files=no"])
    return commit + DIRTY if changed else commit


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each, None where there is none."""
    return {package: package_version(package) for package in packages}


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def gpu_driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    return said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def said(command: Sequence[str]) -> str | None:
    """The first line that a command prints, empty where it prints nothing; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), "")
