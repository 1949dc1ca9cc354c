"""jobs/quantize.py: what it writes loads, and nothing is written over."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import load_ternary
from bitflux_core.distill_recipe import RECIPE
from bitflux_core.generate import ImageGenerator, TextEncoder
from cluster.manifests import REPOSITORY
from cluster.profile import load_profile
from jobs import quantize


def test_a_written_checkpoint_loads(models, tmp_path, profile, capsys):
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", str(tmp_path / "twin")]) == 0
    assert "ternary" in capsys.readouterr().out
    assert load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu").config.num_layers == 2


@pytest.mark.parametrize(("codes", "rank"), [("planes", None), ("trits", 3), ("planes", 3)])
def test_codes_and_corrections_are_as_asked_and_the_storage_that_of_the_files(
    models, tmp_path, profile, capsys, codes, rank
):
    output = tmp_path / "twin"
    arguments = ["--init", "absmean", "--codes", codes, *(["--low-rank", str(rank)] if rank else [])]
    assert quantize.main(["--profile", profile, *arguments, "--output", str(output)]) == 0
    tensors = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {t.ndim for name, t in tensors.items() if name.endswith(".packed")} == {2 if codes == "planes" else 1}
    assert {len(t) for name, t in tensors.items() if name.endswith(".down")} == ({rank} if rank else set())
    stored = sum(tensor.nbytes for tensor in tensors.values())
    said = capsys.readouterr().out
    assert f"{stored / 1e6:,.1f} MB ternary" in said
    assert ("corrections of rank 3" in said) == bool(rank)


@pytest.mark.parametrize("rank", ["0", "-4", "half", "257"])
def test_a_rank_that_cannot_be_is_refused(models, profile, tmp_path, capsys, rank):
    arguments = ["--init", "absmean", f"--low-rank={rank}", "--output", str(tmp_path / "twin")]
    assert quantize.main(["--profile", profile, *arguments]) == 2
    error = capsys.readouterr().err
    assert rank in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(models, profile, capsys, monkeypatch):
    monkeypatch.setattr("bitflux_core.quantizer.quantize.quantize", lambda *_: pytest.fail("began the work"))
    before = {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()}
    assert quantize.main(["--profile", profile, "--output", str(models / "ternary")]) == 2
    assert "ternary is in use" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (models / "ternary").iterdir()} == before


@pytest.mark.parametrize(
    ("output", "words"),
    [(".", "names no new folder"), ("notes.txt/twin", "notes.txt, which is a file"), ("notes.txt", "is in use")],
)
def test_a_place_that_cannot_hold_a_checkpoint_is_refused(
    models, profile, tmp_path, capsys, monkeypatch, output, words
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("mine") if output != "." else None
    monkeypatch.chdir(tmp_path / "empty")
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", output]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_checkpoint_made_again_lies_elsewhere_and_is_compared(models, make_profile, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init = ["--init", "least-squares"]
    profile = make_profile({"ternary": str(tmp_path / "known")})
    assert quantize.main(["--profile", profile, *init]) == 0
    assert (tmp_path / "known" / "config.json").is_file()
    assert "of the codes" not in capsys.readouterr().out
    assert quantize.main(["--profile", profile, *init]) == 0
    assert f"100.00% of the codes are those of {tmp_path / 'known'}" in capsys.readouterr().out
    [made] = tmp_path.glob("ternary-*")
    assert (made / "config.json").is_file()
    other = ["--init", "absmean", "--output", str(tmp_path / "other")]
    assert quantize.main(["--profile", profile, *other]) == 0
    assert "100.00% of the codes" not in capsys.readouterr().out


def test_a_damaged_checkpoint_beside_it_does_not_spoil_a_new_one(models, make_profile, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "ternary", tmp_path / "known")
    [file] = (tmp_path / "known").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    profile = make_profile({"ternary": str(tmp_path / "known")})
    assert quantize.main(["--profile", profile, "--init", "absmean"]) == 0
    said = capsys.readouterr().out
    assert "not compared with the codes of" in said
    assert "written to ternary-" in said


def test_a_link_to_an_empty_folder_is_filled(models, profile, tmp_path):
    (tmp_path / "volume" / "twin").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "volume" / "twin")
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", str(tmp_path / "link")]) == 0
    assert (tmp_path / "volume" / "twin" / "config.json").is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_mount_point_is_refused_before_the_work(models, profile, tmp_path, capsys, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", str(tmp_path / "volume")]) == 2
    assert "volume is a mount point: name a folder in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_flux_dev_is_trained_as_the_recipe_says():
    profile, args = load_profile("flux-dev"), quantize.parse(["--profile", "flux-dev"])
    quantize.fill(args, profile)
    assert quantize.training_of(profile, args) == RECIPE
    several = quantize.parse(["--profile", "flux-dev", "--distill-gpus", "4"])
    quantize.fill(several, profile)
    assert quantize.training_of(profile, several).batch == 4


def test_links_in_a_circle_are_refused(models, profile, tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert quantize.main(["--profile", profile, "--init", "absmean", "--output", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "a is a link that leads nowhere" in error
    assert error.count("\n") == 1


def test_a_profile_without_a_place_for_the_twin(models, make_profile, capsys):
    assert quantize.main(["--profile", make_profile({"ternary": None})]) == 2
    assert "give --output a folder" in capsys.readouterr().err


def test_an_unknown_initialisation_is_refused(capsys):
    assert quantize.main(["--init", "magic"]) == 2
    assert "--init" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["18446744073709551616", "9223372036854775808", "-1"])
def test_a_seed_that_no_generator_takes_is_refused(seed, capsys):
    assert quantize.main(["--seed", seed]) == 2
    error = capsys.readouterr().err
    assert seed in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("init", ["least-squares", "absmean"])
@pytest.mark.parametrize("every", [False, True])
def test_layers_of_zeros_are_quantized_and_said(models, make_profile, tmp_path, capsys, init, every):
    shutil.copytree(models / "flux", tmp_path / "flux")
    file = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("weight") and name.startswith(
            "transformer_blocks.0." if every else "transformer_blocks.0.ff."
        ):
            tensors[name].zero_()
    save_file(tensors, file, {"format": "pt"})
    profile = make_profile({"pipeline": str(tmp_path / "flux")})
    assert quantize.main(["--profile", profile, "--init", init, "--output", str(tmp_path / "twin")]) == 0
    said = capsys.readouterr().out
    assert ("\ntransformer_blocks.0: all weights are zero" in f"\n{said}") == every


def test_a_job_killed_with_its_checkpoint_in_place_ends_as_if_it_had_not_been(
    models, make_profile, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    job = ["--profile", make_profile({"ternary": str(tmp_path / "known")}), "--init", "absmean"]
    with monkeypatch.context() as patch:
        patch.setattr("bitflux_core.quantizer.work.WorkFolder.remove", lambda _self: sys.exit(signal.SIGTERM))
        assert quantize.main(job) == 3
    assert quantize.main(job) == 0
    assert f"written to {tmp_path / 'known'};" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("ternary-*"))


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


@pytest.mark.parametrize("steps", [[], ["--distill-steps", "1", "--calibration-prompts", "1"]])
def test_a_file_without_prompts_is_refused(profile, tmp_path, capsys, steps):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    arguments = ["--calibration", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "twin"), *steps]
    assert quantize.main(["--profile", profile, *arguments]) == 2
    assert "holds no prompts: write one a line" in capsys.readouterr().err


def test_an_empty_name_of_prompts_is_refused(profile, tmp_path, capsys):
    assert quantize.main(["--profile", profile, "--calibration", "", "--output", str(tmp_path / "twin")]) == 2
    assert "--calibration: it is empty" in capsys.readouterr().err


def test_prompts_of_the_mini_world_follow_the_seed():
    profile = load_profile("mini")
    first, again, other = (
        quantize.calibration_prompts(profile, quantize.parse(["--seed", seed, "--calibration-prompts", "64"]))
        for seed in ("0", "0", "1")
    )
    assert len(first) == 64
    assert first == again != other


def prompts_file(folder, count: int):
    file = folder / "prompts.txt"
    words = ("red", "green", "blue", "yellow", "white")
    lines = [f"a photo of a {colour} {shape}" for colour in words for shape in ("circle", "star", "ring", "cross")]
    file.write_text("\n".join(lines[:count]))
    return str(file)


def test_training_end_to_end_is_part_of_the_checkpoint(models, tmp_path, profile, capsys):
    calibration = ["--calibration", prompts_file(tmp_path, 20), "--calibration-prompts", "2", "--init", "least-squares"]
    training = ["--distill-steps", "4", "--distill-int8-steps", "2", "--distill-batch", "2", "--distill-images", "2"]
    output = tmp_path / "twin"
    assert quantize.main(["--profile", profile, *calibration, *training, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "distill: step 2/4 (native) loss" in said
    assert "distill: step 4/4 (int8) loss" in said
    assert str(output / "distill.parquet") in said
    assert "ratios of all layers, before the training end to end: snr.parquet" in said
    images = sorted((output / "images").iterdir())
    assert [path.name for path in images] == [f"step-0000000{step}.png" for step in (0, 2, 4)]
    assert Image.open(images[0]).size == (2 * 64, 64)
    header = json.loads((output / "config.json").read_text())["quantization_config"]
    assert header["method"] == "self-distillation"
    assert header["provenance"]["end_to_end"]["steps"] == 4
    assert header["provenance"]["end_to_end"]["guidance"] == 2.0  # the profile's, as in calibration
    assert header["provenance"]["sampling"]["guidance"] == 2.0
    assert load_ternary(output, dtype=torch.float32, device="cpu").config.num_layers == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--distill-steps", "4", "--distill-int8-steps", "5"], "--distill-int8-steps 5"),
        (["--distill-steps", "4", "--distill-prompts", "30"], "20 prompts of 30: set --distill-prompts"),
        (["--distill-steps", "4", "--distill-prompts", "10"], "16 are held out"),
        (["--distill-steps", "many"], "--distill-steps"),
    ],
)
def test_training_that_cannot_be_is_refused_before_any_work(models, tmp_path, profile, capsys, arguments, named):
    calibration = ["--calibration", prompts_file(tmp_path, 20), "--calibration-prompts", "2"]
    output = ["--output", str(tmp_path / "twin")]
    assert quantize.main(["--profile", profile, *calibration, *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "twin.partial").exists()


def test_training_without_prompts_is_refused(models, profile, tmp_path, capsys):
    arguments = ["--init", "least-squares", "--distill-steps", "4", "--output", str(tmp_path / "twin")]
    assert quantize.main(["--profile", profile, *arguments]) == 2
    assert "no prompts to train on: give --calibration a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_mini_profile_quantizes_on_a_cpu_and_its_twin_draws(tmp_path):
    """All that `--profile mini` does on a GPU, compensation and training by AdamW, on a few states."""
    few = ["--calibration-prompts", "2", "--states-a-prompt", "1", "--distill-prompts", "64"]
    training = ["--distill-steps", "2", "--distill-batch", "2"]
    output = tmp_path / "twin"
    command = [sys.executable, "jobs/quantize.py", "--profile", "mini", *few, *training, "--output", str(output)]
    # Its many small operations are slower on several cores that others use too.
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distill: step 2/2" in done.stdout
    profile = load_profile("mini")
    folder = REPOSITORY / profile.models.pipeline
    [embedding] = TextEncoder(folder, "cpu", torch.float32, profile.sampling.max_sequence_length).encode(
        ["a red circle"]
    )
    twin = load_ternary(output, dtype=torch.float32, device="cpu")
    image = ImageGenerator(twin, folder, "cpu", torch.float32).draw([embedding], [1], profile.sampling)
    assert image.shape == (1, profile.sampling.height, profile.sampling.width, 3)
    assert image.std() > 5  # no even grey


@pytest.mark.slow  # a Ray of its own
def test_several_ranks_train_through_ray(models, tmp_path, profile):
    calibration = ["--calibration", prompts_file(tmp_path, 20), "--calibration-prompts", "2", "--init", "least-squares"]
    training = ["--distill-steps", "4", "--distill-batch", "2", "--distill-gpus"]
    output = tmp_path / "twin"
    command = [sys.executable, "jobs/quantize.py", "--profile", profile, *calibration, *training]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)

    refused = run("99", "--distill-batch", "99", "--output", str(output))
    assert refused.returncode == 2
    assert "training on 99" in refused.stderr.splitlines()[-1]
    assert not output.with_name("twin.partial").exists()
    done = run("2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in pq.read_table(output / "distill.parquet").to_pylist()] == [0, 3, 3, 4]
    assert load_ternary(output, dtype=torch.float32, device="cpu").config.num_layers == 2
