"""What every overlay's pods may do, use and reach, and how they stop."""

import re
import shlex
import subprocess
from pathlib import Path

from kuberay_objects import (
    KUBERAY,
    MODELS,
    Build,
    Json,
    amount,
    clusters_in,
    containers_in,
    every_overlay,
    jobs_in,
    match,
    of_kind,
    pods_in,
    ray_pods,
    words,
)

from cluster import workers


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
