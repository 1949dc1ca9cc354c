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
from kernels.factored import TINY, square_sums, step_latents, update_square_sum
from kernels.training import codes_of

BETA2_DECAY = -0.8  # at step t the second moments keep 1 - t^-0.8 of themselves
MOST_RMS = 1.0  # of an update before the rate: the clipping, by weight, since no global norm is ever known


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
        # What changes from step to step lies on the device, where a CUDA graph of the backward pass reads it.
        self._rate, self._dampening = torch.zeros((), device=device), torch.zeros((), device=device)
        self._forget = torch.ones((), device=device)
        self._seed = torch.zeros((), dtype=torch.int64, device=device)  # of the step's random numbers
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        for place, (name, latent) in enumerate(latents.items()):
            rows, columns = local(latent).shape
            self.rows[name] = torch.zeros(rows, device=device)
            self.columns[name] = torch.zeros(columns, device=device)
            # Defaults bind the loop's variables.
            latent.register_post_accumulate_grad_hook(
                lambda latent, name=name, place=place: self._step(latent, name, place)  # type: ignore[misc]
            )

    def begin(self, step: int, rate: float, dampening: float = 0.0) -> None:
        """The coming backward makes the step of this number, from 0, at this learning rate, and `dampen`s the latents.

        Its random numbers follow from its number, the seed and the rank, so that there is no state of them to save.
        """
        self._rate.fill_(rate)
        self._dampening.fill_(dampening)
        self._forget.fill_(float(step + 1) ** BETA2_DECAY)
        self._seed.fill_(seed_of(self.seed, step, self.rank))

    @torch.no_grad()
    def _step(self, latent: Tensor, name: str, place: int) -> None:
        assert latent.grad is not None
        gradient, latent_NK, (rows, columns) = local(latent.grad), local(latent), latent.shape
        latent.grad = None
        row_N, column_K = self.rows[name], self.columns[name]
        row_sum_N, column_sum_K = square_sums(gradient)
        row_N.lerp_(row_sum_N / columns, self._forget)
        column_K.lerp_(over_ranks(latent, column_sum_K) / rows, self._forget)
        row_mean = over_ranks(latent, row_N.sum()) / rows
        # Divided first: the product of two small moments would not be a float32.
        ratio_N = row_N / row_mean.clamp(min=TINY)
        rms = (over_ranks(latent, update_square_sum(gradient, ratio_N, column_K)) / latent.numel()).sqrt()
        rate = self._rate / (rms / MOST_RMS).clamp(min=1.0)
        step_latents(latent_NK, gradient, ratio_N, column_K, rate, self._dampening, self._seed, place)


@torch.no_grad()
def dampen(latents: Sequence[Tensor], share: float) -> None:
    """Moves each of `latents` this share of its way to the code that it rounds to.

    Where the best weight lies between two codes, the gradient drives its latent to the threshold from both sides, and
    the code flips at every other step; with a fifth of the latents there, all others learn in that noise. A pull that
    grows settles them one by one, while the others still adapt (Nagel et al. 2022, "Overcoming Oscillations in
    Quantization-Aware Training", the dampening loss).
    """
    torch._foreach_lerp_(list(latents), [codes_of(latent) for latent in latents], share)


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
