"""Weights of the sampler's steps, on trajectories whose ends are known by hand."""

import pytest
import torch

from bitflux_core.distill_sensitivity import LEAST, error_weights, velocities_weighing

SIGMAS = torch.tensor([1.0, 0.75, 0.25, 0.0])


def noise(states=6):
    x_BLC = torch.randn(states, 4, 8, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": x_BLC, "timestep": torch.ones(states)}


def test_where_errors_only_add_up_long_strides_count():
    def teach(inputs):
        return torch.ones_like(inputs["hidden_states"])  # never mends, never makes worse

    weights_K = error_weights([noise()], SIGMAS, teach, lambda inputs: teach(inputs) + 0.1)
    squares_K = torch.tensor([0.25, 0.5, 0.25]).square()
    torch.testing.assert_close(weights_K, squares_K / squares_K.mean(), rtol=1e-3, atol=0)


def test_what_the_teacher_makes_worse_counts_more_whatever_the_students_error():
    growth = 2.0

    def teach(inputs):
        x_BLC = inputs["hidden_states"]
        return -growth * x_BLC  # sigmas fall: each step takes x further away, errors too

    def predict(inputs):  # a thousand times worse at the last step, which must not matter
        return teach(inputs) * (1.001 if inputs["timestep"][0] > 0.5 else 2.0)

    weights_K = error_weights([noise(4), noise(2)], SIGMAS, teach, predict)
    # An error of the same relative size, at steps of velocities that grow with x, carried on by all later steps.
    strides, factors = [0.25, 0.5, 0.25], [1 + growth * stride for stride in (0.25, 0.5, 0.25)]
    sizes = [1.0, factors[0], factors[0] * factors[1]]
    carried = [factors[1] * factors[2], factors[2], 1.0]
    squares_K = torch.tensor([(a * b * c) ** 2 for a, b, c in zip(strides, sizes, carried, strict=True)])
    torch.testing.assert_close(weights_K, squares_K / squares_K.mean(), rtol=1e-3, atol=0)


def test_no_step_is_left_out():
    def teach(inputs):
        late = inputs["timestep"][0] < 0.5
        return inputs["hidden_states"] * (4.0 if late else 1.0)  # the last stride of 0.25 forgets all before it

    weights_K = error_weights([noise()], SIGMAS, teach, lambda inputs: teach(inputs) * 1.5)
    assert weights_K.mean().item() == pytest.approx(1)
    assert weights_K.min().item() > 0.9 * LEAST
    assert weights_K.argmax() == 2


def test_a_student_without_error_weighs_all_alike_and_finitely():
    def teach(inputs):
        return torch.ones_like(inputs["hidden_states"])

    assert torch.isfinite(error_weights([noise()], SIGMAS, teach, teach)).all()


def test_velocities_are_counted():
    calls = []

    def teach(inputs):
        calls.append(1)
        return torch.ones_like(inputs["hidden_states"])

    def predict(inputs):
        calls.append(1)
        return 1.1 * torch.ones_like(inputs["hidden_states"])

    error_weights([noise()], SIGMAS, teach, predict)
    assert len(calls) == velocities_weighing(3)
