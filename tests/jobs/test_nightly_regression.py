"""The nightly job: bad input in one line, and the self-test over the mini FLUX, drawn for real."""

import json

import pytest
import yaml

from cluster.manifests import MANIFESTS
from jobs import _ray, nightly_regression


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs the job, which must answer in one line, before it starts Ray; the line."""
    monkeypatch.setattr(_ray, "connected", lambda: pytest.fail("bad input was not noticed before Ray started"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        assert nightly_regression.main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
        return captured.err

    return call


@pytest.fixture
def gates(tmp_path):
    """Writes the mini's gates with other values for some keys; the file's path."""

    def write(**changes: object) -> str:
        content = yaml.safe_load((MANIFESTS / "gates" / "mini.yaml").read_text())
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return str(path)

    return write


SCORE = {"against": "accepted", "allowed_drop": 1.0, "confidence": 0.9, "smallest_n": 4}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"scores": []}, "scores:"),
        ({"scores": [{**SCORE, "confidence": 95}]}, "scores.0.confidence:"),
        ({"scores": [SCORE, {**SCORE, "allowed_drop": "much"}]}, "scores.1.allowed_drop:"),
        ({"scores": [{**SCORE, "tag": "colours"}]}, "scores.0.tag:"),
        ({"scores": [{**SCORE, "benchmark": "mini"}]}, "scores.0.benchmark:"),
        ({"latency": {"against_accepted": 0}}, "latency.against_accepted:"),
        ({"speed": 1}, "speed:"),
    ],
)
def test_a_bad_gates_file_is_answered_with_file_key_and_remedy(refused, gates, changes, key):
    path = gates(**changes)
    line = refused("--gates", path)
    assert path in line
    assert key in line
    assert "correct it" in line or "leave the key out" in line


def test_unknown_gates_and_a_profile_without_gates(refused, make_profile):
    assert "choose one of flux-dev, mini" in refused("--gates", "strict")
    assert "name a file with --gates" in refused("--profile", make_profile())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--variants", "bf16"), "no ternary variant to test"),
        (("--variants", "ternery"), "unknown variant 'ternery'"),
        (("--accept", "last-week"), "no such night"),
        (("--accept", "n1", "--night", "n2"), "leave out --night"),
        (("--self-test", "--accept"), "leave out --accept"),
        (("--limit", "0"), "--limit"),
    ],
)
def test_bad_options(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.slow  # five runs on a Ray of their own
@pytest.mark.timeout(1200)
def test_the_self_test_passes_on_the_mini_flux(tmp_path, capsys):
    arguments = ["--self-test", "--limit", "1", "--images-per-prompt", "1", "--output", str(tmp_path), "--json"]
    assert nightly_regression.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["nights"] == ["reference", "again", "damaged"]
    assert "caught: fidelity" in said["message"]
