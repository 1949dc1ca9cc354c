"""Reading what kubectl builds: the Ray clusters, jobs, pods and containers among an overlay's objects."""

import re
import subprocess
import tomllib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import eval_all, nightly_regression

Json = dict[str, Any]
Build = Callable[[Path], list[Json]]
Faults = Callable[[Json], list[str]]

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "manifests" / "kuberay"
DOCKERFILE = REPOSITORY / "manifests" / "image" / "Dockerfile"
OVERLAYS = sorted(path.parent for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
PARSERS = {"jobs/eval_all.py": eval_all.parse, "jobs/nightly_regression.py": nightly_regression.parse}
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}
MODELS = "/models"

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


def project() -> Json:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def of_kind(documents: list[Json], *kinds: str) -> list[Json]:
    return [document for document in documents if document["kind"] in kinds]


def jobs_in(documents: list[Json]) -> list[Json]:
    """The specs of the RayJobs: those created at once, and the template of the nights."""
    nights = [document["spec"]["jobTemplate"] for document in of_kind(documents, "RayCronJob")]
    return [document["spec"] for document in of_kind(documents, "RayJob")] + nights


def clusters_in(documents: list[Json]) -> list[Json]:
    described = [document["spec"] for document in of_kind(documents, "RayCluster")]
    return described + [job["rayClusterSpec"] for job in jobs_in(documents)]


def ray_pods(cluster: Json) -> list[Json]:
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def pods_in(documents: list[Json]) -> list[Json]:
    pods = [pod for cluster in clusters_in(documents) for pod in ray_pods(cluster)]
    pods += [job["submitterPodTemplate"] for job in jobs_in(documents)]
    return pods + [cron["spec"]["jobTemplate"]["spec"]["template"] for cron in of_kind(documents, "CronJob")]


def containers_in(documents: list[Json]) -> list[Json]:
    pods = [container for pod in pods_in(documents) for container in pod["spec"]["containers"]]
    return pods + [cluster["autoscalerOptions"] for cluster in clusters_in(documents) if "autoscalerOptions" in cluster]


def amount(quantity: str) -> float:
    number = quantity.rstrip("".join(UNITS))
    return float(number) * UNITS[quantity.removeprefix(number)]


def match(pattern: str, text: str) -> str:
    """The first group of the pattern, which must be there."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, pattern
    return found[1]


def words(entrypoint: str) -> list[str]:
    """The command line as the submitter's shell reads it."""
    return subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {entrypoint}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def parsed(job: Json) -> tuple[str, Namespace]:
    python, script, *arguments = words(job["entrypoint"])
    assert python == "python"
    return script, PARSERS[script](arguments)


def pool_sizes(documents: list[Json]) -> list[tuple[str, int]]:
    return [
        (group["groupName"], group["replicas"])
        for cluster in clusters_in(documents)
        for group in cluster["workerGroupSpecs"]
    ]
