"""The main job for real, over random mini models on its own Ray: complete, read again, stopped, damaged."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.manifests import REPOSITORY
from jobs import _ray, eval_all, query

TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
CATEGORIES = ["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
BENCHMARKS = ["--benchmarks", "mini-geneval,mini-t2i-compbench"]
COMPARISON = {
    "benchmark",
    "tag",
    "baseline",
    "variant",
    "baseline_score",
    "variant_score",
    "delta",
    "ci_low",
    "ci_high",
    "standard_error",
    "detectable",
    "n_expected",
    "n_scored",
    "n_failed",
}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPOSITORY / "jobs" / "eval_all.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(profile, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that the job was called from, and what it said."""
    folder = tmp_path_factory.mktemp("caller")
    return folder, command("--profile", profile, "--replicas", "1", *BENCHMARKS, cwd=folder)


def test_a_run_ends_in_a_table(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "results").glob("run_id=*")
    assert "ternary against bf16" in done.stdout
    for words in (*TAGS, *CATEGORIES, "overall", "resident bytes, CPU", f"results: {run}"):
        assert words in done.stdout
    assert "56/56 images" in done.stderr
    assert (run / "_manifest.json").is_file()
    verdict = json.loads((run / "verdict.json").read_text())
    assert json.loads((folder / "results" / "verdict.json").read_text()) == verdict
    assert (verdict["verdict"], verdict["exit_code"], verdict["reason"]) == ("complete", 0, None)
    assert (verdict["n_expected"], verdict["n_done"], verdict["n_failed"]) == (56, 56, 0)
    assert verdict["results"] == str(run)
    assert verdict["started"] <= verdict["ended"]
    assert [(s["variant"], s["tag"]) for s in verdict["scores"]] == [
        (variant, tag) for variant in ("bf16", "ternary") for tag in (*TAGS, "overall", *CATEGORIES, "overall")
    ]
    assert all(-1 <= s["score"] <= 1 and s["n_scored"] == s["n_expected"] for s in verdict["scores"])


def test_the_same_command_reads_the_run_and_json_says_all_of_it(finished, profile, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_ray, "connected", lambda: pytest.fail("a complete run needs no Ray"))
    assert eval_all.main(["--profile", profile, "--json", *BENCHMARKS]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((folder / "results" / "verdict.json").read_text())
    assert said["verdict"] == "complete"
    assert Path(said["results"]) == folder / "results" / f"run_id={said['run_id']}"
    assert [(c["tag"], c["n_expected"], c["n_failed"]) for c in said["comparisons"]] == [
        *((tag, 2, 0) for tag in TAGS),
        ("overall", 12, 0),
        *((tag, 2, 0) for tag in CATEGORIES),
        ("overall", 16, 0),
    ]
    assert all(set(comparison) == COMPARISON for comparison in said["comparisons"])
    assert [model["variant"] for model in said["models"]] == ["bf16", "ternary"]
    bf16, ternary = said["models"]
    assert set(bf16) == {"variant", "storage_bytes", "peak_memory_bytes", "seconds_per_image", "fingerprint"}
    assert bf16["storage_bytes"] > 4 * ternary["storage_bytes"]
    assert bf16["peak_memory_bytes"] > 4 * ternary["peak_memory_bytes"]
    assert bf16["fingerprint"] != ternary["fingerprint"]


def test_the_results_answer_questions(finished, capsys):
    sql = "SELECT count(DISTINCT sample_id), count(DISTINCT pair_id), count(image_digest), count(error) FROM results"
    assert query.main([sql, "--output", str(finished[0] / "results"), "--csv"]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[1:] == [["56", "28", "56", "0"]]


def test_every_image_is_compared_with_its_twin(finished, capsys):
    verdict = json.loads((finished[0] / "results" / "verdict.json").read_text())
    found = {(one["variant"], one["benchmark"]): (one["n_compared"], one["n_expected"]) for one in verdict["fidelity"]}
    assert found == {("ternary", "mini-geneval"): (12, 12), ("ternary", "mini-t2i-compbench"): (16, 16)}
    assert all(one["measures"]["psnr_db"][0] < 60 for one in verdict["fidelity"])
    assert "signal over error in dB" in finished[1].stdout
    sql = "SELECT count(psnr_db), count(f.error) FROM fidelity f JOIN results r USING (pair_id, variant)"
    assert query.main([sql, "--output", str(finished[0] / "results"), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "28,0"


def test_a_fresh_run_has_a_name_of_its_own_and_one_that_stopped_says_so(finished, profile, monkeypatch, capsys):
    """The run is stopped before its first image: no Ray, no replica."""
    folder, _ = finished
    before = {path.name for path in (folder / "results").iterdir()}

    from cluster.audit import metrics
    from cluster.run import RunSummary

    def stopped(plan, profile, models, store, **_):
        return RunSummary(False, "stopped by SIGTERM", plan.n_samples, 0, 0, metrics(plan, {}))

    monkeypatch.chdir(folder)
    monkeypatch.setattr("cluster.run.run", stopped)
    monkeypatch.setattr("cluster.output.alive_nodes", list)
    monkeypatch.setattr(_ray, "connected", contextlib.nullcontext)
    assert eval_all.main(["--profile", profile, "--fresh", "--json"]) == 3
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said == json.loads((folder / "results" / "verdict.json").read_text())
    assert (said["verdict"], said["resumable"], said["reason"]) == ("incomplete", True, "stopped by SIGTERM")
    assert said["run_id"] not in before
    assert {path.name for path in (folder / "results").iterdir()} == before | {f"run_id={said['run_id']}"}
    assert said["comparisons"][-1]["n_failed"] == 12
    assert said["comparisons"][-1]["delta"] is None
    assert "incomplete: stopped by SIGTERM" in captured.err


@pytest.mark.slow  # a Ray of its own, only to start one actor
def test_a_truncated_checkpoint_is_refused_in_one_line(models, make_profile, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(models / "ternary", damaged)
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    profile = make_profile({"ternary": str(damaged)}, variants=["ternary"])
    done = command("--profile", profile, "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert weights.name in line
    assert "ray::" not in line
