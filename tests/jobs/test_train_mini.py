"""The training job: refusals in one line, and every stage for real at tiny sizes."""

import numpy as np
import pytest
import torch

from jobs.train_mini import main


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--stages", "vae,cheese"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown stage 'cheese': choose from vae, text, teacher, detector, clip, vqa, depth"
    ]
    assert not list(tmp_path.iterdir())


def test_a_stage_without_its_forerunner_is_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--stages", "teacher"]) == 2
    assert "run the stage vae first" in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_makes_what_the_main_job_loads(tmp_path):
    from bitflux_core.generate import ImageGenerator, TextEncoder
    from bitflux_core.loading import load_transformer
    from bitflux_core.samples import Sampling
    from evaluators.registry import build_evaluator

    sizes = "vae=1 text=2 teacher=3 guidance=1 detector=1 clip=1 vqa=1 depth=1"
    options = [
        word for name, steps in (pair.split("=") for pair in sizes.split()) for word in (f"--{name}-steps", steps)
    ]
    batches = ["--vae-batch", "2", "--text-batch", "4", "--batch", "4", "--detector-batch", "2", "--clip-batch", "4"]
    batches += ["--vqa-batch", "4", "--depth-batch", "2"]
    assert main(["--output", str(tmp_path), "--images", "8", *options, *batches]) == 0

    models = {"detector": tmp_path / "detector", "clip": tmp_path / "clip"}
    evaluator = build_evaluator("mini-geneval", models)
    metadata = {"tag": "single_object", "include": [{"class": "star", "count": 1}]}
    [embedding] = TextEncoder(tmp_path / "flux", "cpu", torch.float32, 16).encode(["a photo of a star"])
    transformer = load_transformer(
        "bf16", pipeline_dir=tmp_path / "flux", ternary_dir=None, device="cpu", dtype=torch.float32
    )
    generator = ImageGenerator(transformer, tmp_path / "flux", "cpu", torch.float32)
    images = generator.draw([embedding], [1], Sampling(128, 128, 2, 2.0, 16))
    assert images.shape == (1, 128, 128, 3)
    assert images.dtype == np.uint8
    assert evaluator.score(list(images), [metadata])[0].error is None
