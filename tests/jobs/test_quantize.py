"""jobs/quantize.py: what it writes loads, and nothing is written over."""

import pytest
import torch

from bitflux_core.checkpoint import load_ternary
from jobs import quantize


def test_a_written_checkpoint_loads(models, tmp_path, profile, capsys):
    assert quantize.main(["--profile", profile, "--method", "absmean", "--output", str(tmp_path / "twin")]) == 0
    assert "ternary" in capsys.readouterr().out
    assert load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu").config.num_layers == 2


def test_a_folder_in_use_is_left_alone(models, profile, capsys, monkeypatch):
    monkeypatch.setattr("bitflux_core.loading.load_transformer", lambda *_, **__: pytest.fail("began the work"))
    before = {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()}
    assert quantize.main(["--profile", profile]) == 2
    assert "ternary is in use" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()} == before


def test_a_profile_without_a_place_for_the_twin(models, make_profile, capsys):
    assert quantize.main(["--profile", make_profile({"ternary": None})]) == 2
    assert "give --output a folder" in capsys.readouterr().err


def test_an_unknown_method_is_refused(capsys):
    assert quantize.main(["--method", "magic"]) == 2
    assert "--method" in capsys.readouterr().err
