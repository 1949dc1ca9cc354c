"""The evaluators on scenes of which the truth is known."""

import json

from jobs.validity import main


def test_genevals_evaluator_is_seldom_wrong_and_says_so(capsys):
    assert main(["--benchmark", "geneval", "--limit", "8", "--json"]) == 0
    captured = capsys.readouterr()
    rates = json.loads(captured.out)
    assert [rate["tag"] for rate in rates][-1] == "overall"
    assert {rate["prompts"] for rate in rates[:-1]} == {8}
    assert rates[-1]["prompts"] == 48
    assert max(rates[-1]["false_fail"], rates[-1]["false_pass"]) <= 0.05
    assert "false pass" in captured.err


def test_models_that_are_missing_are_named(make_profile, capsys):
    path = make_profile({"vqa": "absent/vqa"})
    assert main(["--profile", path, "--benchmark", "t2i-compbench"]) == 2
    assert "vqa absent/vqa" in capsys.readouterr().err


def test_both_benchmarks_of_any_profile_are_judged(profile, capsys):
    """Random models are wrong about everything; the table is whole all the same."""
    assert main(["--profile", profile, "--limit", "1"]) == 0
    out = capsys.readouterr().out
    for tag in ("counting", "3d_spatial", "complex", "overall"):
        assert tag in out
