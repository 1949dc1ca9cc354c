"""Bad input to the main job: one line that names the thing and the remedy, exit code 2, nothing written over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.manifests import REPOSITORY
from jobs import eval_all


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs the job in an empty folder, expects a refusal, and returns its one line."""
    folder = tmp_path / "caller"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> str:
        assert eval_all.main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert list(folder.iterdir()) == []
        return captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile", "maxi"], "unknown profile 'maxi': choose one of flux-dev, mini"),
        (["--profile", "absent.yaml"], "absent.yaml: no such file"),
        (
            ["--benchmarks", "genival"],
            "unknown benchmark 'genival': choose one of all, calibration, geneval, mini-geneval",
        ),
        (["--benchmarks", "mini-geneval,mini-geneval"], "mini-geneval named more than once"),
        (["--benchmarks", ""], "--benchmarks"),
        (["--variants", "bf17"], "unknown variant 'bf17': choose from bf16, ternary"),
        (["--variants", "bf16,,ternary"], "'bf16,,ternary' is not a list of names"),
        (["--mode", "official"], "t2i-compbench-official needs UniDet's own weights"),
        (["--dry-run", "--mode", "official"], "name the mode compatible or corrected"),
        (["--check-models", "--mode", "official"], "name the mode compatible or corrected"),
        (["--limit", "0"], "--limit: '0' is not a whole number of at least 1"),
        (["--limit", "ten"], "--limit: 'ten'"),
        (["--images-per-prompt", "-1"], "--images-per-prompt"),
        (["--replicas", "1.5"], "--replicas: '1.5'"),
        (["--run-id", "../other"], "--run-id: '../other' may hold only"),
        (["--bogus"], "--bogus"),
        (["--output"], "--output"),
        (["--output", ""], "--output is empty"),
        (["--profile", "flux-dev", "--data-dir", "absent"], "absent/geneval/evaluation_metadata.jsonl"),
    ],
)
def test_mistakes_on_the_command_line(refusal, arguments, named):
    assert named in refusal(*arguments)


def test_missing_models_are_all_named_with_how_to_get_them(refusal, make_profile):
    missing = {"pipeline": "nobody/FLUX.0", "ternary": "absent/ternary", "detector": "absent/dir/detector"}
    path = make_profile(missing)
    message = refusal("--profile", path)
    assert "pipeline nobody/FLUX.0 (get it: hf download nobody/FLUX.0" in message
    assert "ternary absent/ternary (make it: python jobs/quantize.py" in message
    assert "detector absent/dir/detector (no folder of that name holds a config.json" in message
    assert "clip" not in message.replace("jobs", "")


def test_full_precision_alone_needs_no_ternary_weights(refusal, make_profile):
    path = make_profile({"pipeline": "absent/flux", "ternary": None})
    assert "ternary" not in refusal("--profile", path, "--variants", "bf16")
    assert "models.ternary" in refusal("--profile", path)


def test_a_model_that_the_profile_does_not_name_is_missing_like_any_other(make_profile, capsys):
    path = make_profile({"ternary": "absent/ternary"}, mode="judge", benchmarks=["mini-t2i-compbench"])
    assert eval_all.main(["--check-models", "--profile", path]) == 2
    captured = capsys.readouterr()
    said = " ".join(captured.out.replace("│", " ").split())
    for words in (
        "pipeline",
        "make it: python jobs/quantize.py",
        "judge",
        "add models.judge to the",
        "llava-hf/llava",
        "language",
    ):
        assert words in said
    assert captured.err == ""


def test_a_run_names_models_without_a_name_and_missing_ones_together(refusal, make_profile):
    missing = {"pipeline": "nobody/FLUX.0", "ternary": "absent/ternary"}
    path = make_profile(missing, mode="judge", benchmarks=["mini-t2i-compbench"])
    message = refusal("--profile", path)
    for words in ("hf download nobody/FLUX.0", "judge (not named) (add models.judge to the profile", "quantize.py"):
        assert words in message


def write_workload(folder: Path, *prompts: str, label: str = "circle", **changes: object) -> str:
    include = [{"class": label, "count": 1}]
    lines = [json.dumps({"tag": "colors", "include": include, "prompt": prompt}) for prompt in prompts]
    (folder / "own.jsonl").write_text("\n".join(lines))
    manifest = {"evaluator": "mini-geneval", "parser": "geneval", "files": [{"path": "own.jsonl"}]}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**manifest, "images_per_prompt": 1, "seed": 0, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (("a circle", ""), "own.jsonl line 2: empty prompt"),
        (("a circle", "a ring", "a circle"), "own.jsonl line 3: the prompt 'a circle' stands already in"),
        (("a circle " * 40,), "16"),
    ],
)
def test_faulty_prompts_of_the_users_own(refusal, profile, tmp_path, prompts, named):
    workload = write_workload(tmp_path, *prompts)
    assert named in refusal("--profile", profile, "--benchmarks", workload, "--output", str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("faults", "named"),
    [({"label": "dog"}, "prompt 'a circle': "), ({"evaluator": "vqa"}, "no evaluator 'vqa': choose one of geneval")],
)
def test_a_workload_that_its_evaluator_cannot_judge(refusal, profile, tmp_path, faults, named):
    workload = write_workload(tmp_path, "a circle", **faults)
    assert named in refusal("--profile", profile, "--benchmarks", workload, "--output", str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_an_output_that_cannot_be_written(refusal, profile, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in refusal("--profile", profile, "--output", str(tmp_path / "file" / "results"))
    assert (tmp_path / "file").read_text() == "kept"
    assert "no-such-protocol" in refusal("--profile", profile, "--output", "no-such-protocol://results")


def test_a_submitted_job_needs_an_output_that_every_node_reaches(refusal, profile, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "--output" in refusal("--profile", profile)
    assert "--output" in refusal("--profile", profile, "--output", "results")


def test_a_run_id_with_another_plan_is_kept(refusal, profile, tmp_path):
    plan = tmp_path / "results" / "run_id=mine" / "_plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text('{"digest": "another"}')
    arguments = ("--profile", profile, "--output", str(tmp_path / "results"), "--run-id", "mine")
    assert "mine" in refusal(*arguments)
    assert "--fresh" in refusal(*arguments, "--fresh")
    assert plan.read_text() == '{"digest": "another"}'
    assert list(plan.parent.iterdir()) == [plan]


def test_the_command_itself_refuses_without_a_traceback(tmp_path):
    command = [sys.executable, str(REPOSITORY / "jobs" / "eval_all.py"), "--profile", "maxi"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown profile 'maxi'")
    assert done.stderr.count("\n") == 1
