"""Each launcher against the torch reference, computed on the CPU: CUDA's division by a number is not IEEE's."""

import math

import pytest
import torch

from kernels import reference
from kernels.rowwise import (
    digits_triton,
    gelu_quantize_triton,
    gelu_triton,
    norm_modulate_quantize_triton,
    norm_modulate_triton,
    quantize_triton,
)

EPS = 1e-6
# The relative step between neighbouring numbers, and for float32 what sums in another order differ by.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5}
SHAPES = [(3, 256, torch.bfloat16), (2, 3072, torch.bfloat16), (4, 130, torch.float32), (2, 1000, torch.float16)]


pytestmark = pytest.mark.usefixtures("filled_memory")


def random_rows(m, k, dtype, seed=0, columns_beside=0, mean=0.0):
    """[M, K] of rows of different magnitudes; a view of wider rows where `columns_beside` is not 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, k + columns_beside, generator=generator) * (2 * torch.rand(m, 1, generator=generator)).exp()
    return (rows + mean).to(dtype)[:, columns_beside:]


def copied(view, device):
    """`view` on `device` with its strides, which Tensor.to drops there."""
    copy = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device)
    return copy.copy_(view)


def awkward_rows(k, dtype):
    """Zeros, NaN, infinities, ties at every half, a row of one value, and the ends of the dtype's range."""
    rows = random_rows(9, k, dtype, seed=1)
    rows[0] = 0
    rows[1, k // 2] = math.nan
    rows[2, 0], rows[3, -1] = math.inf, -math.inf
    rows[4] = ((torch.arange(k) % 253) - 126 + 0.5) * 2
    rows[4, 0] = 254
    rows[5] = -1.5
    rows[6, 1:] = torch.finfo(dtype).tiny
    rows[7, 0] = torch.finfo(dtype).max
    rows[8] = math.nan
    return rows


def modulation(images, k, dtype):
    """Shift and scale [B, K] as AdaLN-Zero has them: columns of one wide tensor."""
    wide = torch.randn(images, 6 * k, generator=torch.Generator().manual_seed(2)).to(dtype)
    return wide[:, k : 2 * k], wide[:, 3 * k : 4 * k]


def assert_close(actual, expected, dtype):
    assert actual.dtype == expected.dtype == dtype
    assert actual.is_contiguous()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=2e-5, equal_nan=True)


def assert_quantized_close(actual, expected):
    values_MP, scale_M, sum_M = (tensor.cpu() for tensor in actual)
    assert (values_MP.dtype, values_MP.shape) == (torch.int8, expected.values_MP.shape)
    assert actual.values_MP.is_contiguous()
    distance_MP = (values_MP.int() - expected.values_MP.int()).abs()
    assert distance_MP.max() <= 1
    assert (distance_MP > 0).float().mean() < 0.01
    assert torch.equal(sum_M, values_MP.sum(dim=1, dtype=torch.int32))
    torch.testing.assert_close(scale_M, expected.scale_M, rtol=1e-5, atol=0, equal_nan=True)


EXACT = [(quantize_triton, reference.quantize), (digits_triton, reference.digits)]


@pytest.mark.parametrize(("kernel", "expect"), EXACT)
@pytest.mark.parametrize("columns_beside", [0, 64])
@pytest.mark.parametrize(("m", "k", "dtype"), [*SHAPES, (1, 1, torch.float32), (2, 15360, torch.bfloat16)])
def test_quantized_rows_are_the_references(m, k, dtype, columns_beside, kernel, expect, device):
    x_MK = random_rows(m, k, dtype, columns_beside=columns_beside)
    for actual, expected in zip(kernel(copied(x_MK, device)), expect(x_MK), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(("kernel", "expect"), EXACT)
@pytest.mark.parametrize(("k", "dtype"), [(256, torch.bfloat16), (130, torch.float32), (768, torch.float16)])
def test_awkward_rows_are_quantized_as_the_reference_does(k, dtype, kernel, expect, device):
    x_MK = awkward_rows(k, dtype)
    values_MP, scale_M, sum_M = kernel(copied(x_MK, device))
    expected = expect(x_MK)
    assert torch.equal(values_MP.cpu(), expected.values_MP)
    assert torch.equal(sum_M.cpu(), expected.sum_M)
    assert torch.equal(scale_M.cpu().nan_to_num(nan=-1), expected.scale_M.nan_to_num(nan=-1))


def test_rounding_steps_are_the_references(device):
    """Values within a float32 step of a tie: another order of rounding, or one less, moves some of them."""
    amax_M = 1 + torch.rand(16, generator=torch.Generator().manual_seed(4))
    halves_K = torch.arange(-126, 126) + 0.5
    x_MK = torch.cat([amax_M[:, None] / 127 * halves_K, amax_M[:, None]], dim=1)
    values_MP, _, _ = quantize_triton(x_MK.to(device))
    assert torch.equal(values_MP.cpu(), reference.quantize(x_MK).values_MP)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("m", "k", "dtype"), SHAPES)
def test_norm_and_modulation(m, k, dtype, images, device):
    x_MK = random_rows(m * images, k, dtype, columns_beside=32, mean=3.0)
    shift_BK, scale_BK = modulation(images, k, dtype)
    arguments = (copied(x_MK, device), copied(shift_BK, device), copied(scale_BK, device), EPS)
    expected_MK = reference.norm_modulate(x_MK, shift_BK, scale_BK, EPS)
    assert_close(norm_modulate_triton(*arguments), expected_MK, dtype)
    expected = reference.norm_modulate_quantize(x_MK, shift_BK, scale_BK, EPS)
    assert_quantized_close(norm_modulate_quantize_triton(*arguments), expected)


def test_a_nan_in_an_images_modulation_marks_its_tokens_alone(device):
    x_MK = random_rows(4, 256, torch.bfloat16)
    shift_BK, scale_BK = (rows.clone() for rows in modulation(2, 256, torch.float32))
    shift_BK[1, 200] = math.nan
    quantized = norm_modulate_quantize_triton(
        copied(x_MK, device), copied(shift_BK, device), copied(scale_BK, device), EPS
    )
    assert quantized.scale_M.isnan().tolist() == [False, False, True, True]
    assert_quantized_close(quantized, reference.norm_modulate_quantize(x_MK, shift_BK, scale_BK, EPS))


@pytest.mark.parametrize("head_columns", [None, 64, 96, 3072])
@pytest.mark.parametrize(("m", "k", "dtype"), [*SHAPES, (2, 12288, torch.bfloat16)])
def test_gelu_after_a_head(m, k, dtype, head_columns, device):
    x_MK = random_rows(m, k, dtype, columns_beside=48)
    head_MA = None if head_columns is None else random_rows(m, head_columns, dtype, seed=3, columns_beside=16)
    arguments = (copied(x_MK, device), None if head_MA is None else copied(head_MA, device))
    assert_close(gelu_triton(*arguments), reference.gelu(x_MK, head_MA), dtype)
    assert_quantized_close(gelu_quantize_triton(*arguments), reference.gelu_quantize(x_MK, head_MA))


@pytest.mark.parametrize("where", ["x", "head"])
def test_a_nan_on_either_side_of_the_joint_marks_the_token(where, device):
    x_MK, head_MA = random_rows(2, 256, torch.bfloat16), random_rows(2, 64, torch.bfloat16, seed=3)
    (x_MK if where == "x" else head_MA)[1, 7] = math.nan
    quantized = gelu_quantize_triton(copied(x_MK, device), copied(head_MA, device))
    assert_quantized_close(quantized, reference.gelu_quantize(x_MK, head_MA))
    assert not quantized.values_MP[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_far_from_zero(dtype, device):
    largest = torch.finfo(dtype).max
    numbers = [0.0, -0.0, 1e4, -1e4, largest, -largest, 1e-30, -9.0, math.inf, -math.inf, math.nan]
    x_MK = torch.tensor([numbers]).to(dtype)
    assert_close(gelu_triton(copied(x_MK, device), None), reference.gelu(x_MK, None), dtype)


def test_rows_that_registers_cannot_hold_are_refused(device):
    with pytest.raises(ValueError, match="40000 columns"):
        quantize_triton(torch.zeros(1, 40000, device=device))
