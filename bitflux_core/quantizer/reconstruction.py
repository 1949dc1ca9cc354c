"""Block-wise reconstruction: one ternary block trained to give the teacher block's output behind the ternary prefix.

Only this block is in training; gradients pass the rounding of its latent weights straight through, so codes change.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitflux_core.distill import LatentTernaryLinear, relative_error
from bitflux_core.distill_optimizer import dampen
from bitflux_core.quantizer.blocks import Stream
from bitflux_core.ternary import TernaryWeight
from bitflux_core.training import deterministic, rising_cosine, warmup_then_cosine

LOG_LINES = 5  # a block


@dataclass(frozen=True)
class ReconstructionSettings:
    """Steps a block, each on one calibration batch. Latent weights are in units of their row's scale; `dampening` is
    their pull to their codes at the end, in learning rates.
    """

    steps: int
    latent_lr: float = 5e-3
    dampening: float = 0.5
    scale_lr: float = 5e-4
    other_lr: float = 2e-4
    seed: int = 0


@dataclass(frozen=True)
class Reconstruction:
    """How a block's training went: mean relative output error over all calibration batches, share of codes flipped."""

    error_before: float
    error_after: float
    codes_flipped: float


@torch.enable_grad()
def reconstruct(
    name: str,
    teacher: nn.Module,
    student: nn.Module,
    weights: dict[str, TernaryWeight],
    teacher_streams: list[Stream],
    student_streams: list[Stream],
    settings: ReconstructionSettings,
) -> tuple[dict[str, TernaryWeight], Reconstruction]:
    """Trains `student`, whose linears hold `weights`, and returns the weights it ends with.

    Biases and norms are left in `student`, rounded to its dtype. Training that does not lower the error is undone.
    """
    training = _latent_copy(teacher, student, weights)
    layers = {layer: module for layer, module in training.named_modules() if isinstance(module, LatentTernaryLinear)}
    latents, scales = [m.latent for m in layers.values()], [m.log_scale for m in layers.values()]
    taken = {id(parameter) for parameter in latents + scales}
    others = [parameter for parameter in training.parameters() if id(parameter) not in taken]
    rates = (settings.latent_lr, settings.scale_lr, settings.other_lr)
    groups = [{"params": p, "lr": rate} for p, rate in zip((latents, scales, others), rates, strict=True)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    before = _mean_error(teacher, training, teacher_streams, student_streams)
    generator = torch.Generator().manual_seed(settings.seed)
    warmup = max(1, settings.steps // 20)
    for step in range(settings.steps):
        factor = warmup_then_cosine(step, settings.steps, warmup)
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        chosen = int(torch.randint(len(student_streams), (), generator=generator))
        adam.zero_grad()
        with deterministic():
            loss = _error(teacher, training, teacher_streams[chosen], student_streams[chosen])
            loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        adam.step()
        dampen(latents, settings.latent_lr * factor * settings.dampening * rising_cosine(step, settings.steps))
        if step % max(1, settings.steps // LOG_LINES) == 0:
            print(f"{name}: step {step + 1}/{settings.steps} loss {loss.item():.5f}", flush=True)
    after = _mean_error(teacher, training, teacher_streams, student_streams)
    if not after < before:
        print(f"{name}: error {before:.5f}, not lowered by training; left as it was", flush=True)
        return weights, Reconstruction(before, before, 0.0)

    trained = {layer: module.ternary() for layer, module in layers.items()}
    changed = sum(int((weights[k].codes_NK.cpu() != trained[k].codes_NK).sum()) for k in trained)
    flipped = changed / sum(ternary.codes_NK.numel() for ternary in trained.values())
    print(f"{name}: error {before:.5f} -> {after:.5f}, {flipped:.2%} of the codes flipped", flush=True)
    with torch.no_grad():
        state = training.state_dict()
        for key, tensor in student.state_dict().items():
            if key in state:
                tensor.copy_(state[key])
    return trained, Reconstruction(before, after, flipped)


def _latent_copy(teacher: nn.Module, student: nn.Module, weights: Mapping[str, TernaryWeight]) -> nn.Module:
    """The student in float32 with latent weights: the teacher's, moved into the cells of the student's codes."""
    training = copy.deepcopy(student).float()
    for layer, ternary in weights.items():
        linear = copy.deepcopy(teacher.get_submodule(layer)).float()
        assert isinstance(linear, nn.Linear)
        if linear.bias is not None:
            linear.bias.data.copy_(student.get_parameter(f"{layer}.bias"))
        training.set_submodule(layer, LatentTernaryLinear(linear, ternary))
    return training.train().requires_grad_(True)


def _error(teacher: nn.Module, training: nn.Module, teacher_stream: Stream, student_stream: Stream) -> Tensor:
    """Squared error over the mean square of the teacher's output, image and text each by itself."""
    with torch.no_grad():
        theirs = teacher_stream.through(teacher)
    device = theirs.hidden_BLD.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        mine = student_stream.through(training)
    image = relative_error(mine.hidden_BLD, theirs.hidden_BLD)
    return image + relative_error(mine.encoder_BTD, theirs.encoder_BTD)


@torch.no_grad()
def _mean_error(
    teacher: nn.Module, training: nn.Module, teacher_streams: list[Stream], student_streams: list[Stream]
) -> float:
    pairs = list(zip(teacher_streams, student_streams, strict=True))
    return sum(_error(teacher, training, theirs, mine).item() for theirs, mine in pairs) / len(pairs)
