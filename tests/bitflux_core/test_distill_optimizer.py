"""Factored moments as torch's Adafactor has them, unbiased rounding to bfloat16, and gradients freed at once."""

import pytest
import torch
from torch import nn

from bitflux_core.distill_optimizer import FactoredInBackward, dampen, seed_of
from kernels.training import codes_of


def test_in_float32_it_is_torchs_adafactor():
    torch.manual_seed(0)
    mine = nn.Parameter(0.1 * torch.randn(12, 20))
    theirs = nn.Parameter(mine.detach().clone())
    # torch multiplies the rate by the weight's RMS, but by at least the second eps: here 1, as if there were no RMS.
    adafactor = torch.optim.Adafactor([theirs], lr=1e-3, eps=(1e-15, 1.0))
    factored = FactoredInBackward({"mine": mine}, seed=0)
    for step in range(20):
        gradient = torch.randn(12, 20) * torch.rand(12, 1) * (10.0 if step == 7 else 0.1)
        factored.begin(step, 1e-3)
        (mine * gradient).sum().backward()
        theirs.grad = gradient
        adafactor.step()
    torch.testing.assert_close(mine, theirs)
    assert (mine.detach() - theirs.detach()).abs().max() < 1e-6


def test_the_gradients_size_does_not_matter():
    moved = []
    for size in (1e-9, 1.0):
        latent = nn.Parameter(torch.zeros(4, 6))
        FactoredInBackward({"latent": latent}, seed=0).begin(0, rate=1.0)
        (size * latent).sum().backward()
        moved.append(latent.detach())
    torch.testing.assert_close(*moved)


def test_gradients_are_freed_layer_by_layer():
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    latents = dict(layers.named_parameters())
    factored = FactoredInBackward(latents, seed=0)
    alive = []
    for latent in latents.values():
        latent.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in latents.values()))
        )
    before = [latent.detach().clone() for latent in latents.values()]
    factored.begin(0, 0.1)
    layers(torch.randn(4, 8)).square().sum().backward()
    assert alive == [0, 0, 0]
    assert all(not torch.equal(old, new) for old, new in zip(before, latents.values(), strict=True))


def test_small_steps_add_up_in_bfloat16():
    latent = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    factored = FactoredInBackward({"latent": latent}, seed=0)
    for step in range(100):
        factored.begin(step, 1e-4)  # the last bit is 0.004 below 1: to the nearest, nothing would ever move
        latent.float().sum().backward()
    assert latent.float().mean().item() == pytest.approx(1 - 0.01, abs=1e-3)


def test_no_two_steps_or_weights_round_by_the_same_bits():
    """From 1 by half a last bit: which elements move is up to the random bits alone."""
    latents = {name: nn.Parameter(torch.empty(64, 64, dtype=torch.bfloat16)) for name in ("a", "b")}
    factored = FactoredInBackward(latents, seed=0)

    def moved(step: int) -> list[torch.Tensor]:
        for latent in latents.values():
            latent.data.fill_(1.0)
        factored.begin(step, 2.0**-9)
        sum(latent.float().sum() for latent in latents.values()).backward()
        return [latent.detach() < 1 for latent in latents.values()]

    first, second, third = moved(0), moved(1), moved(2)
    for one, other in ((first, second), (second, third), (first, third)):
        for mine, theirs in zip(one, other, strict=True):
            assert 0.45 < (mine == theirs).float().mean() < 0.55
    for weights in (first, second, third):
        assert 0.45 < (weights[0] == weights[1]).float().mean() < 0.55
        assert all(0.45 < pattern.float().mean() < 0.55 for pattern in weights)
    assert all(torch.equal(mine, again) for mine, again in zip(first, moved(0), strict=True))


def test_seeds_differ_and_fit_a_generator():
    seeds = {seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dampening_pulls_latents_to_their_codes():
    latent = torch.tensor([[0.4, 0.6, -0.9], [1.4, -0.2, 0.0]])
    dampen([latent], 0.5)
    torch.testing.assert_close(latent, torch.tensor([[0.2, 0.8, -0.95], [1.2, -0.1, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dampened_latents_leave_the_threshold(dtype):
    """Targets between two codes: the gradient drives every latent to the threshold, from both sides."""
    torch.manual_seed(0)
    target_NK = 0.5 + 0.05 * torch.randn(32, 32)

    def spread(dampening: float) -> float:
        latent = nn.Parameter(torch.full((32, 32), 0.4, dtype=dtype))
        factored = FactoredInBackward({"latent": latent}, seed=0)
        for step in range(200):
            factored.begin(step, 0.02, 0.02 * dampening)
            # Straight through: the latents' gradient is the codes'.
            codes_NK = latent + (codes_of(latent) - latent).detach()
            (codes_NK - target_NK).square().sum().backward()
        return (latent.float() - 0.5).abs().mean().item()

    assert spread(4.0) > 3 * spread(0.0)
