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


def test_the_official_mode_plans_what_it_can_score(capsys):
    assert eval_all.main(["--dry-run", "--mode", "official", "--benchmarks", "mini-geneval"]) == 0
    assert "mini-geneval" in capsys.readouterr().out


@pytest.fixture
def measured(tmp_path):
    """Writes a table as jobs/bench.py images does, with other values for some keys; the file's path."""

    def write(**changes: object) -> str:
        row = {"mode": "ternary", "resolution": 128, "text_s": 0.5, "denoise_s": 4.0, "decode_s": 1.5, "error": None}
        rows = [
            {**row, "steps": 30, "denoise_s": 3.0},
            {**row, "steps": 50},
            {**row, "steps": 20, "mode": "bf16", "resolution": 64},
        ]
        path = tmp_path / "images.json"
        path.write_text(json.dumps({"section": "images", "settings": {"tiny": False}, "rows": rows, **changes}))
        return str(path)

    return write


def test_measured_seconds_take_the_place_of_declared_ones(capsys, measured):
    """The row with the nearest number of steps counts, in proportion; what was not measured stays declared."""
    assert eval_all.main(["--dry-run", "--json", "--measured", measured()]) == 0
    captured = capsys.readouterr()
    bf16, ternary = json.loads(captured.out)["costs"]
    declared_s = 128 * 128 / 1e6 * 20 * 1.0
    assert (bf16["measured"], bf16["draw_s"]) == (False, pytest.approx(declared_s))
    assert (ternary["measured"], ternary["draw_s"]) == (True, pytest.approx(0.5 + 3.0 * 20 / 30 + 1.5))
    assert ternary["hours"] == pytest.approx(252 * (4.0 + 0.015) / 3600)
    assert "4.00 (measured)" in captured.err
    assert "0.33 (declared)" in captured.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"section": "kernels"}, "holds no images of full size"),
        ({"settings": {"tiny": True}}, "holds no images of full size"),
        ({"rows": []}, "holds no image of 128x128 pixels"),
        ({"rows": [{"steps": 20}]}, "is no table of images (KeyError: 'error')"),
    ],
)
def test_a_file_that_measures_something_else_is_refused(capsys, measured, changes, words):
    assert eval_all.main(["--dry-run", "--measured", measured(**changes)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "images.json" in captured.err


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
