"""Rounding column after column against the same in float64, a row at a time, by both its implementations."""

import pytest
import torch

from bitflux_core.quantizer import compensation
from bitflux_core.quantizer.compensation import Compensator, InputMoments
from kernels import _column_kernels, columns
from kernels.columns import LIMIT

SHAPES = [(3, 20), (40, LIMIT), (17, 1)]  # rows, columns of the block
START = 5  # where the block lies in its matrices


pytestmark = pytest.mark.usefixtures("filled_memory")


@pytest.fixture(params=["triton", "torch"])
def implementation(request, device):
    """The two functions; on a GPU columns.py's own take the kernels as well."""
    return _column_kernels if request.param == "triton" else columns


def case(shape, device):
    """A block of wider matrices, as views: values, scales, the covariance of the columns and its upper factor."""
    rows, width = shape
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(4 * width + 8, width, generator=generator).double()
    covariance = inputs.T @ inputs / len(inputs)
    factor = torch.linalg.cholesky(covariance, upper=True)

    def placed(block):
        wide = torch.full((block.shape[0] + START, width + 2 * START), torch.nan, device=device)
        wide[START:, START : START + width] = block
        return wide[START:, START : START + width]

    values = torch.randn(rows, width, generator=generator)
    scale = (0.5 + torch.rand(rows, generator=generator)).to(device)
    codes = torch.randint(-1, 2, (rows, width), generator=generator).float()
    return placed(values), scale, placed(covariance.float()), placed(factor.float()), placed(codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_carried_to_the_columns_behind(implementation, shape, device):
    rest, scale, _, factor, codes = case(shape, device)
    wanted, exact = rest.double().clone(), factor.double()
    codes.fill_(torch.nan)
    errors = implementation.round_columns(rest, scale, factor, codes)
    for column in range(shape[1]):
        code = (wanted[:, column] / scale.double()).round().clamp(-1, 1)
        error = (wanted[:, column] - code * scale.double()) / exact[column, column]
        wanted[:, column:] -= error[:, None] * exact[column, column:]
        assert torch.equal(codes[:, column].double(), code), column
        torch.testing.assert_close(errors[:, column].double(), error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_of_descent_never_raises_the_error(implementation, shape, device):
    target, scale, covariance, _, codes = case(shape, device)
    before, exact = codes.double().clone(), covariance.double()
    target = target.double().clone()

    def lost(codes):
        difference = target - codes * scale.double()[:, None]
        return ((difference @ exact) * difference).sum(1)

    slope = (target - before * scale.double()[:, None]) @ exact
    block = torch.full((shape[0], shape[1] + START), torch.nan, device=device)
    block[:, START:] = slope
    steps = implementation.descend_columns(block[:, START:], scale, covariance, codes)
    now = before.clone()
    for column in range(shape[1]):
        moved = now[:, column] + slope[:, column] / (scale.double() * exact[column, column])
        code = moved.round().clamp(-1, 1)
        slope -= ((code - now[:, column]) * scale.double())[:, None] * exact[column]
        now[:, column] = code
    assert torch.equal(codes.double(), now)
    torch.testing.assert_close(steps.double(), (now - before) * scale.double()[:, None])
    assert (lost(now) <= lost(before) + 1e-9).all()
    assert lost(now).sum() < lost(before).sum()


def test_halves_become_zero_as_torch_rounds_them(implementation, device):
    rest = torch.tensor([[0.5, -0.5, 0.75]], device=device)
    codes = torch.empty(1, 3, device=device)
    implementation.round_columns(rest, torch.ones(1, device=device), torch.eye(3, device=device), codes)
    assert codes.tolist() == [[0.0, 0.0, 1.0]]


def test_what_is_no_number_does_not_become_a_code(implementation, device):
    rest = torch.tensor([[torch.nan, 1.0]], device=device)
    codes = torch.empty(1, 2, device=device)
    implementation.round_columns(rest, torch.ones(1, device=device), torch.eye(2, device=device), codes)
    assert codes[0, 0].isnan()


def test_a_layers_codes_are_those_of_plain_torch(device, monkeypatch):
    """Two blocks of columns, the second one narrower, and the covariances as they come."""
    width = LIMIT + 7
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, width, generator=generator) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(6, width, generator=generator)

    def quantized(where):
        moments = InputMoments(width, where)
        moments.add(inputs.to(where), (inputs + 0.1).to(where))
        return Compensator(moments).quantize(weight.to(where))[0]

    expected = quantized(torch.device("cpu"))
    for name in ("round_columns", "descend_columns"):
        monkeypatch.setattr(compensation, name, getattr(_column_kernels, name))
    actual = quantized(device)
    assert (actual.codes_NK.cpu() == expected.codes_NK).float().mean() > 0.999
    torch.testing.assert_close(actual.scale_N.cpu(), expected.scale_N, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["round_columns", "descend_columns"])
def test_matrices_that_lie_by_columns_are_refused(name, device):
    block, square = torch.zeros(2, 4, device=device), torch.ones(4, 4, device=device).T
    with pytest.raises(ValueError, match="columns lie side by side"):
        getattr(_column_kernels, name)(block, torch.ones(2, device=device), square, block.clone())


@pytest.mark.parametrize("function", [columns.round_columns, columns.descend_columns])
def test_wider_blocks_are_refused(function, device):
    block, square = torch.zeros(2, LIMIT + 1, device=device), torch.eye(LIMIT + 1, device=device)
    with pytest.raises(ValueError, match="a block of 129 columns: 128 is the most"):
        function(block, torch.ones(2, device=device), square, block.clone())
