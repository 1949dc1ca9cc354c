"""Where a run's results come from: the code, the packages and the command of every session that drew some of them.

    <run>/sessions/<start, UTC>-<random>.json       written once, before a session draws anything

The plan's digest holds no version of the code: a run that is resumed after a change of code goes on, since most changes
leave the images alone and hours of drawing are not thrown away for the others. Equal results are promised for one
version of the code only, so the manifest names all that took part, and a resumed run warns of another one.
"""

import hashlib
import logging
import platform
import shlex
import sys
import uuid
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from bitflux_core.environment import DIRTY, git_revision, package_versions
from cluster.manifests import REPOSITORY
from cluster.store import ResultStore

FOLDER = "sessions"
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "ray",
    "pyarrow",
)
CONFIGS = "kernels/configs/*.json"  # tuned block sizes: part of what a kernel computes

log = logging.getLogger(__name__)


def begin_session(store: ResultStore) -> None:
    """Records this process as one that works on the run. Warns where an earlier one ran other code.

    Raises StorageError.
    """
    now = datetime.now(UTC)
    mine = {"started": f"{now:%Y-%m-%dT%H:%M:%SZ}", **provenance()}
    earlier = sessions(store)
    store.keep_record(FOLDER, f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}", mine)
    if any(code_of(session) != code_of(mine) for session in earlier):
        log.warning("run %s was begun with other code; its manifest will name both versions", store.run_id)


def sessions(store: ResultStore) -> list[dict[str, Any]]:
    """All sessions that worked on the run, the first one first. Raises StorageError."""
    return store.records(FOLDER)


@cache
def provenance() -> dict[str, Any]:
    """What runs in this process: code, packages, Python, platform and the command line."""
    revision = git_revision(REPOSITORY)
    return {
        "revision": revision.removesuffix(DIRTY) if revision else None,
        "dirty": revision.endswith(DIRTY) if revision else None,
        "code_digest": code_digest(REPOSITORY),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(PACKAGES),
        "command": shlex.join(sys.argv),
    }


def code_of(session: dict[str, Any]) -> dict[str, Any]:
    """Which version of the code a session ran."""
    return {field: session[field] for field in ("revision", "dirty", "code_digest")}


def distinct_codes(sessions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The versions of the code, in the order of their first session."""
    codes: list[dict[str, Any]] = []
    for session in sessions:
        if code_of(session) not in codes:
            codes.append(code_of(session))
    return codes


def code_digest(repository: Path) -> str:
    """First 16 hex digits of a SHA-256 over the source files of the packages: known where git is not, and true where a
    checkout was changed."""
    packages = sorted(path.parent for path in repository.glob("*/__init__.py") if path.parent.name != "tests")
    digest = hashlib.sha256()
    files = [file for package in packages for file in package.rglob("*.py")]
    for file in sorted([*files, *repository.glob(CONFIGS)]):
        digest.update(f"{file.relative_to(repository).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
