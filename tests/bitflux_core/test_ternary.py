import math

import pytest
import torch

from bitflux_core.ternary import TernaryWeight, absmean, least_squares, snr_db


def gaussian(rows: int = 16, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def best_error_N(weight_NK: torch.Tensor) -> torch.Tensor:
    """Smallest squared error of each row over every number of kept weights: sum w^2 - (sum of the c largest)^2 / c."""
    sorted_NK = weight_NK.double().abs().sort(dim=1, descending=True).values
    counts_K = torch.arange(1, weight_NK.shape[1] + 1, dtype=torch.float64)
    return weight_NK.double().square().sum(1) - (sorted_NK.cumsum(1).square() / counts_K).amax(1)


def error_N(weight_NK: torch.Tensor, ternary: TernaryWeight) -> torch.Tensor:
    return (weight_NK.double() - ternary.dequantize().double()).square().sum(1)


def test_absmean_is_bitnets_formula():
    weight_NK = torch.tensor([[0.1, -0.4, 0.2], [0.0, 0.6, -0.5]])  # gamma = 0.3
    ternary = absmean(weight_NK)
    assert ternary.codes_NK.tolist() == [[0, -1, 1], [0, 1, -1]]
    torch.testing.assert_close(ternary.scale_N, torch.full((2,), 0.3))
    assert ternary.codes_NK.dtype == torch.int8


def test_least_squares_on_a_row_solved_by_hand():
    # Keeping {4, -3}: scale 3.5, threshold 1.75. Keeping {4, -3, 1} would give scale 8/3 and drop 1 again.
    ternary = least_squares(torch.tensor([[4.0, -3.0, 1.0, 0.0]]))
    assert ternary.codes_NK.tolist() == [[1, -1, 0, 0]]
    assert ternary.scale_N.tolist() == [3.5]


def test_least_squares_is_a_fixed_point_of_threshold_and_scale():
    weight_NK = gaussian()
    ternary = least_squares(weight_NK)
    kept_NK = weight_NK.abs() > ternary.scale_N[:, None] / 2
    assert torch.equal(ternary.codes_NK, (weight_NK.sign() * kept_NK).to(torch.int8))
    mean_N = torch.stack([row[kept].abs().mean() for row, kept in zip(weight_NK, kept_NK, strict=True)])
    torch.testing.assert_close(ternary.scale_N, mean_N)


@pytest.mark.parametrize("heavy_tails", [False, True])
def test_least_squares_reaches_the_exhaustive_optimum(heavy_tails):
    weight_NK = gaussian()
    if heavy_tails:
        weight_NK = weight_NK.sign() * weight_NK.abs() ** 1.5
    assert (error_N(weight_NK, least_squares(weight_NK)) <= 1.005 * best_error_N(weight_NK)).all()


def test_least_squares_loses_less_than_absmean():
    # Optimal three-level quantizer of a Gaussian: distortion 0.1902, 7.21 dB (Max 1960).
    weight_NK = gaussian(64, 4096)
    optimum = snr_db(weight_NK, least_squares(weight_NK))
    assert optimum == pytest.approx(7.21, abs=0.05)
    assert optimum > snr_db(weight_NK, absmean(weight_NK)) + 0.5


def test_rows_have_their_own_scale():
    weight_NK = torch.cat([gaussian(1), 100 * gaussian(1)])
    scale_N = least_squares(weight_NK).scale_N
    torch.testing.assert_close(scale_N[1], 100 * scale_N[0])


@pytest.mark.parametrize("quantize", [absmean, least_squares])
def test_a_row_of_zeros_stays_zero(quantize):
    weight_NK = gaussian(3)
    weight_NK[1] = 0
    weight_NK = weight_NK if quantize is least_squares else torch.zeros(3, 8)
    ternary = quantize(weight_NK)
    assert ternary.scale_N.isfinite().all()
    assert not ternary.dequantize()[1].any()


@pytest.mark.parametrize("quantize", [absmean, least_squares])
def test_bf16_weights_are_quantized_in_float32(quantize):
    weight_NK = gaussian().bfloat16()
    wide = quantize(weight_NK.float())
    ternary = quantize(weight_NK)
    assert torch.equal(ternary.codes_NK, wide.codes_NK)
    assert torch.equal(ternary.scale_N, wide.scale_N)


def test_snr_in_decibel():
    ternary = TernaryWeight(torch.tensor([[1, -1]], dtype=torch.int8), torch.tensor([1.0]))
    assert snr_db(torch.tensor([[1.1, -0.9]]), ternary) == pytest.approx(10 * math.log10(2.02 / 0.02), abs=1e-4)
    assert snr_db(torch.tensor([[1.0, -1.0]]), ternary) == math.inf
