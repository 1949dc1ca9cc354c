"""The latent weights' optimizer: it steps inside the backward pass, keeps factored moments, and rounds stochastically.

Adafactor (Shazeer & Stern 2018) without first moment. torch.optim.Adafactor would not do: it rounds its steps to the
nearest bfloat16, where most of them vanish, and cannot take its moments over the shards of a weight.

Legend: N rows, K columns of a weight; with several GPUs N counts the rows of this rank's shard.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitflux_core.distill_shards import local, over_ranks
from kernels.training import codes_of

BETA2_DECAY = -0.8  # at step t the second moments keep 1 - t^-0.8 of themselves
MOST_RMS = 1.0  # of an update before the rate: the clipping, by weight, since no global norm is ever known
_TINY = 1e-30  # epsilon_1 of the paper


class FactoredInBackward:
    """Steps each of `latents` (2-D, by name) as soon as its gradient is whole, and frees the gradient at once.

    So never more than one layer's gradients are alive. Call `begin` before each backward. Where the latents are
    FSDP2's shards of rows, row moments stay local and sums over rows are reduced over the ranks.
    """

    def __init__(self, latents: Mapping[str, nn.Parameter], seed: int):
        any_latent = next(iter(latents.values()))
        device = local(any_latent).device
        self.seed = seed
        self.rank = dist.get_rank() if isinstance(any_latent, DTensor) else 0
        self.generator = torch.Generator(device)  # of all latents, which step in the same order each time
        # What changes from step to step lies on the device, where a CUDA graph of the backward pass reads it.
        self._rate, self._dampening = torch.zeros((), device=device), torch.zeros((), device=device)
        self._forget = torch.ones((), device=device)
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        for name, latent in latents.items():
            rows, columns = local(latent).shape
            self.rows[name] = torch.zeros(rows, device=device)
            self.columns[name] = torch.zeros(columns, device=device)
            # Defaults bind the loop's variables.
            latent.register_post_accumulate_grad_hook(
                lambda latent, name=name: self._step(latent, name)  # type: ignore[misc]
            )

    def begin(self, step: int, rate: float, dampening: float = 0.0) -> None:
        """The coming backward makes the step of this number, from 0, at this learning rate, and `dampen`s the latents.

        Its random numbers follow from its number, the seed and the rank, so that there is no state of them to save.
        """
        self._rate.fill_(rate)
        self._dampening.fill_(dampening)
        self._forget.fill_(float(step + 1) ** BETA2_DECAY)
        self.generator.manual_seed(seed_of(self.seed, step, self.rank))

    @torch.no_grad()
    def _step(self, latent: Tensor, name: str) -> None:
        assert latent.grad is not None
        gradient, latent_NK, count = local(latent.grad).float(), local(latent), latent.shape[0]
        latent.grad = None
        square_NK = gradient.square()
        row_N, column_K = self.rows[name], self.columns[name]
        row_N.lerp_(square_NK.mean(dim=1), self._forget)
        column_K.lerp_(over_ranks(latent, square_NK.sum(dim=0)) / count, self._forget)
        del square_NK
        row_mean = over_ranks(latent, row_N.sum()) / count
        # Divided first: the product of two small moments would not be a float32.
        update_NK = (row_N / row_mean.clamp(min=_TINY))[:, None] * column_K
        update_NK.clamp_(min=_TINY).rsqrt_().mul_(gradient)
        del gradient
        rms = (over_ranks(latent, update_NK.square().sum()) / latent.numel()).sqrt()
        update_NK.mul_(-self._rate / (rms / MOST_RMS).clamp(min=1.0)).add_(latent_NK)
        update_NK.lerp_(codes_of(update_NK), self._dampening)
        latent_NK.copy_(stochastic_round(update_NK, latent_NK.dtype, self.generator))


@torch.no_grad()
def dampen(latents: Sequence[Tensor], share: float) -> None:
    """Moves each of `latents` this share of its way to the code that it rounds to.

    Where the best weight lies between two codes, the gradient drives its latent to the threshold from both sides, and
    the code flips at every other step; with a fifth of the latents there, all others learn in that noise. A pull that
    grows settles them one by one, while the others still adapt (Nagel et al. 2022, "Overcoming Oscillations in
    Quantization-Aware Training", the dampening loss).
    """
    torch._foreach_lerp_(list(latents), [codes_of(latent) for latent in latents], share)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean; to float32, `x` itself.

    A step far below a weight's last bit still moves it, on average by its size. x must be finite; it is overwritten.
    """
    if dtype == torch.float32:
        return x
    assert dtype == torch.bfloat16
    # The lower half of the bits is what bfloat16 drops: random bits below it carry with just the right probability.
    bits = x.view(torch.int32)
    bits.add_(torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=x.device, generator=generator))
    bits.bitwise_and_(-(1 << 16))
    return x.to(dtype)


def seed_of(*parts: int) -> int:
    """A seed of 63 bits for a generator, from small numbers; the same on every machine."""
    mixed = 0
    for part in parts:
        # One round of splitmix64 a part.
        mixed = (mixed + part + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1
