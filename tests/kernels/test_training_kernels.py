"""Kernels of training against plain torch and its autograd, in float64."""

import pytest
import torch

from kernels import _training_kernels, reference, training

EPS = 1e-6
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 2e-5}
# images, tokens, heads, head size: one tile, several, rows that end within a tile, more tiles than a program's share
ROTARY = [(2, 3, 8, 32), (1, 5, 24, 128), (3, 43, 5, 16), (1, 1, 1, 256)]
WEIGHTS = [(3, 20), (5, 256), (2, 5000)]


pytestmark = pytest.mark.usefixtures("filled_memory")


@pytest.fixture
def by_triton(monkeypatch):
    """The operators run their kernels, under the interpreter where there is no GPU."""
    monkeypatch.setattr(training, "_by_triton", lambda _tensor: True)


def rotary_case(case, dtype, device):
    images, tokens, heads, size = case
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(images, tokens, heads, size, generator=generator).to(device, dtype)
    weight = (1 + 0.3 * torch.randn(size, generator=generator)).to(device)
    angles = torch.randn(tokens, size // 2, generator=generator).repeat_interleave(2, dim=1).to(device)
    grad = torch.randn(images, tokens, heads, size, generator=generator).to(device, dtype)
    return x, weight, angles.cos(), angles.sin(), grad


def plain_norm_rope(x, weight, cos, sin):
    """Each pair of columns as a complex number, turned by cos + i sin."""
    normed = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)[:, None, ::2]
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", ROTARY, ids=str)
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_norm_and_rotary_embedding_with_their_gradients(case, dtype, kernels, device, monkeypatch):
    monkeypatch.setattr(training, "_by_triton", lambda _tensor: kernels)
    monkeypatch.setattr(_training_kernels, "_PROGRAMS", 3)  # so that programs take several tiles
    x, weight, cos, sin, grad = rotary_case(case, dtype, device)
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = training.norm_rope(*mine, cos, sin, EPS)
    assert y.dtype == dtype
    y.backward(grad)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = plain_norm_rope(*exact, cos.double(), sin.double())
    expected.backward(grad.double())
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[0].grad.double(), exact[0].grad, rtol=tolerance, atol=tolerance)
    assert mine[1].grad.dtype == torch.float32
    torch.testing.assert_close(mine[1].grad.double(), exact[1].grad, rtol=tolerance, atol=20 * tolerance)


def test_heads_that_do_not_lie_side_by_side(by_triton, device):
    """Of a projection that holds more columns; a gradient that is a part of the joint sequence's."""
    x, weight, cos, sin, grad = rotary_case((2, 3, 4, 16), torch.float32, device)
    wide, long = torch.cat([x, 1 + x], dim=2), torch.cat([grad, 1 + grad], dim=1)
    results = []
    for view, gradient in ((wide[:, :, :4], long[:, :3]), (x, grad)):
        leaf = view.detach().requires_grad_()
        y = training.norm_rope(leaf, weight, cos, sin, EPS)
        y.backward(gradient)
        results.append((y, leaf.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_head_sizes_that_are_no_power_of_two_are_refused(by_triton, device):
    x = torch.zeros(1, 1, 1, 24, device=device)
    with pytest.raises(ValueError, match="heads of 24 columns"):
        training.norm_rope(x, x[0, 0, 0], x[0, :, 0], x[0, :, 0], EPS)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_the_weight_of_latents_with_its_gradients(shape, latent_dtype, dtype, kernels, device, monkeypatch):
    monkeypatch.setattr(training, "_by_triton", lambda _tensor: kernels)
    generator = torch.Generator().manual_seed(shape[1])
    latent = torch.randn(shape, generator=generator).to(device, latent_dtype)
    latent[0, :6] = torch.tensor([-0.5, 0.5, -0.51, 0.51, -7.0, 0.0])
    log_scale = torch.randn(shape[0], generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    leaves = [latent.clone().requires_grad_(), log_scale.clone().requires_grad_()]
    weight = training.latent_weight(*leaves, dtype)
    assert weight.dtype == dtype
    weight.backward(grad)

    codes = (latent > 0.5).double() - (latent < -0.5).double()
    assert codes[0, :6].tolist() == [0, 0, -1, 1, -1, 0]
    scale, tolerance = log_scale.double().exp(), TOLERANCES[dtype]
    torch.testing.assert_close(weight.double(), codes * scale[:, None], rtol=tolerance, atol=0)
    assert (leaves[0].grad.dtype, leaves[1].grad.dtype) == (latent_dtype, torch.float32)
    rounded = max(tolerance, TOLERANCES[latent_dtype])
    torch.testing.assert_close(leaves[0].grad.double(), grad.double() * scale[:, None], rtol=rounded, atol=0)
    torch.testing.assert_close(
        leaves[1].grad.double(), (grad.double() * codes).sum(1) * scale, rtol=1e-4, atol=1e-4 * scale.max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [20, 1280, 5000])
def test_rounding_to_int8_is_the_references_and_passes_gradients(dtype, width, by_triton, device):
    x = (10 * torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[0, 1] = 0.0
    x[1, 2, 3] = torch.inf
    leaf = x.to(device).requires_grad_()
    y = training.rounded_to_int8(leaf)
    expected = reference.rounded_to_int8(x)
    assert expected[1, 2].isnan().all()
    truncated = dtype == torch.bfloat16 and device.type == "cpu"  # as the interpreter makes bfloat16 of float32
    torch.testing.assert_close(y.cpu(), expected, rtol=2**-7 if truncated else 0, atol=0, equal_nan=True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    y.backward(grad)
    assert torch.equal(leaf.grad, grad)
