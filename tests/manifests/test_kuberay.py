"""Every overlay as kubectl builds it: valid for KubeRay, and in step with pyproject and with the jobs."""

import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_objects import (
    DOCKERFILE,
    KUBERAY,
    MODELS,
    OVERLAYS,
    REPOSITORY,
    Build,
    Faults,
    Json,
    amount,
    clusters_in,
    containers_in,
    every_overlay,
    jobs_in,
    of_kind,
    parsed,
    pods_in,
    pool_sizes,
    project,
    ray_pods,
)

from cluster.manifests import FOLDERS, find_manifest
from cluster.profile import load_profile

POOLS = {  # prefixes of the products, and some that must be there
    "h200": ("NVIDIA-H200", {"NVIDIA-H200"}),
    "h100": ("NVIDIA-H100", {"NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"}),
    "a100": ("NVIDIA-A100", {"NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-40GB"}),
    "l40": ("NVIDIA-L", {"NVIDIA-L20", "NVIDIA-L40", "NVIDIA-L40S"}),
    "a10": ("NVIDIA-A10", {"NVIDIA-A10"}),
}


def test_every_workload_has_an_overlay() -> None:
    names = {path.name for path in OVERLAYS}
    assert {"interactive", "evaluation-h100", "nightly", "nightly-raycronjob", "nightly-kueue"} <= names
    assert len(OVERLAYS) == len(list((KUBERAY / "overlays").iterdir()))


@every_overlay
def test_every_object_is_valid(overlay: Path, build: Build, faults: Faults) -> None:
    documents = build(overlay)
    assert [fault for document in documents for fault in faults(document)] == []
    identities = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("results", ["results-pvc", "results-s3"])
def test_components_combine(pool: str, results: str, build: Build, faults: Faults, tmp_path: Path) -> None:
    """A user's own overlay: this pool and storage under a night in Kueue, from an image in a registry."""
    base = os.path.relpath(KUBERAY, tmp_path)
    components = [f"pool-{pool}", results, "nightly", "kueue"]
    own = {
        "namespace": "other",
        "resources": [f"{base}/base"],
        "components": [f"{base}/components/{name}" for name in components],
        "images": [{"name": "bitflux", "newName": "registry.example/bitflux", "digest": "sha256:" + "0" * 64}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    documents = build(tmp_path)
    assert [fault for document in documents for fault in faults(document)] == []
    assert {group for group, replicas in pool_sizes(documents) if replicas} == {pool}
    images = {container["image"] for pod in pods_in(documents) for container in pod["spec"]["containers"]}
    assert images == {"registry.example/bitflux@sha256:" + "0" * 64}


def fields(node: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all mappings in which a field has a meaning: not the free maps of labels and quantities."""
    free = {"labels", "annotations", "matchLabels", "limits", "requests", "rayStartParams", "nodeLabels"}
    if isinstance(node, dict):
        yield path
        for key, child in node.items():
            if key not in free:
                yield from fields(child, (*path, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from fields(child, (*path, index))


@pytest.mark.parametrize("overlay", ["evaluation-kueue", "nightly-s3", "interactive"])
def test_a_wrong_field_is_refused_wherever_it_stands(overlay: str, build: Build, faults: Faults) -> None:
    for document in build(KUBERAY / "overlays" / overlay):
        places = list(fields(document))
        for place in places[:: max(1, len(places) // 25)]:
            damaged = copy.deepcopy(document)
            node: Any = damaged
            for step in place:
                node = node[step]
            node["backoffLimt"] = 3
            assert faults(damaged), (document["kind"], place)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda job: job["spec"].update(backoffLimit="three"), "backoffLimit"),
        (lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokn"), "tokn"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda job: job["metadata"].update(name="Bit_Flux"), "Bit_Flux"),
        (lambda job: job.update(apiVersion="ray.io/v2"), "ray.io/v1"),
    ],
    ids=["type", "enum", "required", "name", "version"],
)
def test_a_wrong_value_is_refused(change: Callable[[Json], None], complaint: str, build: Build, faults: Faults) -> None:
    (job,) = of_kind(build(KUBERAY / "overlays" / "evaluation-h100"), "RayJob")
    change(job)
    assert any(complaint in fault for fault in faults(job))


@every_overlay
def test_the_operators_own_rules_hold(overlay: Path, build: Build) -> None:
    """What KubeRay's operator refuses beyond its schema."""
    documents = build(overlay)
    assert clusters_in(documents)
    for document in of_kind(documents, "RayCluster", "RayJob", "RayCronJob"):
        assert len(document["metadata"]["name"]) <= {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}[document["kind"]]
    for job in jobs_in(documents):
        assert job["shutdownAfterJobFinishes"]  # else no ttl, and Kueue refuses it
        assert min(job["ttlSecondsAfterFinished"], job["activeDeadlineSeconds"], job["preRunningDeadlineSeconds"]) > 0
        assert not job["rayClusterSpec"]["enableInTreeAutoscaling"]  # a night's pool is fixed
        assert len(job["rayClusterSpec"]["workerGroupSpecs"]) + 2 <= 8  # Kueue's most pod sets, with head and submitter
    for cluster in clusters_in(documents):
        assert not any("restartPolicy" in pod["spec"] for pod in ray_pods(cluster))
        for group in cluster["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert not {"num-gpus", "num-cpus", "labels"} & set(group["rayStartParams"])
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert not any("nvidia.com/gpu" in str(c["resources"]) for c in ray_pods(cluster)[0]["spec"]["containers"])


@every_overlay
def test_a_pool_a_kind_of_gpu(overlay: Path, build: Build) -> None:
    from ray.util.accelerators import accelerators

    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_")}
    documents = build(overlay)
    # Without a GPU at the start a job takes the cluster for one that has none.
    assert any(replicas for _, replicas in pool_sizes(documents))
    for cluster in clusters_in(documents):
        products: list[str] = []
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert set(groups) == set(POOLS)
        for name, group in groups.items():
            spec = group["template"]["spec"]
            affinity = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            (term,) = affinity["nodeSelectorTerms"]
            (expression,) = term["matchExpressions"]
            assert expression["key"] == "nvidia.com/gpu.product"
            prefix, some = POOLS[name]
            assert set(expression["values"]) >= some
            assert all(value.startswith(prefix) for value in expression["values"])
            products += expression["values"]
            assert set(group.get("labels", {}).values()) <= known
            assert any(toleration["key"] == "nvidia.com/gpu" for toleration in spec["tolerations"])
            assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert len(products) == len(set(products))


@every_overlay
def test_versions_are_pyprojects(overlay: Path, build: Build) -> None:
    declared = project()["project"]
    (ray,) = (line for line in declared["dependencies"] if line.startswith("ray["))
    documents = build(overlay)
    assert {cluster["rayVersion"] for cluster in clusters_in(documents)} == {ray.split("==")[1]}
    images = {container["image"] for container in containers_in(documents) if "image" in container}
    assert images == {f"{declared['name']}:{declared['version']}"}


@every_overlay
def test_the_jobs_accept_their_command_lines(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    for job in jobs_in(documents):
        script, args = parsed(job)
        assert (REPOSITORY / script).is_file()
        profile = load_profile(args.profile)
        assert args.data_dir.is_relative_to(MODELS)  # nothing is fetched
        if script == "jobs/nightly_regression.py":
            assert find_manifest("gates", args.gates).parent == FOLDERS["gates"]
            assert re.fullmatch(r"nightly-\d{8}", args.night)  # a retry goes on with it
            assert args.accept is None
        variants = set(args.variants or profile.variants)
        if dict(pool_sizes(documents))["a10"]:
            assert "bf16" not in variants
        assert profile.models.ternary
        # Where the profile's ternary model is looked for in the image, the cache is mounted.
        folder = Path("/opt/bitflux") / profile.models.ternary
        mounts = ray_pods(job["rayClusterSpec"])[1]["spec"]["containers"][0]["volumeMounts"]
        assert any(folder.is_relative_to(mount["mountPath"]) for mount in mounts if mount["name"] == "models")


@every_overlay
def test_results_are_reached_by_every_ray_pod(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    stored = "s3" if "s3" in overlay.name else "pvc"
    for job in jobs_in(documents):
        output = parsed(job)[1].output
        assert output.startswith("s3://") if stored == "s3" else output == "/results"
    for pod in (pod for cluster in clusters_in(documents) for pod in ray_pods(cluster)):
        (container,) = pod["spec"]["containers"]
        mounted = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/results"]
        secrets = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
        assert (bool(mounted), secrets) == ((True, []) if stored == "pvc" else (False, ["bitflux-s3"]))
        assert not any(mount.get("readOnly") for mount in mounted)


def test_an_s3_uri_has_its_file_system_in_the_image() -> None:
    assert "s3fs" in DOCKERFILE.read_text() or any("s3fs" in line for line in project()["project"]["dependencies"])


@pytest.mark.parametrize("overlay", ["evaluation-kueue", "nightly-kueue"])
def test_kueue_admits_a_job_that_fits_the_quota(overlay: str, build: Build) -> None:
    documents = build(KUBERAY / "overlays" / overlay)
    (queue,) = of_kind(documents, "LocalQueue")
    for document in of_kind(documents, "RayJob", "RayCronJob"):
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    (cluster_queue,) = of_kind(documents, "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    quota = {quota["name"]: amount(quota["nominalQuota"]) for quota in group["flavors"][0]["resources"]}
    assert list(quota) == group["coveredResources"]
    (job,) = jobs_in(documents)
    pods = [(1, job["submitterPodTemplate"]), (1, job["rayClusterSpec"]["headGroupSpec"]["template"])]
    pods += [(group["replicas"], group["template"]) for group in job["rayClusterSpec"]["workerGroupSpecs"]]
    for name, most in quota.items():
        asked = sum(
            count * amount(container["resources"]["requests"].get(name, "0"))
            for count, pod in pods
            for container in pod["spec"]["containers"]
        )
        assert 0 < asked <= most, name
