"""A low-rank correction beside a ternary weight: two thin matrices whose product gives back the most of what was lost.

Legend: N output features, K input features, R rank, M tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 1e-12


class LowRank(NamedTuple):
    """up_NR and down_RK, floating: their product [N, K] is added to a weight."""

    up_NR: Tensor
    down_RK: Tensor

    def product(self) -> Tensor:
        """[N, K] in float32."""
        return self.up_NR.float() @ self.down_RK.float()

    def of(self, x: Tensor) -> Tensor:
        """What the layer's output [..., N] gains for x [..., K], in x's dtype."""
        return F.linear(F.linear(x, self.down_RK), self.up_NR)


def best_low_rank(residual_NK: Tensor, rank: int, factor_KK: Tensor | None = None) -> LowRank:
    """The correction of this rank that leaves the least of the residual, in float32 of which bfloat16 loses nothing.

    The least squared error over inputs with the covariance F F^T of `factor_KK`, or of the weight itself without one:
    the projection of the residual on the leading left singular vectors of residual F (Eckart & Young 1936). The square
    roots of its singular values go to either side, so that both train at one rate.
    """
    seen_NK = (residual_NK if factor_KK is None else residual_NK @ factor_KK).double()
    # Eigenvectors of the smaller Gram matrix: a full-size layer's singular value decomposition takes far longer.
    tall = seen_NK.shape[0] > seen_NK.shape[1]
    gram = seen_NK.T @ seen_NK if tall else seen_NK @ seen_NK.T
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    basis_NR = (torch.linalg.qr(seen_NK @ leading).Q if tall else leading).float()
    down_RK = basis_NR.T @ residual_NK
    root_R = down_RK.norm(dim=1).sqrt().clamp(min=SMALLEST)
    thin = (basis_NR * root_R).contiguous(), down_RK / root_R[:, None]
    return LowRank(*(part.bfloat16().float() for part in thin))
