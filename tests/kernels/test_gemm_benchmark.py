"""The benchmark's random operands, its fp8 products, and its check of results."""

import pytest
import torch

from kernels import benchmark, ops
from kernels.benchmark import FLUX_DEV, Layer, fp8_product, fp8_rows, random_packed, unpacked_fp8
from kernels.packing import check_packed, unpack_planes

CPU = torch.device("cpu")


def test_random_codes_are_valid_and_uniform():
    torch.manual_seed(0)
    packed_NJ = random_packed(256, 512, CPU)
    check_packed(packed_NJ, "packed")
    shares = torch.bincount(unpack_planes(packed_NJ, 512).flatten().int() + 1) / (256 * 512)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.01, rtol=0)


def test_fp8_products_are_those_of_the_matrices():
    torch.manual_seed(0)
    x_MK, weight_NK = torch.randn(16, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    bias_N = torch.randn(32, dtype=torch.bfloat16)
    y_MN = fp8_product(fp8_rows(x_MK), fp8_rows(weight_NK), bias_N).float()
    expected = x_MK.float() @ weight_NK.float().t() + bias_N.float()
    assert (y_MN - expected).norm() / expected.norm() < 0.05  # fp8 keeps 4 bits
    codes = unpacked_fp8(random_packed(32, 64, CPU), 64)
    assert codes.float().unique().tolist() == [-1, 0, 1]


def test_the_layers_are_those_of_flux_dev():
    shapes = [(9216, 3072), (3072, 3072), (12288, 3072), (21504, 3072), (3072, 12288), (3072, 15360), (1050624, 3072)]
    assert [(layer.out_features, layer.in_features) for layer in FLUX_DEV] == shapes
    assert FLUX_DEV[-1].out_features == 19 * 2 * 6 * 3072 + 38 * 3 * 3072


def measured(layer: Layer, milliseconds: float = 2.0) -> benchmark.GemmRow:
    """The only row of a layer with one number of tokens, by a timer that always says the same."""

    def timer(call) -> float:
        call()
        return milliseconds

    (row,) = benchmark.measure_layers((layer,), CPU, timer, copy_gb_s=100.0)
    return row


def test_rates_follow_from_the_times():
    row = measured(Layer("a layer", 48, 64, (4,)))
    assert row.error is None
    assert row.ternary_tflops == pytest.approx(2 * 4 * 48 * 64 / 2e-3 / 1e12)
    assert row.int8_gb_s == pytest.approx(48 * 64 / 4 / 2e-3 / 1e9)
    assert row.int8_of_copy == pytest.approx(row.int8_gb_s / 100)
    assert (row.ternary_speed_of_bf16, row.int8_speed_of_fp8) == (1, 1)
    assert row.ternary_error <= 2**-8
    assert row.int8_error <= 2**-8


def test_checked_in_parts_too(monkeypatch):
    monkeypatch.setattr(benchmark, "CHUNK", 20)
    assert measured(Layer("a layer", 48, 64, (3,))).error is None


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_wrong_value_is_seen(value, monkeypatch):
    right = ops.matmul_int8

    def wrong(*arguments, **options):
        y_MN = right(*arguments, **options)
        y_MN[2, 5] = value
        return y_MN

    monkeypatch.setattr(ops, "matmul_int8", wrong)
    row = measured(Layer("a layer", 48, 64, (3,)))
    assert row.error.startswith("ternary_int8: wrong result: 1 of 144")
    assert row.ternary_int8_ms is None
    assert row.ternary_ms == 2
