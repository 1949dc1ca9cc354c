"""The verdict file of eval_all, for every way that a job ends; an earlier job's never stands for the present one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from bitflux_core.errors import UserError
from cluster.manifests import REPOSITORY
from cluster.store import ResultStore
from jobs import _verdict, eval_all
from jobs._cli import exit_code_of
from jobs._verdict import Verdict


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path) -> str:
    return str(tmp_path / "results") if request.param == "local" else f"memory://{tmp_path.name}/results"


def read(output: str, run: str = "") -> dict:
    with fsspec.open(f"{output}/{run}verdict.json") as file:
        return json.load(file)


def begun(output: str, verdict: Verdict) -> ResultStore:
    store = ResultStore(output, "r1")
    verdict.begin(store)
    return store


def ended(output: str, error: BaseException) -> dict:
    """The verdict of a job that ends in `error`, which its command line answers as well."""

    def job() -> int:
        with Verdict(output) as verdict:
            begun(output, verdict)
            raise error

    try:
        exit_code = exit_code_of(job)
    except type(error):
        exit_code = 1  # Python's own, for a traceback
    assert read(output) == read(output, "run_id=r1/")
    assert read(output)["exit_code"] == exit_code
    return read(output)


def test_a_job_that_ends(output):
    with Verdict(output) as verdict:
        store = begun(output, verdict)
        assert read(output) == read(output, "run_id=r1/")
        running = read(output)
        verdict.end(0, None, {"n_done": 3})
    assert (running["verdict"], running["exit_code"], running["resumable"]) == ("incomplete", 3, True)
    assert "has not ended" in running["reason"]
    done = read(output)
    assert done == read(output, "run_id=r1/")
    assert (done["verdict"], done["exit_code"], done["resumable"], done["reason"]) == ("complete", 0, False, None)
    assert (done["run_id"], done["results"], done["n_done"]) == ("r1", store.run_uri, 3)


@pytest.mark.parametrize(
    ("error", "verdict", "reason"),
    [
        (UserError("the checkpoint is damaged:\n copy it again"), "error", "the checkpoint is damaged: copy it again"),
        (KeyboardInterrupt(), "incomplete", "interrupted"),
        (SystemExit(signal.SIGTERM), "incomplete", "stopped by SIGTERM"),
        (ZeroDivisionError("by zero"), "incomplete", "ZeroDivisionError: by zero"),
    ],
)
def test_a_job_that_an_error_ends(output, error, verdict, reason):
    found = ended(output, error)
    assert (found["verdict"], found["reason"]) == (verdict, reason)
    assert found["resumable"] == (verdict == "incomplete")


def test_no_verdict_outlives_the_next_jobs_beginning(output):
    with Verdict(output) as verdict:
        begun(output, verdict)
        verdict.end(0, None)
    Verdict(output).__enter__()  # and is killed before it knows its run
    assert read(output)["verdict"] == "incomplete"
    assert read(output)["run_id"] is None
    assert read(output, "run_id=r1/")["verdict"] == "complete"  # that run is no other than it was
    begun(output, Verdict(output))
    assert read(output, "run_id=r1/")["verdict"] == "incomplete"


def test_a_mistake_makes_no_output(output):
    def job() -> int:
        with Verdict(output):
            raise UserError("unknown profile")

    assert exit_code_of(job) == 2
    assert not fsspec.url_to_fs(output)[0].exists(output)


def test_a_mistake_replaces_an_earlier_verdict(tmp_path, profile, capsys):
    output = str(tmp_path)
    with Verdict(output) as verdict:
        verdict.end(0, None)
    assert eval_all.main(["--profile", profile, "--output", output, "--variants", "bf17"]) == 2
    found = read(output)
    assert (found["verdict"], found["exit_code"], found["resumable"]) == ("error", 2, False)
    assert capsys.readouterr().err == f"error: {found['reason']}\n"


def test_a_run_of_another_plan_keeps_its_verdict(tmp_path, profile, capsys):
    output = str(tmp_path)
    plan = tmp_path / "run_id=r1" / "_plan.json"
    plan.parent.mkdir()
    plan.write_text('{"digest": "another"}')
    with Verdict(output) as verdict:
        begun(output, verdict)
        verdict.end(0, None)
    assert eval_all.main(["--profile", profile, "--output", output, "--run-id", "r1"]) == 2
    assert read(output)["verdict"] == "error"
    assert read(output, "run_id=r1/")["verdict"] == "complete"


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    output = str(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Verdict(output) as verdict:
        monkeypatch.setattr(_verdict, "overwrite", full)
        with pytest.raises(UserError, match="No space left"):
            verdict.end(0, None)
    assert read(output)["verdict"] == "incomplete"
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


def test_the_submission_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    with Verdict(str(tmp_path)) as verdict:
        assert verdict.end(0, None)["submission_id"] == "raysubmit_1"


def test_sigterm_before_the_first_image_is_a_verdict(tmp_path, profile):
    """Stopped while it plans and looks at the models, before Ray is there."""
    command = [sys.executable, str(REPOSITORY / "jobs" / "eval_all.py"), "--profile", profile, "--output", tmp_path]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path(tmp_path, "verdict.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 3, said
    assert "Traceback" not in said
    found = read(str(tmp_path))
    assert (found["reason"], found["exit_code"], found["pid"]) == ("stopped by SIGTERM", 3, job.pid)
    assert found["pid"] != os.getpid()
