"""Refusing an output folder that only one node would see, before anything is drawn."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import fsspec
import ray
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bitflux_core.errors import UserError

_JOB_FILES = "runtime_resources"  # Ray's folder for copies of working directories, in the session's


def alive_nodes() -> list[str]:
    """Ids of the cluster's nodes. Ray must be initialised."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def check_output(uri: str, nodes: Sequence[str], submitted: bool) -> str:
    """The output in full: an absolute path or a URI that every one of `nodes` (Ray's ids) reaches.

    `submitted`: the driver runs as a Ray job, in a copy of the working directory that is thrown away afterwards.
    Raises UserError for a relative path there and on several nodes, for a path inside that copy, for a local path that
    another node does not see, for one that cannot be written, and for `memory://`, which every process has for itself.
    URIs of remote storage are taken as they are.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"output {uri}: {error}") from error
    if isinstance(fs, MemoryFileSystem):
        raise UserError(f"output {uri}: memory is each process's own; give --output a path or a URI of shared storage")
    if not isinstance(fs, LocalFileSystem):
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
        answers = ray.get(
            [
                ray.remote(_sees)
                .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
                .remote(str(probe))
                for node in nodes
            ]
        )
    finally:
        probe.unlink()
    if not all(answers):
        raise UserError(
            f"output {folder}: {answers.count(False)} of {len(nodes)} nodes do not see it; "
            "give --output a shared volume or a URI that every node reaches"
        )


def _sees(path: str) -> bool:
    return os.path.exists(path)
