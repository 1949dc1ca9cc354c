"""jobs/ablate.py: a table of the rows asked for, which a second run takes from the folder."""

import json

import pytest

from jobs import ablate


@pytest.fixture
def options(profile, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a circle\na photo of a star\n")
    calibration = ["--calibration", str(prompts), "--calibration-prompts", "2"]
    return ["--profile", profile, "--output", str(tmp_path / "out"), *calibration]


def test_rows_are_measured_once(options, tmp_path, capsys, monkeypatch):
    rows = ["--rows", "absmean,least squares with bf16 modulation"]
    assert ablate.main([*options, *rows]) == 0
    assert "PSNR to the teacher" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / ablate.RESULTS).read_text())
    assert list(document["rows"]) == ["absmean", "least squares with bf16 modulation"]
    for row in document["rows"].values():
        assert 0 < row["psnr_db"] < 100
        assert 0 <= row["score"] <= 1
    sizes = [row["storage_bytes"] for row in document["rows"].values()]
    assert sizes[0] < sizes[1]
    monkeypatch.setattr("bitflux_core.quantizer.ablation.Ablation.transformer", lambda *_: pytest.fail("made again"))
    assert ablate.main([*options, *rows]) == 0
    assert ablate.main([*options, *rows, "--limit", "2"]) == 2
    assert "made with other options" in capsys.readouterr().err


def test_too_few_prompts_to_train_on_are_said_before_any_row(options, tmp_path, capsys):
    assert ablate.main([*options, "--rows", "absmean,+ end to end"]) == 2
    assert "2 prompts, of which 16 are held out" in capsys.readouterr().err
    assert not (tmp_path / "out" / ablate.RESULTS).exists()


def test_a_folder_in_the_table_s_place_is_refused(options, tmp_path, capsys):
    (tmp_path / "out" / ablate.RESULTS).mkdir(parents=True)
    assert ablate.main([*options, "--rows", "absmean"]) == 2
    assert f"{ablate.RESULTS} cannot be read" in capsys.readouterr().err


def test_an_unknown_row_is_refused(options, capsys):
    assert ablate.main([*options, "--rows", "magic"]) == 2
    assert "no row 'magic'" in capsys.readouterr().err
