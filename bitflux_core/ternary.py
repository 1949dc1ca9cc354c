"""Ternary arithmetic: a weight as codes in {-1, 0, +1} times one scale an output row.

Legend: N output features (rows), K input features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitflux_core.low_rank import LowRank

ABSMEAN_EPS = 1e-5


@dataclass(frozen=True)
class TernaryWeight:
    """codes_NK int8 in {-1, 0, +1} and scale_N float32 >= 0: the weight scale_N[n] * codes_NK[n, k].

    Where there is a `correction`, the weight is the sum of both.
    """

    codes_NK: Tensor
    scale_N: Tensor
    correction: LowRank | None = None

    def dequantize(self) -> Tensor:
        """The weight [N, K] in float32."""
        weight_NK = self.codes_NK * self.scale_N[:, None]
        return weight_NK if self.correction is None else weight_NK + self.correction.product()


def absmean(weight_NK: Tensor) -> TernaryWeight:
    """BitNet b1.58's quantizer (Ma et al. 2024, section 2): gamma is the mean |W| of the whole tensor.

    Codes are RoundClip(W / (gamma + eps), -1, 1), every row's scale is gamma.
    """
    wide_NK = weight_NK.float()
    gamma = wide_NK.abs().mean()
    codes_NK = (wide_NK / (gamma + ABSMEAN_EPS)).round_().clamp_(-1, 1).to(torch.int8)
    return TernaryWeight(codes_NK, gamma.expand(len(codes_NK)).clone())


def least_squares(weight_NK: Tensor, max_iterations: int = 100) -> TernaryWeight:
    """Codes and one scale a row that minimise the squared error to the row.

    Lloyd-Max for the levels {-s, 0, +s}: for a fixed scale s the best codes keep |w| > s / 2, for fixed codes the best
    scale is the mean |w| over the kept ones; the two alternate, each lowering the error, until no code changes.
    """
    magnitude_NK = weight_NK.float().abs()
    scale_N = magnitude_NK.mean(dim=1)
    kept_NK = _above_threshold(magnitude_NK, scale_N)
    for _ in range(max_iterations):
        scale_N = (magnitude_NK * kept_NK).sum(dim=1) / kept_NK.sum(dim=1).clamp(min=1)
        previous_NK, kept_NK = kept_NK, _above_threshold(magnitude_NK, scale_N)
        if torch.equal(previous_NK, kept_NK):
            break
    return TernaryWeight((weight_NK.sign() * kept_NK).to(torch.int8), scale_N)


def _above_threshold(magnitude_NK: Tensor, scale_N: Tensor) -> Tensor:
    return magnitude_NK > scale_N[:, None] / 2


def snr_db(weight_NK: Tensor, ternary: TernaryWeight) -> float:
    """Signal-to-noise ratio in dB, 10 log10(sum W^2 / sum (W - Q)^2); inf where nothing is lost."""
    wide_NK = weight_NK.float()
    signal = wide_NK.square().sum(dtype=torch.float64).item()
    noise = (wide_NK - ternary.dequantize()).square().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf
