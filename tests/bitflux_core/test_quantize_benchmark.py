"""The benchmark of the quantizer: what counts as a block's time, a training step's, and what is planned beside them."""

import itertools
from dataclasses import replace

import pytest
import torch

from bitflux_core.benchmark import models, quantize
from bitflux_core.benchmark.quantize import OUTSIDE, TINY, WatchedSource, measure_quantizing
from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.quantizer import quantize as job
from bitflux_core.samples import Sampling

CPU = torch.device("cpu")
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_blocks_time_lasts_until_the_next_is_asked_for(pipeline_dir, monkeypatch):
    source = WatchedSource(pipeline_dir / "transformer", CPU, torch.float32)
    source.block(SINGLE)  # while no one watches
    looks = itertools.count()
    monkeypatch.setattr(quantize, "_now", lambda _device: float(next(looks)))  # a second between two looks
    inputs = {name: tensor.float() for name, tensor in models.step_inputs(models.TINY, 1, 32, CPU).items()}
    inputs["encoder_hidden_states"] = torch.zeros(1, 16, source.empty.config.joint_attention_dim)
    inputs["pooled_projections"] = torch.zeros(1, source.empty.config.pooled_projection_dim)
    inputs["hidden_states"] = torch.zeros(1, 4, source.empty.config.in_channels)
    inputs["img_ids"] = inputs["img_ids"][:4]
    with source.watched() as spans:
        stream = source.enter(**inputs)
        source.enter(**inputs)
        source.block(DOUBLE)
        source.block(SINGLE)
        source.leave(stream, **inputs)
        source.enter(**inputs)
    assert [(span.name, span.seconds, span.read_s) for span in spans] == [
        (OUTSIDE, 1, 0),
        (DOUBLE, 3, 1),
        (SINGLE, 3, 1),
        (OUTSIDE, 1, 0),
    ]
    assert [span.kind for span in spans] == ["outside", "double", "single", "outside"]


@pytest.mark.slow
def test_a_training_is_timed_by_its_steps(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(quantize, "_now", lambda _device: clock[0])

    def trained(_name, teacher, _student, _weights, teacher_streams, student_streams, settings):
        assert len(teacher_streams) == len(student_streams) == 3
        clock[0] += 100
        for seconds, passes in ((5, teacher_streams), (2, teacher_streams[:1] * settings.steps), (7, teacher_streams)):
            for stream in passes:
                stream.through(teacher)
                clock[0] += seconds

    monkeypatch.setattr(quantize, "reconstruct", trained)
    rows = [row for row in measure_quantizing(TINY, models.TINY, CPU, tmp_path) if row.part == "reconstruction"]
    assert [row.block for row in rows] == ["double", "single"]
    for row in rows:
        assert row.step_s == 2
        assert row.seconds == 100 + 3 * 5 + 3 * 7 + TINY.reconstruction_steps * 2


@pytest.mark.slow
def test_the_measured_block_has_states_of_its_own_behind_a_ternary_one(tmp_path, monkeypatch):
    seen = []

    def trained(name, _teacher, _student, weights, teacher_streams, student_streams, _settings):
        seen.append((name, weights))
        for theirs, mine in zip(teacher_streams, student_streams, strict=True):
            assert theirs.hidden_BLD.data_ptr() != mine.hidden_BLD.data_ptr()
            assert not torch.equal(theirs.hidden_BLD, mine.hidden_BLD)
            assert not torch.equal(theirs.encoder_BTD, mine.encoder_BTD)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quantize, "reconstruct", trained)
    rows = list(measure_quantizing(TINY, models.TINY, CPU, tmp_path))
    [(name, weights)] = seen
    assert name == "transformer_blocks.1"
    assert len(weights) == 14
    # What does not fit is a finding, and the rest is measured.
    *parts, plain, whole = rows
    assert [row.error for row in parts[:6]] == [None] * 6
    assert plain.hours == pytest.approx(sum(row.hours for row in parts[:6]))
    for row in (*parts[6:], whole):
        assert row.error == "does not fit: CUDA out of memory"
        assert row.hours is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained", [False, True])
def test_planned_is_what_the_job_asks_for(pipeline_dir, tmp_path, monkeypatch, trained):
    def refuse(required, _device):
        raise UserError(str(required))

    monkeypatch.setattr(job, "check_memory", refuse)
    recipe = replace(TINY, prompts=30)
    settings = job.QuantizeSettings(
        init="compensated",
        prompts=("a ring",) * recipe.prompts,
        states_a_prompt=recipe.states_a_prompt,
        reconstruction_steps=recipe.reconstruction_steps if trained else 0,
        sampling=Sampling(32, 32, recipe.sampler_steps, guidance=2.0, max_sequence_length=16),
        batch=recipe.batch,
    )
    config = read_json(pipeline_dir / "transformer" / "config.json", "")
    sizes = replace(models.TINY, transformer=config, resolution=32, text_tokens=16)
    with pytest.raises(UserError) as asked:
        job.quantize(pipeline_dir, tmp_path / "twin", settings, torch.device("cuda"), lambda *_: None)
    assert quantize._required(recipe, sizes, trained) == int(str(asked.value))
