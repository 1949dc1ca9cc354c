"""How a student is trained end to end, and the log of it."""

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["factored", "adam"]


@dataclass(frozen=True)
class EndToEndSettings:
    """How the student is trained.

    Attributes:
        steps: in all; of them the last `int8_steps` see activations rounded as `ternary-int8` rounds them.
        batch: images a step, on all GPUs together.
        sampler_steps, guidance: how the teacher draws.
        latent_lr: latents are in units of their row's scale, so one rate fits every layer.
        dampening: pull of latents to their codes at the end, in learning rates; it grows from none, see `dampen`.
        scale_lr, other_lr: of log scales, and of biases, norms and what lies outside the blocks.
        features: blocks, spread over the depth, whose outputs are compared with the teacher's.
        feature_weight: of their mean relative error in the loss, beside the velocity's.
        own_states: share of the trajectories that the student carries along itself, reached after a third.
        slots: trajectories under way, at least as many as a batch.
        held_out: prompts, of those given, that are not trained on.
        interval: steps between evaluations, each of which leaves a checkpoint.
        weighted: errors count at each of the sampler's steps as much as they move the final image, which is measured at
            the start: see distill_sensitivity.py.
        optimizer: of the latents. `factored`: bfloat16 latents that fit 80 GB beside FLUX.1-dev's teacher, see
            distill_optimizer.py. `adam`: float32 latents by AdamW, as all else; 16 bytes each, on one GPU, and better
            codes in the same time.
        patience: evaluations without a better one after which a phase (plain, then int8) ends early, once rates have
            fallen to half: before, their noise hides what is gained.
    """

    steps: int
    int8_steps: int
    batch: int
    sampler_steps: int
    guidance: float
    latent_lr: float = 5e-3
    dampening: float = 0.15
    scale_lr: float = 1e-3
    other_lr: float = 5e-4
    features: int = 4
    feature_weight: float = 0.1
    own_states: float = 0.5
    slots: int = 16
    held_out: int = 16
    interval: int = 250
    patience: int = 10
    weighted: bool = True
    optimizer: Optimizer = "factored"
    seed: int = 0


# For FLUX.1-dev; how the mini FLUX is trained differs in steps and batch.
RECIPE = EndToEndSettings(steps=10_000, int8_steps=2_500, batch=1, sampler_steps=50, guidance=3.5)


@dataclass(frozen=True)
class Record:
    """What an evaluation saw; one row of the log.

    Attributes:
        step: steps made.
        phase: "native" or "int8", the activations that the student sees.
        loss: mean over the steps since the last record; None where a phase begins.
        held_out: mean relative velocity error on the held-out states, weighted as the loss is.
        codes_flipped: share of the codes that differ from the start.
        seconds: of training so far, evaluations included, interruptions left out.
    """

    step: int
    phase: str
    loss: float | None
    held_out: float
    codes_flipped: float
    seconds: float
