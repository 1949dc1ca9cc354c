"""The fused matrix products against the plain torch reference: integer sums exactly, floating ones against float64."""

import random

import pytest
import torch

from kernels import reference
from kernels.gemm import (
    GemmConfig,
    config_from_dict,
    config_to_dict,
    default_config,
    matmul_digits_triton,
    matmul_int8_triton,
    matmul_triton,
    unpack,
)
from kernels.packing import pack_planes, unpack_planes

WIDE = GemmConfig(block_n=32, block_m=16, block_j=32, warps=4, stages=2)
CONFIGS = {
    "wide": WIDE,
    "tall": GemmConfig(block_n=16, block_m=32, block_j=32, warps=4, stages=3, group=2, subtiles=2),
    "flat": GemmConfig(block_n=16, block_m=64, block_j=64, warps=4, stages=2, group=1, flatten=True, subtiles=4),
    "pointers": GemmConfig(block_n=32, block_m=32, block_j=32, warps=4, stages=2, group=2, kernel="pointers"),
}
SHAPES = [(1, 16, 64), (2, 33, 64), (4, 5, 7), (16, 48, 256), (17, 31, 130), (64, 32, 128), (50, 70, 200)]  # M, N, K


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    chance = random.Random(5)
    return [(chance.randint(1, 70), chance.randint(1, 80), chance.randint(1, 400)) for _ in range(count)]


class Case:
    """Random operands; `images` 0 stands for no gate."""

    def __init__(self, m, n, k, device, images=0, bias=False, residual=False, dtype=torch.float32):
        generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
        self.codes_NK = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8).to(device)
        self.packed_NJ = pack_planes(self.codes_NK)
        self.scale_N = torch.rand(n, generator=generator).to(device) + 0.5
        self.x_MK = torch.randn(m, k, generator=generator).to(device, dtype)

        def optional(wanted, *shape):
            return torch.randn(*shape, generator=generator).to(device, dtype) if wanted else None

        self.bias_N = optional(bias, n)
        self.gate_BN = optional(images, images, n)
        self.residual_MN = optional(residual, m, n)

    @property
    def weight(self):
        return self.packed_NJ, self.scale_N, self.bias_N, self.gate_BN, self.residual_MN, self.codes_NK.shape[1]

    def expected(self, x_MK):
        """In float64."""
        y_MN = x_MK.double() @ self.codes_NK.double().t() * self.scale_N.double()
        return reference._epilogue(y_MN, self.bias_N, self.gate_BN, self.residual_MN)

    def rounding(self, x_MK):
        """[M, N]: the length of x times that of a row of the weight, to which errors of a sum are relative."""
        gate = 1 if self.gate_BN is None else reference._per_token(self.gate_BN, x_MK).double().abs()
        lengths_N = self.codes_NK.double().norm(dim=1) * self.scale_N.double()
        return x_MK.double().norm(dim=1)[:, None] * lengths_N * gate


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_sums_are_exact(m, n, k, config, device):
    case = Case(m, n, k, device)
    x = reference.quantize(case.x_MK)
    ones_M, ones_N = torch.ones(m, device=device), torch.ones(n, device=device)
    rest = (case.packed_NJ, ones_N, None, None, None, k, torch.float32)
    y_MN = matmul_int8_triton(x.values_MP, ones_M, x.sum_M, *rest, config)
    assert torch.equal(y_MN, reference.matmul_int8(x._replace(scale_M=ones_M), *rest))


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="the kernel is for compute capability 9.0 and has no interpreter")
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(256, 128, 32, warps=8, stages=4, group=2, subtiles=4, kernel="hopper"),
        GemmConfig(128, 64, 64, warps=4, stages=2, subtiles=2, kernel="hopper", residents=2),
        GemmConfig(64, 16, 64, warps=4, stages=3, kernel="hopper"),
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (600, 520, 3072), (130, 257, 1000)])
def test_hopper_kernel(m, n, k, config, device):
    case = Case(m, n, k, device, images=1 + (m % 2 == 0), bias=True, residual=True, dtype=torch.bfloat16)
    x = reference.quantize(case.x_MK)
    ones_M, ones_N = torch.ones(m, device=device), torch.ones(n, device=device)
    rest = (case.packed_NJ, ones_N, None, None, None, k, torch.float32)
    y_MN = matmul_int8_triton(x.values_MP, ones_M, x.sum_M, *rest, config)
    assert torch.equal(y_MN, reference.matmul_int8(x._replace(scale_M=ones_M), *rest))
    expected_MN = reference.matmul_int8(x, *case.weight, torch.bfloat16)
    torch.testing.assert_close(matmul_int8_triton(*x, *case.weight, torch.bfloat16, config), expected_MN)
    y_MN = matmul_triton(case.x_MK, *case.weight, config)
    error_MN = (y_MN.double() - case.expected(case.x_MK)).abs()
    bound_MN = 4e-3 * case.expected(case.x_MK).abs() + 2e-5 * case.rounding(case.x_MK) + 1e-6
    assert (error_MN <= bound_MN).all()


@pytest.mark.parametrize(("m", "n", "k"), random_shapes(8))
def test_random_shapes(m, n, k, device):
    case = Case(m, n, k, device, bias=True)
    x = reference.quantize(case.x_MK)
    y_MN = matmul_int8_triton(*x, *case.weight, torch.float32, CONFIGS["tall"])
    torch.testing.assert_close(y_MN, reference.matmul_int8(x, *case.weight, torch.float32), rtol=1e-6, atol=1e-6)
    x_MK = case.x_MK.half()
    y_MN = matmul_triton(x_MK, *case.weight, WIDE)
    error_MN = (y_MN.double() - case.expected(x_MK)).abs()
    assert (error_MN <= 1e-3 * case.expected(x_MK).abs() + 2e-5 * case.rounding(x_MK) + 1e-7).all()


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_epilogue(dtype, bias, residual, images, device):
    case = Case(34, 40, 96, device, images, bias, residual, dtype)
    x = reference.quantize(case.x_MK)
    config = CONFIGS["tall"]
    y_MN = matmul_int8_triton(*x, *case.weight, dtype, config)
    expected_MN = reference.matmul_int8(x, *case.weight, torch.float32)
    nearest = 2 ** (-8 if dtype == torch.bfloat16 else -11)
    rounding = 2 * nearest if device.type == "cpu" and dtype == torch.bfloat16 else nearest  # the interpreter truncates
    assert y_MN.dtype == dtype
    assert ((y_MN.float() - expected_MN).abs() <= 1.01 * rounding * expected_MN.abs() + 1e-5).all()
    y_MN = matmul_triton(case.x_MK, *case.weight, config)
    error_MN = (y_MN.double() - case.expected(case.x_MK)).abs()
    bound_MN = 1.01 * rounding * case.expected(case.x_MK).abs() + 2e-5 * case.rounding(case.x_MK) + 1e-6
    assert y_MN.dtype == dtype
    assert (error_MN <= bound_MN).all()


def test_default_blocks(device):
    for m in (1, 4, 33):
        case = Case(m, 40, 100, device, bias=True, dtype=torch.bfloat16)
        x = reference.quantize(case.x_MK)
        y_MN = matmul_int8_triton(*x, *case.weight, torch.bfloat16)
        torch.testing.assert_close(y_MN, reference.matmul_int8(x, *case.weight, torch.bfloat16))
        for product in (matmul_triton, matmul_digits_triton):
            torch.testing.assert_close(product(case.x_MK, *case.weight), reference.matmul(case.x_MK, *case.weight))


@pytest.mark.parametrize("value", [0, 127, -127])
def test_zero_and_saturated_tokens(value, device):
    case = Case(18, 20, 260, device)
    x_MK = case.x_MK.clone()
    x_MK[3] = value
    x_MK[5] = value * torch.where(torch.arange(260, device=device) % 2 == 0, 1.0, -1.0)
    case.codes_NK[:2] = torch.tensor([[1], [-1]])
    case.packed_NJ = pack_planes(case.codes_NK)
    x = reference.quantize(x_MK)
    expected_MN = reference.matmul_int8(x, *case.weight, torch.float32)
    torch.testing.assert_close(
        matmul_int8_triton(*x, *case.weight, torch.float32, WIDE), expected_MN, rtol=1e-6, atol=0
    )
    y_MN = matmul_triton(x_MK.bfloat16(), *case.weight, WIDE)
    torch.testing.assert_close(y_MN, reference.matmul(x_MK.bfloat16(), *case.weight))


def test_rows_may_be_apart(device):
    case = Case(19, 24, 64, device, residual=True, dtype=torch.bfloat16)
    wide_x = torch.full((19, 3 * 64 + 8), torch.nan, dtype=torch.bfloat16, device=device)
    wide_residual = torch.full((19, 50), torch.nan, dtype=torch.bfloat16, device=device)
    wide_x[:, 64:128], wide_residual[:, 5:29] = case.x_MK, case.residual_MN
    case.residual_MN = wide_residual[:, 5:29]
    expected_MN = reference.matmul(case.x_MK, *case.weight)
    torch.testing.assert_close(matmul_triton(wide_x[:, 64:128], *case.weight, WIDE), expected_MN)
    wide_x[:, 3:67] = case.x_MK  # begins where no tensor descriptor may
    torch.testing.assert_close(matmul_triton(wide_x[:, 3:67], *case.weight, WIDE), expected_MN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("m", "k"), [(20, 64), (3, 72), (20, 130)])
def test_what_is_not_finite_stays_in_its_row(m, k, value, device):
    case = Case(m, 36, k, device, bias=True, dtype=torch.bfloat16)
    clean_MK, dirty_MK = case.x_MK, case.x_MK.clone()
    dirty_MK[1, k - 1] = value
    others = [row for row in range(m) if row != 1]
    y_MN = matmul_triton(dirty_MK, *case.weight, CONFIGS["tall"])
    assert not y_MN[1].isfinite().any()
    assert torch.equal(y_MN[others], matmul_triton(clean_MK, *case.weight, CONFIGS["tall"])[others])
    x = reference.quantize(dirty_MK)
    y_MN = matmul_int8_triton(*x, *case.weight, torch.bfloat16, WIDE)
    assert y_MN[1].isnan().all()
    clean_MN = matmul_int8_triton(*reference.quantize(clean_MK), *case.weight, torch.bfloat16, WIDE)
    assert torch.equal(y_MN[others], clean_MN[others])


FEW = [GemmConfig(32, 16, 32, warps=4, stages=2), GemmConfig(32, 16, 32, warps=4, stages=2, kernel="pointers")]
if HOPPER:
    FEW += [GemmConfig(128, m, 128, warps=4, stages=4, kernel="hopper") for m in (8, 16)]


@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 64), (2, 33, 64), (3, 48, 256), (4, 31, 130), (9, 40, 200)])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_digits(m, n, k, images, config, device):
    case = Case(m, n, k, device, images=images if m % 2 == 0 else 0, bias=True, residual=True, dtype=torch.float16)
    case.x_MK[0, 1] = 3000  # beside which the token's other numbers are small
    y_MN = matmul_digits_triton(case.x_MK, *case.weight, config)
    error_MN = (y_MN.double() - case.expected(case.x_MK)).abs()
    assert (error_MN <= 1e-3 * case.expected(case.x_MK).abs() + 2e-6 * case.rounding(case.x_MK) + 1e-6).all()


def test_digits_of_what_is_not_finite(device):
    case = Case(4, 36, 72, device, bias=True, dtype=torch.bfloat16)
    clean_MN = matmul_digits_triton(case.x_MK, *case.weight, WIDE)
    case.x_MK[1, 70], case.x_MK[2, 3] = torch.inf, torch.nan
    y_MN = matmul_digits_triton(case.x_MK, *case.weight, WIDE)
    assert y_MN[1:3].isnan().all()
    assert torch.equal(y_MN[[0, 3]], clean_MN[[0, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_and_small_values(dtype, device):
    """The decoded codes are exact, so that the range of x is that of its dtype."""
    case = Case(4, 16, 64, device, dtype=dtype)
    for factor in (1e5 if dtype == torch.bfloat16 else 1e3, 1e-4):
        x_MK = (case.x_MK.float() * factor).to(dtype)
        torch.testing.assert_close(matmul_triton(x_MK, *case.weight, WIDE), reference.matmul(x_MK, *case.weight))


def test_float32_is_refused(device):
    case = Case(4, 16, 64, device)
    for product in (matmul_triton, matmul_digits_triton):
        with pytest.raises(ValueError, match="float32"):
            product(case.x_MK, *case.weight, WIDE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(3, 64), (5, 130), (2, 4500)])
def test_unpack(n, k, dtype, device):
    case = Case(1, n, k, device)
    codes_NK = unpack(case.packed_NJ, k, dtype)
    assert codes_NK.dtype == dtype
    assert torch.equal(codes_NK.float(), unpack_planes(case.packed_NJ, k).float())


def test_config_survives_a_dictionary():
    config = default_config("int8", 4608, 9216, 3072, 90)
    assert config_from_dict(config_to_dict(config)) == config
