"""Image-free self-distillation: straight-through codes, the walk along the trajectory, and a student that improves."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from bitflux_core.convert import quantize_transformer
from bitflux_core.distill import (
    Conditions,
    Distiller,
    DistillSettings,
    LatentTernaryLinear,
    finish_student,
    make_student,
    relative_error,
)
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.ternary import least_squares

CPU = torch.device("cpu")
SIDE, TEXT = 2, 4


@pytest.fixture
def teacher(transformer):
    # Fresh adaLN weights leave the velocity almost zero; larger ones give the student something to learn.
    torch.manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return transformer


def distiller(teacher, **changes):
    torch.manual_seed(2)
    config = teacher.config
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    conditions = Conditions(
        torch.randn(6, TEXT, config.joint_attention_dim),
        torch.randn(6, config.pooled_projection_dim),
        torch.stack([torch.zeros(SIDE**2), rows.flatten(), columns.flatten()], dim=-1).float(),
    )
    settings = DistillSettings(**{"steps": 40, "batch": 8, "sampler_steps": 5, "guidance": 2.0} | changes)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    return Distiller(teacher, scheduler, conditions, settings, CPU)


def test_latent_layer_starts_at_least_squares_and_passes_gradients_straight():
    linear = nn.Linear(24, 8)
    layer = LatentTernaryLinear(linear)
    expected = least_squares(linear.weight)
    assert torch.equal(layer.ternary().codes_NK, expected.codes_NK)
    torch.testing.assert_close(layer.ternary().scale_N, expected.scale_N)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), x @ expected.dequantize().T + linear.bias)
    layer(x).sum().backward()
    # d/d latent of sum(x W^T) is the row's scale times the summed input, as if nothing had been rounded.
    torch.testing.assert_close(layer.latent.grad, expected.scale_N[:, None].detach() * x.sum(0).expand(8, -1))


def test_finished_student_draws_what_the_trained_one_drew(teacher):
    student = make_student(teacher)
    with torch.no_grad():
        for layer in student.modules():
            if isinstance(layer, LatentTernaryLinear):
                layer.latent.add_(0.3 * torch.randn_like(layer.latent))
                layer.bias.add_(0.1)
    finished = finish_student(student)
    assert all(isinstance(layer, TernaryLinear) for layer in block_linears(finished).values())
    config = teacher.config
    inputs = {
        "hidden_states": torch.randn(2, SIDE**2, config.in_channels),
        "encoder_hidden_states": torch.randn(2, TEXT, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([2.0, 2.0]),
        "img_ids": torch.zeros(SIDE**2, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    torch.testing.assert_close(finished(**inputs)[0], student(**inputs)[0], rtol=1e-4, atol=1e-4)


def test_distillation_brings_the_student_nearer_than_rounding(teacher):
    run = distiller(teacher, steps=200, latent_lr=1e-2)
    run.own_slots.zero_()
    run._update()
    first = run.loss_mean.mean.item()
    finished = run.run()
    assert run.loss_mean.mean.item() < 0.6 * first
    assert run.steps_made == 200
    assert 0 < run.codes_flipped() < 0.5
    assert all(isinstance(layer, TernaryLinear) for layer in block_linears(finished).values())


def test_slots_walk_to_the_image_and_start_over(teacher):
    run = distiller(teacher)
    run.step_B.copy_(torch.tensor([0, 1, 2, 3, 4, 4, 0, 1]))
    before = run.x_BLC.clone()
    velocity = torch.ones_like(before)
    sigma_B = run.sigmas[run.step_B]
    following_B = run.sigmas[run.step_B + 1]
    run._advance(velocity, -velocity, sigma_B)
    assert run.step_B.tolist() == [1, 2, 3, 4, 0, 0, 1, 2]
    moved = (following_B - sigma_B)[:4, None, None].expand_as(before[:4])
    torch.testing.assert_close(run.x_BLC[:4] - before[:4], moved)
    assert run.x_BLC[4].std() > 0.5  # new noise, not the old state


def test_own_slots_walk_by_the_students_velocity(teacher):
    run = distiller(teacher)
    run.step_B.zero_()
    run.own_slots.fill_(3)
    before = run.x_BLC.clone()
    run._advance(torch.ones_like(before), -torch.ones_like(before), run.sigmas[run.step_B])
    direction = (run.x_BLC - before).mean(dim=(1, 2)).sign().tolist()
    assert direction == [1.0] * 3 + [-1.0] * 5


def test_sampler_levels_are_the_pipelines(teacher):
    sigmas = distiller(teacher).sigmas
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[1], torch.tensor(3 * 0.8 / (1 + 2 * 0.8)))  # shift 3 of 0.8


def test_a_ternary_teacher_is_refused(teacher):
    quantize_transformer(teacher)
    with pytest.raises(UserError, match="full-precision"):
        make_student(teacher)


def test_relative_error_is_one_for_a_silent_student():
    assert relative_error(torch.zeros(4), torch.ones(4)) == 1
