"""Refusing an output folder that only one node would see, before anything is drawn."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import fsspec
import ray
from fsspec.implementations.local import LocalFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bitflux_core.errors import UserError


def alive_nodes() -> list[str]:
    """Ids of the cluster's nodes. Ray must be initialised."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def check_output(uri: str, nodes: Sequence[str], submitted: bool) -> str:
    """The output in full: an absolute path or a URI that every one of `nodes` (Ray's ids) reaches.

    `submitted`: the driver runs as a Ray job, in a copy of the working directory that is thrown away afterwards.
    Raises UserError for a relative path there, for a local path that another node does not see, and for one that cannot
    be written. URIs of remote storage are taken as they are.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"output {uri}: {error}") from error
    if not isinstance(fs, LocalFileSystem):
        return uri
    if submitted and "://" not in uri and not os.path.isabs(os.path.expanduser(uri)):
        raise UserError(
            f"output {uri}: a relative path in a submitted job lies in a temporary copy of the code; "
            "give --output an absolute path or a URI that every node reaches"
        )
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
