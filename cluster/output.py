"""Refusing an output folder that only one node would see, before anything is drawn."""

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import fsspec
import ray
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bitflux_core.errors import UserError

_JOB_FILES = "runtime_resources"  # Ray's folder for copies of working directories, in the session's

T = TypeVar("T")


def alive_nodes() -> list[str]:
    """Ids of the cluster's nodes. Ray must be initialised."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def check_output(uri: str, nodes: Sequence[str], submitted: bool) -> str:
    """The output in full: an absolute path or a URI that every one of `nodes` (Ray's ids) reaches.

    `submitted`: the driver runs as a Ray job, in a copy of the working directory that is thrown away afterwards.
    Raises UserError for a relative path there and on several nodes, for a path inside that copy, for a local path that
    another node does not see, for one that cannot be written, and for `memory://`, which every process has for itself.
    At a URI of remote storage every node must see what lies there already: the run's plan, once it is begun.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"output {uri}: {error}") from error
    if isinstance(fs, MemoryFileSystem):
        raise UserError(f"output {uri}: memory is each process's own; give --output a path or a URI of shared storage")
    if not isinstance(fs, LocalFileSystem):
        if nodes and _unreadable(uri) is None:
            _ask_for(uri, nodes)
        return uri
    remedy = "give --output an absolute path or a URI that every node reaches"
    if (submitted or len(nodes) > 1) and "://" not in uri and not os.path.isabs(os.path.expanduser(uri)):
        raise UserError(f"output {uri}: a relative path means another folder on each node or in each copy; {remedy}")
    if _JOB_FILES in Path(path).resolve().parts:
        raise UserError(f"output {uri}: lies in a submitted job's temporary copy of the code; {remedy}")
    if len(nodes) > 1:
        _probe(Path(path), nodes)
    return path


def _probe(folder: Path, nodes: Sequence[str]) -> None:
    """Writes a file from here and asks every node for it."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"output {folder}: cannot be written ({error.strerror}); name another with --output") from error
    try:
        answers = on_nodes(nodes, _sees, str(probe))
    finally:
        probe.unlink()
    if not all(answers):
        raise UserError(
            f"output {folder}: {answers.count(False)} of {len(nodes)} nodes do not see it; "
            "give --output a shared volume or a URI that every node reaches"
        )


def _sees(path: str) -> bool:
    return os.path.exists(path)


def _ask_for(uri: str, nodes: Sequence[str]) -> None:
    """Asks every node whether it can list what this process can."""
    faults = [fault for fault in on_nodes(nodes, _unreadable, uri) if fault]
    if faults:
        raise UserError(
            f"output {uri}: {len(faults)} of {len(nodes)} nodes cannot read it ({faults[0]}); give every node the same "
            "environment as this one (s3fs, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3) or the same "
            "right to the bucket"
        )


def _unreadable(uri: str) -> str | None:
    """Why the folder cannot be listed here, in one line."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        fs.invalidate_cache()
        fs.ls(path, detail=False)
    except Exception as error:  # a file system may raise its library's own errors
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def on_nodes(nodes: Sequence[str], call: Callable[..., T], *args: object) -> list[T]:
    """`call(*args)` on each of `nodes` (Ray's ids)."""
    return ray.get(
        [
            ray.remote(call)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(*args)
            for node in nodes
        ]
    )
