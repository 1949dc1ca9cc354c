"""Every overlay as kubectl builds it: valid for KubeRay, confined, and in step with pyproject and with the jobs."""

import copy
import json
import os
import re
import shlex
import subprocess
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import workers
from cluster.manifests import FOLDERS, find_manifest
from cluster.profile import load_profile
from jobs import eval_all, nightly_regression

Json = dict[str, Any]
Build = Callable[[Path], list[Json]]
Faults = Callable[[Json], list[str]]

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "manifests" / "kuberay"
DOCKERFILE = REPOSITORY / "manifests" / "image" / "Dockerfile"
OVERLAYS = sorted(path.parent for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
POOLS = {  # prefixes of the products, and some that must be there
    "h200": ("NVIDIA-H200", {"NVIDIA-H200"}),
    "h100": ("NVIDIA-H100", {"NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"}),
    "a100": ("NVIDIA-A100", {"NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-40GB"}),
    "l40": ("NVIDIA-L", {"NVIDIA-L20", "NVIDIA-L40", "NVIDIA-L40S"}),
    "a10": ("NVIDIA-A10", {"NVIDIA-A10"}),
}
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


# What KubeRay and Kubernetes accept


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


def pool_sizes(documents: list[Json]) -> list[tuple[str, int]]:
    return [
        (group["groupName"], group["replicas"])
        for cluster in clusters_in(documents)
        for group in cluster["workerGroupSpecs"]
    ]


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


# In step with the project


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


# Confinement


@every_overlay
def test_requests_are_limits(overlay: Path, build: Build) -> None:
    for container in containers_in(build(overlay)):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["limits"])


@every_overlay
def test_pods_keep_the_restricted_standard(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    for pod in pods_in(documents):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all("hostPath" not in volume for volume in pod["spec"].get("volumes", []))
    for container in containers_in(documents):
        security = container["securityContext"]
        assert not security["allowPrivilegeEscalation"]
        assert not security["privileged"]
        assert security["capabilities"] == {"drop": ["ALL"]}


@every_overlay
def test_every_cluster_asks_for_a_token_and_no_manifest_holds_one(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    for cluster in clusters_in(documents):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "bitflux-ray-auth"}
    assert not of_kind(documents, "Secret")
    names = [variable["name"] for container in containers_in(documents) for variable in container.get("env", [])]
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY|RAY_AUTH_MODE", name)]


@every_overlay
def test_only_who_needs_it_holds_an_api_token(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    for pod in pods_in(documents):
        labels = pod["metadata"]["labels"]
        assert pod["spec"]["automountServiceAccountToken"] == (labels.get("bitflux/api-server") == "true")
        assert labels["app.kubernetes.io/part-of"] == "bitflux"  # the network policies choose by it
    for cluster in clusters_in(documents):
        head, *others = ray_pods(cluster)
        assert head["spec"]["automountServiceAccountToken"] == cluster["enableInTreeAutoscaling"]
        assert not any(pod["spec"]["automountServiceAccountToken"] for pod in others)


@every_overlay
def test_models_are_read_only_and_no_hub_is_asked(overlay: Path, build: Build) -> None:
    for pod in (pod for cluster in clusters_in(build(overlay)) for pod in ray_pods(cluster)):
        (container,) = pod["spec"]["containers"]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["HF_HOME"].startswith(MODELS)
        mounts = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
        assert mounts
        assert all(mount["readOnly"] for mount in mounts)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["models"]["persistentVolumeClaim"]["readOnly"]
        shared = volumes["shared-memory"]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert amount(shared["sizeLimit"]) < amount(container["resources"]["limits"]["memory"])


@every_overlay
def test_the_object_store_fits_in_shared_memory(overlay: Path, build: Build) -> None:
    for cluster in clusters_in(build(overlay)):
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
            size = amount(volumes["shared-memory"]["emptyDir"]["sizeLimit"])
            assert int(group["rayStartParams"]["object-store-memory"]) < size


@every_overlay
def test_names_that_objects_refer_to_exist(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    claims = {document["metadata"]["name"] for document in of_kind(documents, "PersistentVolumeClaim")}
    accounts = {document["metadata"]["name"] for document in of_kind(documents, "ServiceAccount")}
    for pod in pods_in(documents):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used <= claims
        assert pod["spec"]["serviceAccountName"] in accounts
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
    for document in documents:
        if document["kind"] not in ("Namespace", "ResourceFlavor", "ClusterQueue"):
            assert document["metadata"]["namespace"] == "bitflux"


def labels_of_pods(documents: list[Json]) -> list[dict[str, str]]:
    """As on the cluster, where KubeRay adds the type of node."""
    found = [pod["metadata"]["labels"] for pod in pods_in(documents)]
    for cluster in clusters_in(documents):
        head, *workers_ = ray_pods(cluster)
        found.append({**head["metadata"]["labels"], "ray.io/node-type": "head"})
        found += [{**pod["metadata"]["labels"], "ray.io/node-type": "worker"} for pod in workers_]
    return found


@every_overlay
def test_policies_and_budgets_choose_the_pods_they_mean(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    pods = labels_of_pods(documents)

    def chosen(selector: Json) -> list[dict[str, str]]:
        return [labels for labels in pods if selector["matchLabels"].items() <= labels.items()]

    policies = {document["metadata"]["name"]: document["spec"] for document in of_kind(documents, "NetworkPolicy")}
    everyone = policies["bitflux-default"]
    assert len(chosen(everyone["podSelector"])) == len(pods)
    assert everyone["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in everyone
    assert len(chosen(policies["bitflux-ray"]["podSelector"])) == len(pods) - len(of_kind(documents, "CronJob"))
    assert chosen(policies["bitflux-head"]["podSelector"])
    callers = len(chosen(policies["bitflux-api-server"]["podSelector"]))
    heads = sum(cluster["enableInTreeAutoscaling"] for cluster in clusters_in(documents))
    assert bool(callers) == bool(heads or of_kind(documents, "CronJob"))
    assert ("bitflux-s3" in policies) == ("s3" in overlay.name)
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    assert {labels["ray.io/node-type"] for labels in chosen(budget["spec"]["selector"])} == {"head"}


# Stopping


@every_overlay
def test_a_stop_leaves_time_for_the_commit_in_hand(overlay: Path, build: Build) -> None:
    documents = build(overlay)
    for pod in (pod for cluster in clusters_in(documents) for pod in ray_pods(cluster)):
        (container,) = pod["spec"]["containers"]
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert int(match(r"timeout (\d+)", script)) < grace
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < grace
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] == "/api/healthz"


def test_the_hooks_find_the_driver_and_the_actors(build: Build) -> None:
    """Their patterns against the names that processes have; running them here would stop other people's jobs."""
    (job,) = jobs_in(build(KUBERAY / "overlays" / "evaluation-h100"))
    head, worker = (
        pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        for pod in ray_pods(job["rayClusterSpec"])[:2]
    )
    drivers = set(re.findall(r"-f '([^']+)'", head[-1]))
    (driver,) = drivers
    assert re.search(driver, " ".join(words(job["entrypoint"])))
    actors = [workers.ReplicaActor, workers.TextEncoderActor, workers.EvaluatorActor]
    (actor,) = re.findall(r"-f '([^']+)'", worker[-1])
    for title in [f"ray::{cls.__name__}" for cls in actors] + [f"ray::{actors[0].__name__}.draw"]:
        assert re.search(actor, title)
    for other in ["ray::IDLE", shlex.join(worker), shlex.join(head), worker[-1]]:
        assert not re.search(actor, other)
        assert not re.search(driver, other)


# The night


@pytest.fixture
def nightly(build: Build) -> list[Json]:
    return build(KUBERAY / "overlays" / "nightly")


def test_nights_never_overlap(nightly: list[Json]) -> None:
    (cron,) = of_kind(nightly, "CronJob")
    (template,) = of_kind(nightly, "RayCronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert template["spec"]["suspend"]
    assert (cron["spec"]["schedule"], cron["spec"]["timeZone"]) == (
        template["spec"]["schedule"],
        template["spec"]["timeZone"],
    )
    # A night ends on the day it began, whose date names it, and before its starter gives up.
    minute, hour = map(int, cron["spec"]["schedule"].split()[:2])
    job = template["spec"]["jobTemplate"]
    longest = (job["backoffLimit"] + 1) * (job["activeDeadlineSeconds"] + job["ttlSecondsAfterFinished"])
    assert (hour * 60 + minute) * 60 + longest < 86_400
    assert longest < cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86_400


def test_the_starter_may_do_what_it_does_and_no_more(nightly: list[Json]) -> None:
    (cron,) = of_kind(nightly, "CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    used = {(plural, "get") for plural in re.findall(r"kubectl get (\w+)", script)} | {("rayjob", "create")}
    (role,) = of_kind(nightly, "Role")
    allowed = {
        (resource.removesuffix("s"), verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == used
    assert all(rule["apiGroups"] == ["ray.io"] for rule in role["rules"])
    (binding,) = of_kind(nightly, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [pod["serviceAccountName"]]
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]


KUBECTL = """\
#!/usr/bin/env python3
# Answers as the API server would for one template and the RayJobs in $STATE.
import json, os, pathlib, sys
state, args = pathlib.Path(os.environ["STATE"]), sys.argv[1:]
(state / "calls").open("a").write(" ".join(args[:2]) + "\\n")
job = state / "rayjob.json"
if args[:2] == ["create", "-f"]:
    job.write_text(sys.stdin.read())
elif args[:2] == ["get", "raycronjob"]:
    template = json.loads((state / "template.json").read_text())
    for key in args[4].removeprefix("jsonpath={.").removesuffix("}").split("."):
        template = template[key]
    print(json.dumps(template))
elif not job.exists():
    sys.exit("not found")
elif len(args) > 3:
    phases = (state / "phases").read_text().split()
    (state / "phases").write_text(" ".join(phases[1:] or phases))
    print(phases[0], end="")
"""


def start_night(nightly: list[Json], tmp_path: Path, phases: str) -> int:
    """Runs the CronJob's script against a stand-in for kubectl."""
    (cron,) = of_kind(nightly, "CronJob")
    (template,) = of_kind(nightly, "RayCronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir(exist_ok=True)
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    (tmp_path / "template.json").write_text(json.dumps(template))
    (tmp_path / "phases").write_text(phases)
    known = {"JOB_NAME": "bitflux-nightly-29384721", "JOB_UID": "1f0c", "POLL_SECONDS": "0", "STATE": str(tmp_path)}
    path = f"{kubectl.parent}:{os.environ['PATH']}"
    return subprocess.run(
        container["command"] + container["args"], env={**known, "PATH": path}, timeout=20, stdout=subprocess.DEVNULL
    ).returncode


def test_the_starter_creates_the_night_and_follows_it(nightly: list[Json], faults: Faults, tmp_path: Path) -> None:
    assert start_night(nightly, tmp_path, "/ Initializing/ Running/RUNNING Complete/SUCCEEDED") == 0
    job = json.loads((tmp_path / "rayjob.json").read_text())
    (owner,) = job["metadata"].pop("ownerReferences")
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "bitflux-nightly-29384721", "uid": "1f0c"}
    assert job["metadata"]["name"] == "bitflux-nightly-29384721"
    (template,) = of_kind(nightly, "RayCronJob")
    assert job["metadata"]["labels"] == template["metadata"]["labels"]
    assert job["spec"] == template["spec"]["jobTemplate"]
    assert faults(job) == []


@pytest.mark.parametrize("end", ["Failed/FAILED", "Complete/STOPPED", "ValidationFailed/"])
def test_a_failed_night_fails_its_job_at_once(nightly: list[Json], tmp_path: Path, end: str) -> None:
    code = start_night(nightly, tmp_path, f"Running/RUNNING {end}")
    (cron,) = of_kind(nightly, "CronJob")
    (rule,) = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [code])


def test_a_starter_that_is_started_again_finds_its_night(nightly: list[Json], tmp_path: Path) -> None:
    (tmp_path / "rayjob.json").write_text("{}")
    assert start_night(nightly, tmp_path, "Retrying/FAILED Complete/SUCCEEDED") == 0
    assert "create" not in (tmp_path / "calls").read_text()


def test_kubernetes_leaves_the_shells_substitutions_alone(nightly: list[Json]) -> None:
    """In arguments Kubernetes replaces $(NAME) where NAME is a variable of the container, and $$ by $."""
    (cron,) = of_kind(nightly, "CronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    assert "$$" not in script
    assert not any(f"$({variable['name']})" in script for variable in container["env"])


def test_kuberays_own_schedule_replaces_the_cronjob(build: Build) -> None:
    documents = build(KUBERAY / "overlays" / "nightly-raycronjob")
    (template,) = of_kind(documents, "RayCronJob")
    assert not template["spec"]["suspend"]
    assert not of_kind(documents, "CronJob", "Role", "RoleBinding")


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


# The image


def test_the_image_is_pinned_unprivileged_and_complete() -> None:
    text = DOCKERFILE.read_text()
    declared = project()["project"]
    assert f"-f {DOCKERFILE.relative_to(REPOSITORY)}" in text
    assert f"-t {declared['name']}:{declared['version']} ." in text
    version = match(r"^ARG PYTHON=3\.(\d+)\.\d+-", text)
    assert declared["requires-python"] == ">=3.11,<3.13"
    assert int(version) in (11, 12)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:${PYTHON}"}
    assert re.search(r"^ARG UV=\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert re.search(r"^ARG RESOLVED_ON=\d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    last = text[text.rindex("FROM ") :]
    # Nothing after the user that root would have to do; started here, a job finds jobs/ and the packages.
    assert re.search(r"^USER 1000:1000$", last, re.MULTILINE)
    assert re.search(r"^WORKDIR /opt/bitflux$", last, re.MULTILINE)
    assert "PYTHONPATH=/opt/bitflux" in last
    for tool in ("procps", "kubernetes-client", "gcc"):  # pkill, kubectl, Triton's compiler
        assert tool in last


def test_the_image_holds_what_runs_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    packages = {name.split(".")[0] for name in project()["tool"]["setuptools"]["packages"]}
    assert allowed == packages | {"manifests", "pyproject.toml", "README.md"}
