"""--dry-run: the plan of any profile, without weights, results or Ray."""

import json
import os

import pytest

from cluster.manifests import REPOSITORY
from jobs import eval_all

UPSTREAM = REPOSITORY.parent / "shared" / "benchmarks"


def test_the_default_plan_draws_252_pairs_of_both_benchmarks(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert eval_all.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "504 images" in printed
    for words in ("mini-geneval", "color_attr", "mini-t2i-compbench", "3d_spatial", "252 distinct prompts"):
        assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_options_change_the_plan(capsys):
    arguments = ["--dry-run", "--json", "--limit", "2", "--images-per-prompt", "3", "--variants", "bf16,ternary-int8"]
    assert eval_all.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {name: len(tags) for name, tags in plan["images_by_tag"].items()} == {
        "mini-geneval": 6,
        "mini-t2i-compbench": 8,
    }
    assert {count for tags in plan["images_by_tag"].values() for count in tags.values()} == {6}
    assert plan["variants"] == ["bf16", "ternary-int8"]
    assert (plan["images"], plan["distinct_prompts"]) == (168, 28)


def test_flux_dev_needs_no_weights_to_plan(capsys):
    if not UPSTREAM.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{UPSTREAM} is missing")
        pytest.skip(f"{UPSTREAM} is absent")
    assert eval_all.main(["--dry-run", "--json", "--profile", "flux-dev", "--data-dir", str(UPSTREAM)]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert sum(plan["images_by_tag"]["geneval"].values()) == 2212
    assert plan["sampling"]["steps"] == 50
    assert "assumed: guidance 3.5" in captured.err
