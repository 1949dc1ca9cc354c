"""jobs/quantize.py: what it writes loads, and nothing is written over."""

import pytest
import torch

from bitflux_core.checkpoint import load_ternary
from cluster.profile import load_profile
from jobs import quantize


def test_a_written_checkpoint_loads(models, tmp_path, profile, capsys):
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", str(tmp_path / "twin")]) == 0
    assert "ternary" in capsys.readouterr().out
    assert load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu").config.num_layers == 2


def test_a_folder_in_use_is_left_alone(models, profile, capsys, monkeypatch):
    monkeypatch.setattr("bitflux_core.quantizer.quantize.quantize", lambda *_: pytest.fail("began the work"))
    before = {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()}
    assert quantize.main(["--profile", profile]) == 2
    assert "ternary is in use" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()} == before


def test_a_profile_without_a_place_for_the_twin(models, make_profile, capsys):
    assert quantize.main(["--profile", make_profile({"ternary": None})]) == 2
    assert "give --output a folder" in capsys.readouterr().err


def test_an_unknown_initialisation_is_refused(capsys):
    assert quantize.main(["--init", "magic"]) == 2
    assert "--init" in capsys.readouterr().err


def test_calibration_without_prompts_is_refused(profile, tmp_path, capsys):
    assert quantize.main(["--profile", profile, "--output", str(tmp_path / "twin")]) == 2
    assert "give --calibration a file" in capsys.readouterr().err


def test_a_file_of_too_few_prompts_is_refused(profile, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a circle\n\na photo of a circle\n")
    arguments = ["--calibration", str(prompts), "--output", str(tmp_path / "twin")]
    assert quantize.main(["--profile", profile, *arguments]) == 2
    assert "holds 1 prompts of 64" in capsys.readouterr().err
    assert not (tmp_path / "twin.partial").exists()


def test_prompts_of_the_mini_world_follow_the_seed():
    profile = load_profile("mini")
    first, again, other = (
        quantize.calibration_prompts(profile, quantize.parse(["--seed", seed])) for seed in ("0", "0", "1")
    )
    assert len(first) == 64
    assert first == again != other
