"""Codes and scales that keep a layer's outputs: error-compensated rounding, then coordinate descent.

Let x be the layer's input behind the already quantized blocks and x' what the teacher gives the same layer. The bias
takes up the means, so that codes Q and scales s answer for E||W x' - s Q x||^2 around them alone: with the covariance
H of x, the cross covariance C of x' and x, and W* = W C H^-1, the best unquantized weight on these inputs, that is
(W* - s Q) H (W* - s Q)^T plus a constant, each row by itself. Rounding column after column, the error of each carried
to those still to come (GPTQ, Frantar et al. 2023, algorithm 1), gives first codes; coordinate descent over single
codes, with the best scale for the codes between its rounds, lowers the same error until nothing moves.

A low-rank correction takes up what it can of W* - s Q by the same measure; codes for what it leaves and the correction
of what those lose are then found in turn.

Legend: N output features, K input features, M tokens, R rank of the correction, T rows of all tries at a layer.
"""

import torch
from torch import Tensor

from bitflux_core.errors import UserError
from bitflux_core.low_rank import LowRank, best_low_rank
from bitflux_core.ternary import TernaryWeight, least_squares
from kernels.columns import LIMIT, descend_columns, round_columns

DAMPING = 0.001  # of the mean variance, added to every input's: few samples must not decide where they say nothing
MOST_DAMPINGS = 14  # ten times more each: the last outweighs any covariance that is finite
SCALE_FACTORS = (0.85, 1.0, 1.15)  # of the least-squares scale, to round with; each row keeps the best
MOST_ROUNDS = 10
CORRECTION_TURNS = 4  # of codes and correction: on the mini FLUX 1.4 dB more than one, and so many times the work
COLUMNS = LIMIT  # rounded before their error is carried to all others in one matrix product
SMALLEST = 1e-12


class InputMoments:
    """Sums of one layer input and its products over calibration tokens, float32: two K x K matrices."""

    def __init__(self, in_features: int, device: torch.device):
        self.count = 0
        self.student_K = torch.zeros(in_features, device=device)
        self.teacher_K = torch.zeros(in_features, device=device)
        self.student_KK = torch.zeros(in_features, in_features, device=device)
        self.cross_KK = torch.zeros(in_features, in_features, device=device)  # teacher by student

    def add(self, student_MK: Tensor, teacher_MK: Tensor) -> None:
        """Counts the inputs of M tokens, in any floating type."""
        student_MK, teacher_MK = student_MK.float(), teacher_MK.float()
        self.count += len(student_MK)
        self.student_K += student_MK.sum(0)
        self.teacher_K += teacher_MK.sum(0)
        self.student_KK.addmm_(student_MK.T, student_MK)
        self.cross_KK.addmm_(teacher_MK.T, student_MK)


class Compensator:
    """What all layers with one input share: its covariances and their factors. The moments are used up in place.

    UserError naming `layer` where its inputs are not finite.
    """

    def __init__(self, moments: InputMoments, layer: str = "a layer"):
        count = moments.count
        self.student_K, self.teacher_K = moments.student_K / count, moments.teacher_K / count
        covariance_KK = moments.student_KK.div_(count).addr_(self.student_K, self.student_K, alpha=-1)
        # C - H: how the teacher's inputs differ from the student's, as far as the student's tell.
        self.shift_KK = moments.cross_KK.div_(count).addr_(self.teacher_K, self.student_K, alpha=-1).sub_(covariance_KK)
        if not (covariance_KK.isfinite().all() and self.shift_KK.isfinite().all()):
            raise UserError(
                f"the calibration inputs of {layer} are not finite, or too large for float32: "
                "check that the full-precision model draws images, and copy it again"
            )
        diagonal_K = covariance_KK.diagonal()
        # Large variances first: their errors are the dear ones, and find the most columns to be carried to.
        self.order_K = diagonal_K.argsort(descending=True, stable=True)
        ordered_KK = covariance_KK[self.order_K][:, self.order_K]
        self.covariance_KK, self.factor_KK, self.inverse_factor_KK = _damped_factors(ordered_KK)

    def quantize(self, weight_NK: Tensor, rank: int = 0) -> tuple[TernaryWeight, Tensor]:
        """The layer's ternary weight, with a correction of `rank` unless that is 0, and what its bias [N] must gain."""
        wide_NK = weight_NK.float()
        moved_NK = torch.cholesky_solve((wide_NK @ self.shift_KK)[:, self.order_K].T, self.factor_KK).T
        target_NK = wide_NK[:, self.order_K] + moved_NK
        place_K = self.order_K.argsort()
        correction = None
        if rank:
            codes_NK, scale_N, (up_NR, down_RK) = self._best_corrected(target_NK, rank)
            correction = LowRank(up_NR, down_RK[:, place_K])
        else:
            codes_NK, scale_N = self._best_codes(target_NK)
        ternary = TernaryWeight(codes_NK[:, place_K].to(torch.int8), scale_N, correction)
        return ternary, wide_NK @ self.teacher_K - ternary.dequantize() @ self.student_K

    def _best_corrected(self, target_NK: Tensor, rank: int) -> tuple[Tensor, Tensor, LowRank]:
        """Codes and scales as `_best_codes` gives them, and a correction: those of the turn that leaves least error."""
        least, wanted_NK = torch.inf, target_NK
        for _ in range(CORRECTION_TURNS):
            codes_NK, scale_N = self._best_codes(wanted_NK)
            quantized_NK = codes_NK * scale_N[:, None]
            correction = best_low_rank(target_NK - quantized_NK, rank, self.factor_KK)
            wanted_NK = target_NK - correction.product()
            error = ((wanted_NK - quantized_NK) @ self.factor_KK).square().sum().item()
            if error < least:
                least, best = error, (codes_NK, scale_N, correction)
        return best

    def _best_codes(self, target_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [N, K] as floats, columns in `order_K`, and scales [N]: the best of all starting scales, row by row."""
        base_N = least_squares(target_NK).scale_N.clamp(min=SMALLEST)
        tries, rows = len(SCALE_FACTORS), len(base_N)
        # All tries as rows of one matrix: so many columns after each other, whatever its height.
        targets_TK = target_NK.repeat(tries, 1)
        codes_TK = self._round(targets_TK, torch.cat([factor * base_N for factor in SCALE_FACTORS]))
        codes_TK, scale_T = self._descend(targets_TK, codes_TK)
        error_TK = targets_TK.sub_(codes_TK * scale_T[:, None])
        error_T = ((error_TK @ self.covariance_KK) * error_TK).sum(1)
        best_N = error_T.view(tries, rows).argmin(0) * rows + torch.arange(rows, device=error_T.device)
        return codes_TK[best_N], scale_T[best_N]

    def _round(self, target_NK: Tensor, scale_N: Tensor) -> Tensor:
        """Error-compensated rounding at fixed scales, in blocks of columns."""
        rest_NK, codes_NK = target_NK.clone(), torch.empty_like(target_NK)
        width = target_NK.shape[1]
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            factor_BB = self.inverse_factor_KK[start:stop, start:stop]
            error_NB = round_columns(rest_NK[:, start:stop], scale_N, factor_BB, codes_NK[:, start:stop])
            rest_NK[:, stop:].addmm_(error_NB, self.inverse_factor_KK[start:stop, stop:], alpha=-1)
        return codes_NK

    def _descend(self, target_NK: Tensor, codes_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds of coordinate descent over the codes, in place, each behind the best scale for the codes so far."""
        scale_N = self._best_scale(target_NK, codes_NK)
        width = target_NK.shape[1]
        for _ in range(MOST_ROUNDS):
            # Minus half the error's gradient by the quantized weight.
            slope_NK = (target_NK - codes_NK * scale_N[:, None]) @ self.covariance_KK
            moved = torch.zeros((), dtype=torch.bool, device=target_NK.device)
            for start in range(0, width, COLUMNS):
                stop = min(start + COLUMNS, width)
                covariance_BB = self.covariance_KK[start:stop, start:stop]
                step_NB = descend_columns(slope_NK[:, start:stop], scale_N, covariance_BB, codes_NK[:, start:stop])
                slope_NK[:, stop:].addmm_(step_NB, self.covariance_KK[start:stop, stop:], alpha=-1)
                moved |= step_NB.any()
            scale_N = self._best_scale(target_NK, codes_NK)
            if not moved:
                break
        return codes_NK, scale_N

    def _best_scale(self, target_NK: Tensor, codes_NK: Tensor) -> Tensor:
        """The scales [N] that leave the least error at these codes; positive."""
        weighted_NK = codes_NK @ self.covariance_KK
        scale_N = (weighted_NK * target_NK).sum(1) / (weighted_NK * codes_NK).sum(1).clamp(min=SMALLEST)
        return scale_N.clamp(min=SMALLEST)


def _damped_factors(covariance_KK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The covariance with something added to its diagonal, its lower factor, and the upper factor of its inverse.

    Sums of millions of products in float32 may leave a covariance a little indefinite: then ten times more is added.
    ArithmeticError where no addition helps.
    """
    damping = DAMPING * covariance_KK.diagonal().mean().clamp(min=SMALLEST)
    for _ in range(MOST_DAMPINGS):
        damped_KK = covariance_KK.clone()
        damped_KK.diagonal().add_(damping)
        factor_KK, failed = torch.linalg.cholesky_ex(damped_KK.double())
        if not failed:
            break
        damping = 10 * damping
    else:
        raise ArithmeticError("no damping makes the covariance of a layer's inputs positive definite")
    inverse_factor_KK = torch.linalg.cholesky(torch.cholesky_inverse(factor_KK), upper=True)
    return damped_KK, factor_KK.float(), inverse_factor_KK.float().contiguous()  # an upper factor comes by columns
