"""jobs/images.py for real, over random mini models on its own Ray: a run's images go out, come back, score again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cluster.manifests import REPOSITORY
from cluster.store import ResultStore
from jobs import _ray, images

BENCHMARKS = {"geneval": "mini-geneval", "t2i-compbench": "mini-t2i-compbench"}  # by layout
SCORED = ("pair_id", "score", "correct", "reason", "detections", "image_digest", "tag", "prompt", "error")

pytestmark = pytest.mark.slow  # whole runs, each on a Ray of its own


def command(job: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPOSITORY / "jobs" / job), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def scored(output: Path, run: str, benchmark: str | None = None) -> dict:
    rows = ResultStore(str(output), run).read_rows().to_pylist()
    return {
        (row["benchmark"], row["prompt_index"], row["image_index"]): {key: row[key] for key in SCORED}
        for row in rows
        if benchmark in (None, row["benchmark"])
    }


@pytest.fixture(scope="module")
def caller(profile, tmp_path_factory) -> Path:
    """The folder that the jobs are called from, with a complete run of two images of one prompt a tag."""
    folder = tmp_path_factory.mktemp("caller")
    drawing = ("--profile", profile, "--variants", "bf16", "--run-id", "drawn", "--replicas", "1")
    drawing = (*drawing, "--benchmarks", ",".join(BENCHMARKS.values()))
    done = command("eval_all.py", *drawing, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(caller) -> Path:
    (caller / "both.yaml").write_text(f"benchmarks: [{', '.join(BENCHMARKS.values())}]")
    for layout in images.LAYOUTS:
        assert images.main([*export(caller, layout), "--to", str(caller / layout), "--json"]) == 0
    return caller


def export(caller: Path, layout: str) -> list[str]:
    run = ["--run-id", "drawn", "--output", str(caller / "results")]
    return ["export", *run, "--layout", layout, "--benchmark", BENCHMARKS[layout]]


@pytest.fixture(scope="module")
def imported(exported, profile) -> subprocess.CompletedProcess[str]:
    asked = ("--layout", "geneval", "--from", "geneval", "--benchmark", "mini-geneval", "--run-id", "imported")
    return command("images.py", "score", "--profile", profile, *asked, "--json", cwd=exported)


def test_exported_images_score_as_they_did(caller, imported):
    assert imported.returncode == 0, imported.stderr
    verdict = json.loads(imported.stdout)
    assert verdict == json.loads((caller / "results" / "run_id=imported" / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["n_expected"], verdict["n_failed"]) == ("complete", 12, 0)
    assert scored(caller / "results", "imported") == scored(caller / "results", "drawn", "mini-geneval")
    assert [model["variant"] for model in verdict["models"]] == ["imported"]
    assert "made elsewhere" in imported.stderr


def test_bad_images_cost_their_rows_only(exported, profile):
    samples = exported / "t2i-compbench" / "texture" / "samples"
    first, second = sorted(samples.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    with Image.open(second) as image:
        image.resize((200, 90)).save(second)
    asked = ("--layout", "t2i-compbench", "--from", "t2i-compbench", "--benchmark", "mini-t2i-compbench")
    done = command("images.py", "score", "--profile", profile, *asked, "--run-id", "bad", cwd=exported)
    assert done.returncode == 0, done.stderr
    assert "imported, scores in %" in done.stdout
    assert "1 images failed" in done.stderr
    rows = scored(exported / "results", "bad")
    original = scored(exported / "results", "drawn", "mini-t2i-compbench")
    changed = {place for place, row in rows.items() if row != original[place]}
    assert len(changed) == 2
    assert {rows[place]["tag"] for place in changed} == {"texture"}
    (failed,) = (place for place in changed if rows[place]["error"])
    assert first.name in rows[failed]["error"]


def test_a_run_scores_again_without_drawing(caller, profile, capsys, monkeypatch):
    # The id may be left out: it is made from the run, the evaluators and the code.
    asked = ("--run-id", "drawn", "--profile", profile)
    done = command("images.py", "rescore", *asked, cwd=caller)
    assert done.returncode == 0, done.stderr
    assert "the images are those of run drawn" in done.stdout
    (again,) = (path.name.removeprefix("run_id=") for path in (caller / "results").glob("run_id=drawn-rescored-*"))
    assert scored(caller / "results", again) == scored(caller / "results", "drawn")
    # The same command only reads what is complete.
    monkeypatch.chdir(caller)
    monkeypatch.setattr(_ray, "connected", lambda: pytest.fail("a complete run needs no Ray"))
    assert images.main(["rescore", *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == again


def test_export_says_what_it_wrote(caller, tmp_path, capsys):
    to = str(tmp_path / "new" / "folder")
    assert images.main([*export(caller, "geneval"), "--to", to]) == 0
    assert "12 images and 12 scores of 12 bf16 samples" in capsys.readouterr().out
    assert images.main([*export(caller, "geneval"), "--to", str(tmp_path / "j"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["run_id"], said["n_expected"], said["n_images"], said["n_scored"]) == ("drawn", 12, 12, 12)


SCORE = ["score", "--layout", "geneval", "--from", "geneval", "--benchmark"]
EXPORT = ["export", "--run-id", "drawn", "--layout", "geneval", "--to", "new", "--benchmark", "mini-geneval"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "export|score|rescore"),
        ([*EXPORT, "--to", "geneval"], "not empty"),
        ([*EXPORT, "--to", ""], "--to is empty"),
        (["export", "--run-id", "absent", "--layout", "geneval", "--to", "new"], "no complete run absent"),
        ([*EXPORT, "--variant", "ternary"], "the run has bf16"),
        ([*EXPORT, "--benchmark", "unknown"], "unknown benchmark 'unknown'"),
        ([*EXPORT, "--layout", "coco"], "--layout"),
        (EXPORT[:-2], "choose one with --benchmark: the run has mini-geneval, mini-t2i-compbench"),
        ([*EXPORT, "--benchmark", "t2i-compbench", "--data-dir", "absent"], "absent"),
        ([*SCORE, "unknown"], "unknown benchmark 'unknown'"),
        ([*SCORE, "mini-geneval", "--from", "absent"], "no such folder"),
        ([*SCORE, "mini-geneval", "--from", "results"], "none of its"),
        ([*SCORE, "mini-geneval", "--variant", "a/b"], "--variant"),
        ([*SCORE, "both.yaml"], "both.yaml stands for mini-geneval, mini-t2i-compbench: name one of them"),
        ([*SCORE, "mini-geneval", "--layout", "t2i-compbench", "--their-scores"], "none of its"),
        ([*SCORE, "mini-geneval", "--variant", "detector"], "--variant detector"),
        ([*SCORE, "mini-geneval", "--profile", "unknown"], "unknown profile 'unknown'"),
        (["rescore", "--run-id", "absent"], "no complete run absent"),
        (["rescore", "--run-id", "drawn", "--new-run-id", "drawn"], "--new-run-id drawn is the run itself"),
    ],
)
def test_mistakes_are_one_line(exported, profile, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(exported)
    if arguments and arguments[0] != "export" and "--profile" not in arguments:
        arguments = [*arguments, "--profile", profile]
    before = sorted((exported / "results").iterdir())
    assert images.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert sorted((exported / "results").iterdir()) == before
    assert not (exported / "new").exists()
