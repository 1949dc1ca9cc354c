"""A step of factored-moment Adafactor over one weight, in three passes that read the gradient and keep no copy of it.

In plain torch a step takes some fifteen passes, most over float32 copies; a model of 11.9 billion parameters spent a
quarter of its training there. Between the passes the caller updates the moments, of a row and a column each.

Legend: N rows and K columns of a weight. On CUDA Triton kernels run (kernels/_factored_kernels.py), elsewhere plain
torch. All sums have a fixed order: the same bits in every run, on one kind of device.
"""

import torch
from torch import Tensor

from kernels.training import codes_of

TINY = 1e-30  # epsilon_1 of Adafactor (Shazeer & Stern 2018)


def square_sums(gradient_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the squares of each row [N] and of each column [K], in float32."""
    if gradient_NK.is_cuda:
        return _kernels().square_sums(gradient_NK)
    square_NK = gradient_NK.float().square()
    return square_NK.sum(dim=1), square_NK.sum(dim=0)


def update_square_sum(gradient_NK: Tensor, row_N: Tensor, column_K: Tensor) -> Tensor:
    """The sum of squares, a float32 scalar, of the update gradient / sqrt(row x column)."""
    if gradient_NK.is_cuda:
        return _kernels().update_square_sum(gradient_NK, row_N, column_K)
    return _update(gradient_NK, row_N, column_K).square().sum()


def step_latents(
    latent_NK: Tensor,
    gradient_NK: Tensor,
    row_N: Tensor,
    column_K: Tensor,
    rate: Tensor,
    dampening: Tensor,
    seed: Tensor,
    place: int,
) -> None:
    """latents - rate x update, then moved by the share `dampening` to their codes, and rounded to their dtype in place.

    bfloat16 is rounded to stochastically, with random numbers of `seed` (an int64 scalar on the device) and `place`,
    which tells weights apart that share a seed. `rate` and `dampening` are float32 scalars on the device.
    """
    if gradient_NK.is_cuda:
        _kernels().step_latents(latent_NK, gradient_NK, row_N, column_K, rate, dampening, seed, place)
        return
    update_NK = _update(gradient_NK, row_N, column_K).mul_(-rate).add_(latent_NK)
    update_NK.lerp_(codes_of(update_NK), dampening)
    generator = torch.Generator().manual_seed(int(seed) + place)
    latent_NK.copy_(stochastic_round(update_NK, latent_NK.dtype, generator))


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


def _update(gradient_NK: Tensor, row_N: Tensor, column_K: Tensor) -> Tensor:
    return (row_N[:, None] * column_K).clamp_(min=TINY).rsqrt_().mul_(gradient_NK)


def _kernels():
    """The Triton side, which no machine without a GPU imports."""
    from kernels import _factored_kernels

    return _factored_kernels
