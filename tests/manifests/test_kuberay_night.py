"""The nightly CronJob: one night at a time, started and followed by a pod with few rights."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from kuberay_objects import (
    KUBERAY,
    Build,
    Faults,
    Json,
    of_kind,
)


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
