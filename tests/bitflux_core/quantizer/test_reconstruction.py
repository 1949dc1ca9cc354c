"""One block in training: its codes change, its error falls, and training that does not help is undone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitflux_core.distill import LatentTernaryLinear, relative_error
from bitflux_core.quantizer import reconstruction
from bitflux_core.quantizer.blocks import BlockSource, Stream
from bitflux_core.quantizer.reconstruction import ReconstructionSettings, reconstruct
from bitflux_core.ternary import least_squares

NAME = "single_transformer_blocks.0"
SETTINGS = ReconstructionSettings(steps=60, latent_lr=2e-2, scale_lr=2e-3)


@pytest.fixture
def block(lively_dir):
    """A teacher's block, its rounded twin, the twin's weights, and what they read."""
    teacher = BlockSource(lively_dir / "transformer", "cpu", torch.float32).block(NAME)
    student, weights = copy.deepcopy(teacher), {}
    for name, linear in teacher.named_modules():
        if isinstance(linear, nn.Linear):
            weights[name] = least_squares(linear.weight)
            student.get_submodule(name).weight.copy_(weights[name].dequantize())
    generator = torch.Generator().manual_seed(0)
    width = weights["proj_mlp"].codes_NK.shape[1]

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    rotary = torch.ones(12, 16), torch.zeros(12, 16)
    streams = [Stream(draw(4, 8, width), draw(4, 4, width), draw(4, width), rotary) for _ in range(3)]
    return teacher, student, weights, streams


def train(block, settings):
    teacher, student, weights, streams = block
    return reconstruct(NAME, teacher, copy.deepcopy(student), weights, streams, streams, settings)


def test_codes_flip_and_the_error_falls(block):
    trained, log = train(block, SETTINGS)
    assert log.error_after < 0.7 * log.error_before
    changed = sum((trained[name].codes_NK != block[2][name].codes_NK).sum().item() for name in trained)
    total = sum(ternary.codes_NK.numel() for ternary in trained.values())
    assert log.codes_flipped == pytest.approx(changed / total)
    assert 0 < log.codes_flipped < 0.5


def test_the_same_seed_gives_the_same_codes(block):
    first, again = train(block, SETTINGS)[0], train(block, SETTINGS)[0]
    assert all(torch.equal(first[name].codes_NK, again[name].codes_NK) for name in first)


def test_training_that_does_not_help_is_undone(block):
    weights, log = train(block, replace(SETTINGS, steps=2, latent_lr=5.0))
    assert weights is block[2]
    assert log.codes_flipped == 0
    assert log.error_after == log.error_before


@torch.no_grad()
def test_the_student_ends_with_the_trained_biases_and_norms(block):
    """Its error is what the training ended with, which only all that was trained together gives."""
    teacher, student, weights, streams = block
    settings = replace(SETTINGS, other_lr=1e-2)
    trained, log = reconstruct(NAME, teacher, student, weights, streams, streams, settings)
    for name, ternary in trained.items():
        linear = student.get_submodule(name)
        linear.weight.copy_(ternary.dequantize())
        assert not torch.equal(linear.bias, teacher.get_submodule(name).bias), name
    for name in ("norm_q", "norm_k"):
        assert not torch.equal(student.attn.get_submodule(name).weight, teacher.attn.get_submodule(name).weight)
    errors = []
    for stream in streams:
        mine, theirs = stream.through(student), stream.through(teacher)
        errors += [relative_error(mine.hidden_BLD, theirs.hidden_BLD)]
        errors[-1] += relative_error(mine.encoder_BTD, theirs.encoder_BTD)
    assert sum(errors).item() / len(errors) == pytest.approx(log.error_after, rel=1e-4)


def test_dampening_settles_the_latents(block, monkeypatch):
    made = []
    copied = reconstruction._latent_copy
    monkeypatch.setattr(reconstruction, "_latent_copy", lambda *parts: made.append(copied(*parts)) or made[-1])

    def settled(dampening: float) -> float:
        train(block, replace(SETTINGS, dampening=dampening))
        layers = [layer for layer in made[-1].modules() if isinstance(layer, LatentTernaryLinear)]
        latent = torch.cat([layer.latent.detach().flatten() for layer in layers])
        return ((latent - latent.round().clamp(-1, 1)).abs() < 0.2).float().mean().item()

    free = settled(0.0)
    assert settled(2.0) > 1.2 * free
    assert settled(ReconstructionSettings(1).dampening) > free  # there is some by default
