"""What self-distillation is made of: straight-through codes, the sampler's levels, the measure of error."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from bitflux_core.convert import quantize_transformer
from bitflux_core.distill import LatentTernaryLinear, make_student, relative_error, sampler_sigmas
from bitflux_core.errors import UserError
from bitflux_core.ternary import least_squares


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


def test_sampler_levels_are_the_pipelines():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    sigmas = sampler_sigmas(scheduler, 5, 4, torch.device("cpu"))
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[1], torch.tensor(3 * 0.8 / (1 + 2 * 0.8)))  # shift 3 of 0.8


FLUX_DEV_SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
OTHER_SHIFTS = {"base_image_seq_len": 64, "max_image_seq_len": 1024, "base_shift": 0.25, "max_shift": 2.0}


@pytest.mark.parametrize(
    ("shifts", "tokens", "mu"),
    [
        (FLUX_DEV_SHIFTS, 256, 0.5),
        (FLUX_DEV_SHIFTS, 2176, 0.825),  # half-way
        (FLUX_DEV_SHIFTS, 4096, 1.15),
        (OTHER_SHIFTS, 64, 0.25),
        (OTHER_SHIFTS, 1024, 2.0),
    ],
)
def test_sampler_levels_shift_with_the_images_size(shifts, tokens, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **shifts)
    made = sampler_sigmas(scheduler, 8, tokens, torch.device("cpu"))
    evenly = torch.linspace(1, 1 / 8, 8)
    by_hand = math.exp(mu) / (math.exp(mu) + 1 / evenly - 1)
    torch.testing.assert_close(made, torch.cat([by_hand, torch.zeros(1)]))
    # As FluxPipeline.__call__ does.
    pipelines = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    pipelines.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=calculate_shift(tokens, *shifts.values()))
    torch.testing.assert_close(made, pipelines.sigmas)


def test_a_ternary_teacher_is_refused(transformer):
    quantize_transformer(transformer)
    with pytest.raises(UserError, match="full-precision"):
        make_student(transformer)


def test_relative_error_is_one_for_a_silent_student():
    assert relative_error(torch.zeros(4), torch.ones(4)) == 1
