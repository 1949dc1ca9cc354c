"""Schedules, flat gradients, averages, and Muon's orthogonal updates."""

import pytest
import torch
from torch import nn

from bitflux_core.optimizers import Muon, orthogonalize
from bitflux_core.training import (
    Average,
    FlatGradients,
    Progress,
    deterministic,
    warmup_then_cosine,
    warmup_then_linear,
)


@pytest.mark.parametrize("schedule", [warmup_then_linear, warmup_then_cosine])
def test_schedules_rise_then_fall_and_never_turn_negative(schedule):
    factors = [schedule(step, 1000, warmup=100) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == pytest.approx(1.0, abs=0.02)
    assert factors.index(max(factors)) in range(95, 105)
    assert min(factors) >= 0
    assert factors[-1] < 0.01


def test_flat_gradients_are_the_parameters_own():
    layer = nn.Linear(3, 2)
    gradients = FlatGradients(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    assert gradients.flat.tolist() == [1.0] * 8
    gradients.clip(1.0)
    assert layer.weight.grad.norm() < 1
    assert gradients.flat.norm() == pytest.approx(1.0, abs=1e-4)
    gradients.zero()
    assert not layer.weight.grad.any()


def test_attention_by_cudnn_is_left_out_of_deterministic_steps_and_comes_back():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with deterministic():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_average_follows_slowly_and_replaces_the_live_weights():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = Average(layer.parameters(), decay=0.9)
    nn.init.ones_(layer.weight)
    average.update()
    average.copy_to_live()
    assert layer.weight.item() == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_muon_moves_every_matrix_by_its_rate_whatever_the_gradients_size():
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.zeros(32, 8)), nn.Parameter(torch.zeros(8, 32)), nn.Parameter(torch.zeros(8, 32))]
    for matrix, size in zip(matrices, (1e-4, 1.0, 1e4), strict=True):
        matrix.grad = size * torch.randn_like(matrix)
    Muon(matrices, lr=torch.tensor(0.1)).step()
    for matrix in matrices:
        # An orthogonal 8 x 32 has mean square 1 / 32; times 0.2 sqrt(32) that is AdamW's usual 0.2 a step.
        assert matrix.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.3)
        assert (matrix * matrix.grad).sum().item() < 0


def test_a_loss_that_is_not_finite_stops_training():
    with pytest.raises(FloatingPointError, match="the loss is nan at step 9"):
        Progress("test", steps=10).report(9, torch.tensor(float("nan")))


def test_timed_training_takes_the_steps_that_fit():
    progress = Progress("test", steps=6000)
    progress.start -= 10.0  # as if 100 steps had taken ten seconds
    progress.fit_into(30.0, 50, torch.device("cpu"))
    assert progress.steps == 6000
    progress.fit_into(30.0, 100, torch.device("cpu"))
    assert progress.steps in (299, 300)
    progress.fit_into(5.0, 200, torch.device("cpu"))
    assert progress.steps == 201  # late already: the step in hand is the last
