"""Optimizers whose whole step can be captured in a CUDA graph: the learning rate is a tensor."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Muon (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices_BNK: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz in bfloat16; N <= K is the cheap side."""
    x = matrices_BNK.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Muon with AdamW's update size (Moonlight: 0.2 sqrt(max(N, K))), all matrices of one shape in one batch.

    torch.optim.Muon walks the matrices one by one and bakes the learning rate into a captured graph.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: Tensor, momentum: float = 0.95):
        self.lr, self.momentum = lr, momentum
        self.groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self.groups[parameter.shape[0], parameter.shape[1]].append(parameter)
        self.buffers = {shape: [torch.zeros_like(p) for p in group] for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        for (rows, columns), group in self.groups.items():
            gradients = [p.grad for p in group if p.grad is not None]
            buffers = self.buffers[rows, columns]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            update = torch.stack(torch._foreach_lerp(gradients, buffers, self.momentum))
            update = orthogonalize(update.mT).mT if rows > columns else orthogonalize(update)
            update = update.float() * (self.lr * (-0.2 * max(rows, columns) ** 0.5))
            torch._foreach_add_(group, list(update.unbind()))
