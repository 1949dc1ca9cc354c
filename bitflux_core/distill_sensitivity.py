"""How much an error of the velocity counts at each of the sampler's steps: as much as it moves the final image.

Near pure noise an error decides what is where in the image, and later steps build on it; half-way most errors are
mended. Measured on the mini FLUX, one and the same relative error moves the end of the trajectory sixteen times as far
at its worst step as at its best.

Legend: B states, K steps of the sampler, L image tokens, C packed latent channels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bitflux_core.distill_states import Inputs

NUDGE = 1e-2  # squared relative error of the velocity: far above the rounding of bfloat16
LEAST = 0.1  # of the mean weight: no step is left out


@torch.no_grad()
def error_weights(
    starts: Iterable[Inputs], sigmas: Tensor, teach: Callable[[Inputs], Tensor], predict: Callable[[Inputs], Tensor]
) -> Tensor:
    """[K], of mean 1, on the CPU: the weight of a state's squared relative velocity error at each step.

    `starts` are noise; their trajectories by the teacher's velocity, `teach`, are left once at every step, in the
    direction of the student's own error there but by a fixed distance, and followed to the end. The geometric mean of
    the squared distances there counts: few images that turn into quite another one do not decide. `sigmas` [K + 1].
    """
    logs_BK = torch.cat([_distances(inputs, sigmas, teach, predict).log() for inputs in starts])
    weights_K = logs_BK.mean(0).exp().cpu()
    return _of_mean_1(_of_mean_1(weights_K).clamp(min=LEAST))


def velocities_weighing(steps: int) -> int:
    """How many velocities of a state `error_weights` computes for a sampler of so many steps."""
    return 2 * steps + steps * (steps - 1) // 2


def _distances(
    inputs: Inputs, sigmas: Tensor, teach: Callable[[Inputs], Tensor], predict: Callable[[Inputs], Tensor]
) -> Tensor:
    """[B, K] mean squared distance of the trajectory's end, one column for each step at which it was left."""
    steps = len(sigmas) - 1
    strides = (sigmas[1:] - sigmas[:-1]).tolist()

    def at(x_BLC: Tensor, step: int) -> Inputs:
        timestep_B = torch.full_like(inputs["timestep"], sigmas[step].item())
        return {**inputs, "hidden_states": x_BLC, "timestep": timestep_B}

    def end_of(x_BLC: Tensor, first: int) -> Tensor:
        for step in range(first, steps):
            x_BLC = x_BLC + strides[step] * teach(at(x_BLC, step))
        return x_BLC

    x_BLC, left = inputs["hidden_states"], []
    for step in range(steps):
        here = at(x_BLC, step)
        theirs_BLC = teach(here)
        error_BLC = predict(here) - theirs_BLC
        size_B11 = _mean_square(theirs_BLC) / _mean_square(error_BLC).clamp(min=1e-20)
        x_BLC = x_BLC + strides[step] * theirs_BLC
        left.append(x_BLC + strides[step] * (NUDGE * size_B11).sqrt() * error_BLC)
    ends = [_mean_square(end_of(start_BLC, step + 1) - x_BLC) for step, start_BLC in enumerate(left)]
    return torch.stack([end.flatten() for end in ends], dim=1).clamp(min=1e-20)


def _mean_square(x_BLC: Tensor) -> Tensor:
    return x_BLC.square().mean((1, 2), keepdim=True)


def _of_mean_1(weights_K: Tensor) -> Tensor:
    return weights_K / weights_K.mean()
