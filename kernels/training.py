"""What training repeats most, a kernel each way: the weight of latents, norm with rotary embedding, int8 rounding.

In plain torch each is a dozen passes over its tensors; on a GPU they took more of a training step than its products.

Legend: N rows and K columns of a weight; B images, S tokens, H heads, D head size.

On CUDA Triton kernels run (kernels/_training_kernels.py), elsewhere plain torch. All sums have a fixed order: the same
bits in every run.
"""

import torch
from torch import Tensor

from kernels import reference


def codes_of(latent_NK: Tensor) -> Tensor:
    """The codes {-1, 0, +1} that latents round to, in their dtype; -0.5 and 0.5 become 0."""
    return latent_NK.round().clamp_(-1, 1)


def latent_weight(latent_NK: Tensor, log_scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The ternary weight [N, K] in `dtype`: codes of the latents times exp(log scale), float32, by row.

    Gradients pass the rounding straight through: to the latents those of weight / scale, in the latents' dtype. Nothing
    but the arguments is kept for them.
    """
    return _LatentWeight.apply(latent_NK, log_scale_N, dtype)


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, cos_SD: Tensor, sin_SD: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head, times `weight`, then the rotary embedding, in float32; [B, S, H, D] in x's dtype.

    cos and sin are float32, each pair of neighbouring columns alike (diffusers' layout). ValueError where the kernels
    cannot take D, which must be a power of two.
    """
    if _by_triton(x_BSHD):
        return _NormRope.apply(x_BSHD, weight_D, cos_SD, sin_SD, eps)
    return reference.norm_rope(x_BSHD, weight_D, cos_SD, sin_SD, eps)


def rounded_to_int8(x: Tensor) -> Tensor:
    """x [..., K] as `ternary-int8` rounds each token's values, in its dtype; gradients pass as if it had not."""
    return _RoundedToInt8.apply(x)


class _LatentWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent_NK: Tensor, log_scale_N: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(latent_NK, log_scale_N)
        if _by_triton(latent_NK):
            return _kernels().latent_weight(latent_NK, log_scale_N, dtype)
        return codes_of(latent_NK).to(dtype) * log_scale_N.exp().to(dtype)[:, None]

    @staticmethod
    def backward(ctx, grad_NK: Tensor) -> tuple[Tensor, Tensor, None]:
        latent_NK, log_scale_N = ctx.saved_tensors
        if _by_triton(latent_NK):
            return *_kernels().latent_weight_backward(grad_NK, latent_NK, log_scale_N), None
        scale_N = log_scale_N.exp()
        codes_NK = codes_of(latent_NK).to(grad_NK.dtype)
        grad_log_scale_N = (grad_NK * codes_NK).sum(dim=1, dtype=scale_N.dtype) * scale_N
        grad_latent_NK = grad_NK * scale_N.to(grad_NK.dtype)[:, None]
        return grad_latent_NK.to(latent_NK.dtype), grad_log_scale_N, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSHD: Tensor, weight_D: Tensor, cos_SD: Tensor, sin_SD: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_BSHD, weight_D, cos_SD, sin_SD)
        ctx.eps = eps
        return _kernels().norm_rope(x_BSHD, weight_D, cos_SD, sin_SD, eps)

    @staticmethod
    def backward(ctx, grad_BSHD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *_kernels().norm_rope_backward(grad_BSHD, *ctx.saved_tensors, ctx.eps), None, None, None


class _RoundedToInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _kernels().rounded_to_int8(x) if _by_triton(x) else reference.rounded_to_int8(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _by_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _kernels():
    """The Triton side, which no machine without a GPU imports."""
    from kernels import _training_kernels

    return _training_kernels
