"""The overlays as kubectl builds them, and schemas that refuse every field they do not name."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Json = dict[str, Any]

REPOSITORY = Path(__file__).parents[2]
CRDS = REPOSITORY.parent / "shared" / "kuberay-crds"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are megabytes: ten times faster in C

STRING = {"type": "string"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
INTEGER = {"type": "integer"}
BOOLEAN = {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}


def listed(items: Json) -> Json:
    return {"type": "array", "items": items, "minItems": 1}


def record(required: str = "", **properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def closed(schema: Json) -> Json:
    """The schema with unknown fields refused wherever it names fields, but where Kubernetes keeps unknown ones."""
    found = dict(schema)
    if "properties" in found:
        found["properties"] = {name: closed(child) for name, child in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = closed(found[key])
    return found


METADATA = record("name", name={**NAME, "maxLength": 253}, namespace=NAME, labels=STRINGS, annotations=STRINGS)


def definition(api_version: str, kind: str, **parts: Json) -> Json:
    """A whole object: `parts` are its fields beside the three that all have."""
    required = " ".join(["apiVersion kind metadata", *parts])
    return record(required, apiVersion={"const": api_version}, kind={"const": kind}, metadata=METADATA, **parts)


def _crd(plural: str) -> Json:
    document = yaml.load((CRDS / f"ray.io_{plural}.yaml").read_text(), LOADER)
    (version,) = (version for version in document["spec"]["versions"] if version["name"] == "v1")
    return closed(version["schema"]["openAPIV3Schema"])


@cache
def schemas() -> dict[str, Json]:
    """By kind. What Kubernetes' own kinds share with a pod or a network policy comes from KubeRay's definitions."""
    crds = {kind: _crd(plural) for kind, plural in RAY_KINDS.items()}
    cluster = crds["RayCluster"]["properties"]["spec"]["properties"]
    pod = crds["RayJob"]["properties"]["spec"]["properties"]["submitterPodTemplate"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    traffic = cluster["networkPolicy"]["properties"]["head"]["properties"]
    selector = traffic["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"]

    ray = {kind: definition("ray.io/v1", kind, spec=crd["properties"]["spec"]) for kind, crd in crds.items()}
    exit_codes = record("operator values", containerName=STRING, operator=STRING, values=listed(INTEGER))
    job = record(
        "template",
        backoffLimit=INTEGER,
        activeDeadlineSeconds=INTEGER,
        podFailurePolicy=record("rules", rules=listed(record("action", action=STRING, onExitCodes=exit_codes))),
        template=pod,
    )
    cron_job = record(
        "schedule jobTemplate concurrencyPolicy",
        schedule=STRING,
        timeZone=STRING,
        concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
        startingDeadlineSeconds=INTEGER,
        successfulJobsHistoryLimit=INTEGER,
        failedJobsHistoryLimit=INTEGER,
        jobTemplate=record("spec", spec=job),
    )
    policy = record(
        "podSelector policyTypes",
        podSelector=selector,
        policyTypes=listed({"enum": ["Ingress", "Egress"]}),
        ingress=traffic["ingressRules"],
        egress=traffic["egressRules"],
    )
    rule = record(
        "apiGroups resources verbs",
        **dict.fromkeys(("apiGroups", "resources", "resourceNames", "verbs"), listed(STRING)),
    )
    reference = record("apiGroup kind name", apiGroup=STRING, kind=STRING, name=NAME)
    subject = record("kind name namespace", kind={"const": "ServiceAccount"}, name=NAME, namespace=NAME)
    toleration = pod["properties"]["spec"]["properties"]["tolerations"]["items"]
    quota = record("name nominalQuota", name=STRING, nominalQuota=STRING)
    flavor = record("name resources", name=NAME, resources=listed(quota))
    group = record("coveredResources flavors", coveredResources=listed(STRING), flavors=listed(flavor))
    queue = record(
        "namespaceSelector resourceGroups",
        namespaceSelector=selector,
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        resourceGroups=listed(group),
    )
    rbac, kueue = "rbac.authorization.k8s.io/v1", "kueue.x-k8s.io/v1beta2"
    account = definition("v1", "ServiceAccount", automountServiceAccountToken=BOOLEAN)
    flavors = definition(kueue, "ResourceFlavor")
    flavors["properties"]["spec"] = record(nodeLabels=STRINGS, tolerations=listed(toleration))
    return {
        **ray,
        "Namespace": definition("v1", "Namespace"),
        "ServiceAccount": account,
        "PersistentVolumeClaim": definition("v1", "PersistentVolumeClaim", spec=claim),
        "CronJob": definition("batch/v1", "CronJob", spec=cron_job),
        "NetworkPolicy": definition("networking.k8s.io/v1", "NetworkPolicy", spec=policy),
        "PodDisruptionBudget": definition(
            "policy/v1",
            "PodDisruptionBudget",
            spec=record("minAvailable selector", minAvailable=INTEGER, selector=selector),
        ),
        "Role": definition(rbac, "Role", rules=listed(rule)),
        "RoleBinding": definition(rbac, "RoleBinding", roleRef=reference, subjects=listed(subject)),
        "ResourceFlavor": flavors,
        "ClusterQueue": definition(kueue, "ClusterQueue", spec=queue),
        "LocalQueue": definition(kueue, "LocalQueue", spec=record("clusterQueue", clusterQueue=NAME)),
    }


RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}


@cache
def _validator(kind: str) -> Any:
    return jsonschema.Draft202012Validator(schemas()[kind])


@pytest.fixture(scope="session")
def faults() -> Callable[[Json], list[str]]:
    """What is wrong with an object, a line each."""
    if not CRDS.is_dir():
        message = f"{CRDS} is absent"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)

    def check(document: Json) -> list[str]:
        kind = document.get("kind")
        if kind not in schemas():
            return [f"kind {kind} is unknown"]
        errors: Iterator[Any] = _validator(kind).iter_errors(document)
        return [f"{kind} {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]

    return check


@cache
def _build(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.dumps([document for document in yaml.load_all(done.stdout, LOADER) if document])


@pytest.fixture(scope="session")
def build() -> Callable[[Path], list[Json]]:
    """The objects of a kustomization, anew on each call."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is absent")
    return lambda folder: json.loads(_build(folder))
