import pytest
import torch

from kernels import reference
from kernels.packing import pack_planes
from kernels.reference import (
    _integer_product,
    dequantize,
    plane_unpadded,
    quantize,
    ternary_linear,
    ternary_linear_int8,
)

SHAPES = [(1, 8, 16), (3, 5, 7), (16, 33, 130), (64, 48, 256)]  # M, N, K


def layer(out_features: int, in_features: int):
    generator = torch.Generator().manual_seed(out_features)
    codes_NK = torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale_N = torch.rand(out_features, generator=generator) * 0.1
    bias_N = torch.randn(out_features, generator=generator)
    return codes_NK, pack_planes(codes_NK), scale_N, bias_N


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear_equals_the_dense_product(m, n, k, dtype, tolerance):
    codes_NK, packed_NJ, scale_N, bias_N = layer(n, k)
    x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y_MN = ternary_linear(x_MK, packed_NJ, scale_N, bias_N.to(dtype), k)
    expected_MN = x_MK.double() @ (codes_NK.double() * scale_N.double()[:, None]).t() + bias_N.double()
    assert y_MN.dtype == dtype
    torch.testing.assert_close(y_MN.double(), expected_MN, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [ternary_linear, ternary_linear_int8])
def test_leading_dimensions_and_a_missing_bias(function):
    _, packed_NJ, scale_N, _ = layer(5, 12)
    x = torch.randn(2, 3, 12)
    y = function(x, packed_NJ, scale_N, None, 12)
    assert y.shape == (2, 3, 5)
    torch.testing.assert_close(y[1, 2:], function(x[1, 2:], packed_NJ, scale_N, None, 12))


def test_dequantized_weight_is_code_times_scale():
    codes_NK, packed_NJ, scale_N, _ = layer(6, 11)
    assert torch.equal(dequantize(packed_NJ, scale_N, 11, torch.float32), codes_NK * scale_N[:, None])


def test_tokens_are_quantized_by_their_largest_value():
    x_MK = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [1e-3, 3e-3, -2e-3]])
    values_MP, scale_M, sum_M = quantize(x_MK)
    values_MK = plane_unpadded(values_MP, 3)
    assert sum_M.tolist() == values_MK.sum(dim=1).tolist()
    assert (scale_M > 0).all()  # dividing by zero would leave a row of zeros to what the platform makes of NaN
    assert values_MK.tolist() == [[32, -127, 64], [0, 0, 0], [42, 127, -85]]
    assert ((values_MK * scale_M[:, None] - x_MK).abs() <= scale_M[:, None] / 2).all()


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (2, 3, 15360), (1, 1, 1)])
def test_integer_product_is_exact(m, n, k):
    generator = torch.Generator().manual_seed(k)
    values_MK = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    codes_NK = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    values_MK[0], codes_NK[0] = 127, 1  # the largest sum there can be
    product_MN = _integer_product(values_MK, codes_NK)
    assert torch.equal(product_MN.long(), values_MK.long() @ codes_NK.long().t())
    assert product_MN[0, 0] == 127 * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_linear_is_scale_times_integer_sum_rounded_once(m, n, k, dtype):
    codes_NK, packed_NJ, scale_N, bias_N = layer(n, k)
    x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    y_MN = ternary_linear_int8(x_MK, packed_NJ, scale_N, bias_N, k)
    values_MP, scale_M, _ = quantize(x_MK)
    values_MK = plane_unpadded(values_MP, k)
    sum_MN = values_MK.double() @ codes_NK.double().t()
    expected_MN = sum_MN * scale_M.double()[:, None] * scale_N.double() + bias_N.double()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y_MN.double(), expected_MN, rtol=rounding, atol=1e-6)


def test_int8_linear_stays_near_the_unquantized_one():
    _, packed_NJ, scale_N, bias_N = layer(64, 512)
    x_MK = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    exact_MN = ternary_linear(x_MK, packed_NJ, scale_N, bias_N, 512)
    error_MN = ternary_linear_int8(x_MK, packed_NJ, scale_N, bias_N, 512) - exact_MN
    assert 0 < error_MN.norm() / exact_MN.norm() < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_linear_does_not_hide_what_is_not_finite(value):
    _, packed_NJ, scale_N, bias_N = layer(4, 8)
    x_MK = torch.ones(2, 8)
    x_MK[1, 3] = value
    y_MN = ternary_linear_int8(x_MK, packed_NJ, scale_N, bias_N, 8)
    assert y_MN[0].isfinite().all()
    assert not y_MN[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_digits_add_up_to_the_token(dtype):
    x_MK = torch.randn(5, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
    x_MK[2] = 0
    x_MK[3, 4] = 1e4
    digits = reference.digits(x_MK)
    rows_RK = reference.plane_unpadded(digits.values_MP, 70).double() * digits.scale_M.double()[:, None]
    error_MK = (rows_RK.unflatten(0, (5, -1)).sum(dim=1) - x_MK.double()).abs()
    assert (error_MK <= 2**-22 * x_MK.double().abs().amax(dim=1, keepdim=True)).all()
    assert torch.equal(digits.sum_M, digits.values_MP.sum(dim=1, dtype=torch.int32))
