"""The three passes of a factored step against plain arithmetic in float64, by both their implementations."""

import pytest
import torch

from kernels import _factored_kernels, factored
from kernels.factored import TINY, stochastic_round

SHAPES = [(3, 20), (300, 70), (1, 5000)]


pytestmark = pytest.mark.usefixtures("filled_memory")


@pytest.fixture(params=["triton", "torch"])
def passes(request, device):
    """The three functions; on a GPU factored.py's own take the kernels as well."""
    return _factored_kernels if request.param == "triton" else factored


def case(shape, dtype, device):
    generator = torch.Generator().manual_seed(shape[1])
    gradient = (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(device)
    row = (0.1 + torch.rand(shape[0], generator=generator)).to(device)
    column = (0.1 + torch.rand(shape[1], generator=generator)).to(device)
    column[0] = 0.0  # a column whose gradient has always been 0
    gradient[:, 0] = 0.0
    return gradient.to(dtype), row, column


def exact_update(gradient, row, column):
    return gradient.double() / (row.double()[:, None] * column.double()).clamp(min=TINY).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares(shape, dtype, passes, device):
    gradient, row, column = case(shape, dtype, device)
    rows, columns = passes.square_sums(gradient)
    torch.testing.assert_close(rows.double(), gradient.double().square().sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns.double(), gradient.double().square().sum(0), rtol=1e-5, atol=1e-6)
    total = passes.update_square_sum(gradient, row, column)
    assert total.shape == ()
    torch.testing.assert_close(total.double(), exact_update(gradient, row, column).square().sum(), rtol=1e-5, atol=1e-6)


def stepped(passes, latent, gradient, row, column, rate, dampening, seed=5, place=0):
    latent = latent.clone()
    scalars = (torch.tensor(rate, device=latent.device), torch.tensor(dampening, device=latent.device))
    passes.step_latents(latent, gradient, row, column, *scalars, torch.tensor(seed, device=latent.device), place)
    return latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_with_dampening(shape, dtype, passes, device):
    gradient, row, column = case(shape, dtype, device)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    actual = stepped(passes, latent, gradient, row, column, 0.1, 0.25)
    moved = latent.double() - 0.1 * exact_update(gradient, row, column)
    code = (moved > 0.5).double() - (moved < -0.5).double()
    expected = moved + 0.25 * (code - moved)
    clear = (moved.abs() - 0.5).abs() > 1e-5  # of the threshold, where a rounding error makes another code
    torch.testing.assert_close(actual.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)


def test_bfloat16_latents_keep_their_mean_and_repeat(passes, device):
    shape = (64, 400)
    gradient, row, column = (
        torch.ones(shape, device=device),
        torch.ones(64, device=device),
        torch.ones(400, device=device),
    )
    latent = torch.full(shape, 0.25, dtype=torch.bfloat16, device=device)
    rate = 2**-12  # a quarter of the last bit below 0.25, which rounding to the nearest would lose
    first = stepped(passes, latent, gradient, row, column, rate, 0.0)
    assert first.unique().tolist() == [0.25 - 2**-10, 0.25]
    spread = 2**-10 * (0.25 * 0.75 / first.numel()) ** 0.5
    assert abs(first.double().mean().item() - (0.25 - rate)) < 5 * spread
    assert torch.equal(first, stepped(passes, latent, gradient, row, column, rate, 0.0))
    for seed, place in ((6, 0), (5, 1)):
        assert not torch.equal(first, stepped(passes, latent, gradient, row, column, rate, 0.0, seed, place))


@pytest.mark.parametrize("value", [1.0 + 2**-12, -0.3, 2**-9 + 2**-20])
def test_stochastic_rounding_keeps_the_mean(value):
    x = torch.full((200_000,), value)
    rounded = stochastic_round(x.clone(), torch.bfloat16, torch.Generator().manual_seed(0)).float()
    below, above = rounded.min().item(), rounded.max().item()
    gap = above - below
    assert gap == pytest.approx(2**-7 * 2 ** torch.tensor(abs(value)).log2().floor().item())  # neighbours
    assert rounded.unique().numel() == 2
    assert abs(rounded.mean().item() - value) < 5 * gap / 2 / len(x) ** 0.5


def test_what_bfloat16_holds_is_left_alone():
    x = torch.randn(1000).bfloat16().float()
    assert torch.equal(stochastic_round(x.clone(), torch.bfloat16, torch.Generator()).float(), x)
