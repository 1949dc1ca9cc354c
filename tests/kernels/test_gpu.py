"""On a GPU (`pytest -m gpu`): the operators at FLUX.1-dev's shapes and at ragged ones.

Memory that a kernel leaves unwritten is NaN or the largest integer here, and no input is drawn twice.
"""

import itertools
from typing import NamedTuple

import pytest
import torch

from kernels import ops, reference
from kernels.packing import pack_planes
from kernels.reference import Quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("filled_memory"),
]
SEEDS = itertools.count(int.from_bytes(b"flux", "big"))
LARGE = [(9216, 3072), (21504, 3072), (3072, 12288), (3072, 15360)]  # N, K
RAGGED = [(100, 72), (77, 130), (1000, 3000), (33, 7)]
CUDA = torch.device("cuda")


@pytest.fixture
def filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(CUDA).manual_seed(next(SEEDS))


class Weight(NamedTuple):
    codes_NK: torch.Tensor
    packed_NJ: torch.Tensor
    scale_N: torch.Tensor
    bias_N: torch.Tensor


def weight(features: int, in_features: int, generator: torch.Generator) -> Weight:
    codes_NK = torch.randint(-1, 2, (features, in_features), generator=generator, device=CUDA, dtype=torch.int8)
    scale_N = 0.5 + torch.rand(features, generator=generator, device=CUDA)
    bias_N = torch.randn(features, generator=generator, device=CUDA).bfloat16()
    return Weight(codes_NK, pack_planes(codes_NK), scale_N, bias_N)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=CUDA).to(dtype)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 17, 77, 512, 4608])
@pytest.mark.parametrize(("features", "in_features"), [*LARGE, *RAGGED])
def test_int8_sums_are_exact(features, in_features, tokens, generator):
    codes_NK, packed_NJ, scale_N, _ = weight(features, in_features, generator)
    values_MK = torch.randint(-127, 128, (tokens, in_features), generator=generator, device=CUDA, dtype=torch.int8)
    values_MK[0] = 127 * codes_NK[0]  # the largest sum there can be
    ones_M, sum_M = torch.ones(tokens, device=CUDA), values_MK.sum(dim=1, dtype=torch.int32)
    x = Quantized(reference.plane_padded(values_MK), ones_M, sum_M)
    given = {"in_features": in_features, "dtype": torch.float32}
    y_MN = ops.matmul_int8(x, packed_NJ, torch.ones_like(scale_N), **given)
    assert torch.equal(y_MN.double(), values_MK.double() @ codes_NK.double().t())


@pytest.mark.parametrize("tokens", [1, 4, 77, 4608])
@pytest.mark.parametrize(("features", "in_features"), [*LARGE, *RAGGED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_product(features, in_features, tokens, dtype, generator):
    codes_NK, packed_NJ, scale_N, bias_N = weight(features, in_features, generator)
    x_MK = normal(generator, tokens, in_features, dtype=dtype)
    y_MN = ops.matmul(x_MK, packed_NJ, scale_N, bias_N)
    expected_MN = (x_MK.double() @ codes_NK.double().t()) * scale_N.double() + bias_N.double()
    assert error(y_MN, expected_MN) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("int8", [False, True])
def test_gate_residual_and_bias(images, int8, generator):
    _, packed_NJ, scale_N, bias_N = weight(3072, 12288, generator)
    x_MK, residual_MN = normal(generator, images * 1024, 12288), 100 * normal(generator, images * 1024, 3072)
    gate_BN = normal(generator, images, 2 * 3072)[:, 3072:]
    weights, extra = (packed_NJ, scale_N, bias_N), {"gate_BN": gate_BN, "residual_MN": residual_MN}
    if int8:
        x = ops.quantize(x_MK)
        y_MN = ops.matmul_int8(x, *weights, **extra, in_features=12288, dtype=torch.bfloat16)
        expected_MN = reference.matmul_int8(x, *weights, gate_BN, residual_MN, 12288, torch.float32)
    else:
        y_MN = ops.matmul(x_MK, *weights, **extra)
        expected_MN = reference.matmul(x_MK.double().float(), *weights, gate_BN, residual_MN, 12288)
    assert error(y_MN, expected_MN) < 3e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_stays_in_its_row(bad, int8, generator):
    _, packed_NJ, scale_N, bias_N = weight(3072, 3072, generator)
    x_MK = normal(generator, 300, 3072)
    spoilt_MK = x_MK.clone()
    spoilt_MK[137, 1234] = bad

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        if not int8:
            return ops.matmul(x_MK, packed_NJ, scale_N, bias_N)
        given = {"in_features": 3072, "dtype": torch.bfloat16}
        return ops.matmul_int8(ops.quantize(x_MK), packed_NJ, scale_N, bias_N, **given)

    clean_MN, spoilt_MN = product(x_MK), product(spoilt_MK)
    others = torch.arange(300, device=CUDA) != 137
    assert torch.equal(clean_MN[others], spoilt_MN[others])
    if int8:
        assert spoilt_MN[137].isnan().all()
    else:
        assert not spoilt_MN[137].isfinite().any()


@pytest.mark.parametrize(("tokens", "width"), [(4608, 3072), (512, 12288), (1, 3072), (5, 1000)])
def test_quantized_tokens_are_the_references(tokens, width, generator):
    x_MK = normal(generator, tokens, width)
    x_MK[0] = 0
    ours, theirs = ops.quantize(x_MK), reference.quantize(x_MK.cpu())
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.cpu(), expected)


@pytest.mark.parametrize(("images", "tokens"), [(1, 4608), (2, 512), (3, 1)])
def test_norm_and_modulation(images, tokens, generator):
    x_MK = 3 + normal(generator, images * tokens, 3072)
    shift_BK, scale_BK, *_ = normal(generator, images, 6 * 3072).chunk(6, dim=1)
    expected_MK = reference.norm_modulate(x_MK.float(), shift_BK.float(), scale_BK.float(), 1e-6)
    assert error(ops.norm_modulate(x_MK, shift_BK, scale_BK, 1e-6), expected_MK) < 3e-3
    values_MP, scale_M, sum_M = ops.norm_modulate_quantize(x_MK, shift_BK, scale_BK, 1e-6)
    assert (values_MP * scale_M[:, None] - expected_MK).abs().le(0.51 * scale_M[:, None]).all()
    assert torch.equal(sum_M.long(), values_MP.long().sum(dim=1))


def test_gelu_beside_attention(generator):
    wide_MN, head_MA = normal(generator, 4608, 21504), normal(generator, 4608, 3072)
    x_MK = wide_MN[:, 9216:]
    expected_MK = reference.gelu(x_MK.float(), head_MA.float())
    assert error(ops.gelu(x_MK, head_MA), expected_MK) < 3e-3
    values_MP, scale_M, sum_M = ops.gelu_quantize(x_MK, head_MA)
    assert (values_MP * scale_M[:, None] - expected_MK).abs().le(0.51 * scale_M[:, None]).all()
    assert torch.equal(sum_M.long(), values_MP.long().sum(dim=1))


@pytest.mark.parametrize("images", [1, 2])
def test_rotary_embedding(images, generator):
    qkv, text_qkv = normal(generator, images, 4096, 9216), normal(generator, images, 512, 9216)
    weights = [normal(generator, 128) for _ in range(4)]
    rotary = (normal(generator, 4608, 128, dtype=torch.float32), normal(generator, 4608, 128, dtype=torch.float32))
    ours = ops.qk_norm_rope(qkv, text_qkv, 24, tuple(weights[:2]), tuple(weights[2:]), rotary, 1e-6)
    wide = [x.float() for x in (qkv, text_qkv)]
    theirs = reference.qk_norm_rope(*wide, 24, tuple(weights[:2]), tuple(weights[2:]), *rotary, 1e-6)
    for mine, expected in zip(ours, theirs, strict=True):
        assert error(mine, expected) < 3e-3
