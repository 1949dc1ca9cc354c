"""Compensated codes: better than rounding where inputs are correlated, and right where they are not."""

import pytest
import torch

from bitflux_core.errors import UserError
from bitflux_core.quantizer import compensation
from bitflux_core.quantizer.compensation import Compensator, InputMoments
from bitflux_core.ternary import least_squares

TOKENS, ROWS, COLUMNS = 2000, 24, 40


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def correlated_MK(generator):
    """Inputs of a few strong directions, off centre, as FLUX's are."""
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -2, COLUMNS)[:, None]
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mix + torch.randn(COLUMNS, generator=generator)


def compensate(weight_NK, student_MK, teacher_MK, rank=0):
    moments = InputMoments(student_MK.shape[1], torch.device("cpu"))
    for student, teacher in zip(student_MK.split(700), teacher_MK.split(700), strict=True):
        moments.add(student, teacher)
    return Compensator(moments).quantize(weight_NK, rank)


def output_error(weight_NK, ternary, shift_N, student_MK, teacher_MK):
    mine = student_MK @ ternary.dequantize().T + shift_N
    theirs = teacher_MK @ weight_NK.T
    return ((mine - theirs).square().sum() / theirs.square().sum()).item()


def test_outputs_are_kept_far_better_than_by_rounding(correlated_MK, generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    ternary, shift_N = compensate(weight_NK, correlated_MK, correlated_MK)
    rounded = output_error(weight_NK, least_squares(weight_NK), torch.zeros(ROWS), correlated_MK, correlated_MK)
    assert output_error(weight_NK, ternary, shift_N, correlated_MK, correlated_MK) < 0.2 * rounded
    assert set(ternary.codes_NK.unique().tolist()) == {-1, 0, 1}
    assert ternary.codes_NK.dtype == torch.int8
    assert (ternary.scale_N > 0).all()


def test_errors_of_the_inputs_are_made_up_for(correlated_MK, generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    student_MK = 0.8 * correlated_MK + 0.5  # what the layer is given is wrong in a way that its weight can mend
    aware = compensate(weight_NK, student_MK, correlated_MK)
    unaware = compensate(weight_NK, student_MK, student_MK)
    error = output_error(weight_NK, *aware, student_MK, correlated_MK)
    assert error < 0.3 * output_error(weight_NK, *unaware, student_MK, correlated_MK)


def test_the_bias_takes_up_the_mean(correlated_MK, generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    ternary, shift_N = compensate(weight_NK, correlated_MK, correlated_MK)
    mine = correlated_MK @ ternary.dequantize().T + shift_N
    torch.testing.assert_close(mine.mean(0), (correlated_MK @ weight_NK.T).mean(0), rtol=1e-3, atol=1e-2)


def test_a_weight_that_is_ternary_stays_as_it_is(correlated_MK, generator):
    codes_NK = torch.randint(-1, 2, (ROWS, COLUMNS), generator=generator)
    scale_N = torch.rand(ROWS, generator=generator) + 0.5
    ternary, shift_N = compensate(codes_NK * scale_N[:, None], correlated_MK, correlated_MK)
    assert torch.equal(ternary.codes_NK, codes_NK.to(torch.int8))
    torch.testing.assert_close(ternary.scale_N, scale_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift_N, torch.zeros(ROWS), atol=1e-3, rtol=0)


def test_blocks_of_columns_change_nothing_but_the_order_of_sums(correlated_MK, generator, monkeypatch):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    whole, _ = compensate(weight_NK, correlated_MK, correlated_MK)
    monkeypatch.setattr(compensation, "COLUMNS", 7)
    parts, _ = compensate(weight_NK, correlated_MK, correlated_MK)
    assert (whole.codes_NK != parts.codes_NK).float().mean() < 0.01


def test_fewer_samples_than_columns(generator):
    """A modulation layer sees one vector a state: its covariance has no full rank."""
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    few_MK = torch.randn(10, COLUMNS, generator=generator)
    ternary, shift_N = compensate(weight_NK, few_MK, few_MK)
    assert ternary.scale_N.isfinite().all()
    assert shift_N.isfinite().all()
    rounded = output_error(weight_NK, least_squares(weight_NK), torch.zeros(ROWS), few_MK, few_MK)
    assert output_error(weight_NK, ternary, shift_N, few_MK, few_MK) < rounded


def test_inputs_that_never_vary(generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    ternary, shift_N = compensate(weight_NK, torch.ones(50, COLUMNS), torch.ones(50, COLUMNS))
    constant = torch.ones(1, COLUMNS)
    torch.testing.assert_close(
        constant @ ternary.dequantize().T + shift_N, constant @ weight_NK.T, rtol=1e-3, atol=1e-3
    )


def test_a_covariance_a_little_indefinite_is_damped_more():
    covariance_KK = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    damped_KK, factor_KK, inverse_factor_KK = compensation._damped_factors(covariance_KK)
    torch.testing.assert_close(factor_KK @ factor_KK.T, damped_KK)
    torch.testing.assert_close(inverse_factor_KK.T @ inverse_factor_KK @ damped_KK, torch.eye(3))


def test_a_covariance_that_no_damping_mends_is_an_error_and_no_endless_loop():
    with pytest.raises(ArithmeticError, match="no damping"):
        compensation._damped_factors(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_inputs_that_are_not_finite_are_refused_with_the_layer(correlated_MK, value, whose):
    broken_MK = correlated_MK.clone()
    broken_MK[5, 3] = value
    inputs = (broken_MK, correlated_MK) if whose == "student" else (correlated_MK, broken_MK)
    moments = InputMoments(COLUMNS, torch.device("cpu"))
    moments.add(*inputs)
    if value == 1e30 and whose == "teacher":
        Compensator(moments)  # large, but no product of it is too large
        return
    with pytest.raises(UserError, match=r"inputs of proj_out are not finite"):
        Compensator(moments, "proj_out")


def test_a_correction_takes_up_more_of_the_error_the_higher_its_rank(correlated_MK, generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    student_MK = correlated_MK + 0.02 * torch.randn(correlated_MK.shape, generator=generator)
    made = {rank: compensate(weight_NK, student_MK, correlated_MK, rank) for rank in (0, 1, 4, 12, ROWS)}
    errors = [output_error(weight_NK, *pair, student_MK, correlated_MK) for pair in made.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]
    # At full rank what is left is what no weight could mend.
    inputs = torch.cat([student_MK, torch.ones(TOKENS, 1)], dim=1)
    best = torch.linalg.lstsq(inputs, correlated_MK @ weight_NK.T).solution
    least = (inputs @ best - correlated_MK @ weight_NK.T).square().sum() / (correlated_MK @ weight_NK.T).square().sum()
    assert errors[-1] < 1.2 * least + 1e-5


@pytest.mark.parametrize("rank", [1, 12])
def test_codes_and_correction_found_in_turn_leave_less(correlated_MK, generator, monkeypatch, rank):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    errors = []
    for turns in (1, 4, 8):
        monkeypatch.setattr(compensation, "CORRECTION_TURNS", turns)
        made = compensate(weight_NK, correlated_MK, correlated_MK, rank)
        errors.append(output_error(weight_NK, *made, correlated_MK, correlated_MK))
        if turns == 1:
            assert torch.equal(made[0].codes_NK, compensate(weight_NK, correlated_MK, correlated_MK)[0].codes_NK)
    assert errors == sorted(errors, reverse=True)  # never worse: the best turn is kept
    assert errors[-1] < 0.95 * errors[0]


def test_at_full_rank_the_weight_is_the_teachers_where_inputs_are(correlated_MK, generator):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    ternary, shift_N = compensate(weight_NK, correlated_MK, correlated_MK, ROWS)
    assert (ternary.dequantize() - weight_NK).norm() < 0.01 * weight_NK.norm()
    assert output_error(weight_NK, ternary, shift_N, correlated_MK, correlated_MK) < 1e-5


def row_errors(weight_NK, ternary, student_MK):
    """Squared output errors around the mean, [N]."""
    error_MN = (student_MK - student_MK.mean(0)) @ (weight_NK - ternary.dequantize()).T
    return error_MN.square().mean(0)


def test_each_row_keeps_the_best_of_several_scales(correlated_MK, generator, monkeypatch):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    chosen_N = row_errors(weight_NK, compensate(weight_NK, correlated_MK, correlated_MK)[0], correlated_MK)
    alone = []
    for factor in compensation.SCALE_FACTORS:
        monkeypatch.setattr(compensation, "SCALE_FACTORS", (factor,))
        alone.append(row_errors(weight_NK, compensate(weight_NK, correlated_MK, correlated_MK)[0], correlated_MK))
    best_N, place_N = torch.stack(alone).min(0)
    torch.testing.assert_close(chosen_N, best_N, rtol=0.02, atol=0)  # chosen by a covariance that is a little damped
    assert len(place_N.unique()) > 1
    assert all(chosen_N.sum() < 0.97 * errors_N.sum() for errors_N in alone)


def test_descent_over_single_codes_lowers_the_error(correlated_MK, generator, monkeypatch):
    weight_NK = torch.randn(ROWS, COLUMNS, generator=generator)
    errors = []
    for rounds in (0, 1, 10):
        monkeypatch.setattr(compensation, "MOST_ROUNDS", rounds)
        errors.append(row_errors(weight_NK, compensate(weight_NK, correlated_MK, correlated_MK)[0], correlated_MK))
    assert errors[2].sum() < 0.95 * errors[0].sum()
    assert errors[2].sum() <= errors[1].sum() < errors[0].sum()
    monkeypatch.undo()
    made = row_errors(weight_NK, compensate(weight_NK, correlated_MK, correlated_MK)[0], correlated_MK)
    assert made.sum() < 0.95 * errors[0].sum()
