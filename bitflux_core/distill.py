"""Image-free self-distillation: a ternary student learns its teacher's velocity on the sampler's own trajectories.

No image is used (1.58-bit FLUX, Yang et al. 2024: "self-supervision from FLUX.1-dev"): states start as noise and are
carried along by Euler steps, most by the teacher, later many by the student itself, whose mistakes it then learns to
mend. Every slot of the batch stands at its own step of the trajectory, so each update sees all noise levels.

Legend: B slots, P prompts, T text tokens, D text width, L image tokens, C packed latent channels, N rows, K columns.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F

from bitflux_core.checkpoint import empty_transformer
from bitflux_core.convert import replace_linear
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.low_rank import LowRank
from bitflux_core.ternary import TernaryWeight, least_squares
from bitflux_core.training import FlatGradients, Progress, RunningMean, capture, warmup_then_cosine
from kernels.packing import unpack_planes
from kernels.reference import rounded_to_int8

ENCODE_BATCH = 512
MARGIN = 0.3  # from a code to the latents that start at it: nearer the edges, the first steps would flip most of them


@dataclass(frozen=True)
class DistillSettings:
    """How long and how fast. Latent weights are in units of their row's scale, so one rate fits every layer."""

    steps: int
    batch: int
    sampler_steps: int
    guidance: float
    latent_lr: float = 5e-3
    scale_lr: float = 1e-3
    other_lr: float = 5e-4
    own_states: float = 0.5  # share of the slots that the student carries along itself, reached after a third
    int8_activations: bool = False  # the student sees its inputs rounded as `ternary-int8` rounds them
    seed: int = 0


@dataclass(frozen=True)
class Conditions:
    """Encoded calibration prompts and the places of the tokens: prompt_embeds_PTD, pooled_PD, image_ids_L3."""

    prompt_embeds_PTD: Tensor
    pooled_PD: Tensor
    image_ids_L3: Tensor


@torch.no_grad()
def encode_conditions(pipeline: FluxPipeline, prompts: Sequence[str], *, tokens: int, side: int) -> Conditions:
    """Encodes calibration prompts on the pipeline's device; images are `side` tokens high and wide."""
    distinct = list(dict.fromkeys(prompts))
    embeds, pooled = [], []
    for start in range(0, len(distinct), ENCODE_BATCH):
        part = distinct[start : start + ENCODE_BATCH]
        embeds_BTD, pooled_BD, _ = pipeline.encode_prompt(part, max_sequence_length=tokens)
        embeds.append(embeds_BTD)
        pooled.append(pooled_BD)
    place = {prompt: index for index, prompt in enumerate(distinct)}
    row_P = torch.tensor([place[prompt] for prompt in prompts])
    image_ids_L3 = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
    return Conditions(
        torch.cat(embeds)[row_P.to(embeds[0].device)], torch.cat(pooled)[row_P.to(pooled[0].device)], image_ids_L3
    )


class LatentTernaryLinear(nn.Module):
    """A linear layer in training: codes are the rounded latents, gradients pass the rounding straight through.

    The ternary weight exists while the layer is used, in the dtype of the product; only the latents are kept, in
    `dtype`, in units of their row's scale. Where the weight it starts at has a low-rank correction, `down` and `up`
    train along.
    """

    def __init__(
        self,
        linear: nn.Linear | TernaryLinear,
        start: TernaryWeight | None = None,
        int8_activations: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        """Starts at the linear's own bias and at `start`, or least squares."""
        super().__init__()
        self.int8_activations = int8_activations
        if isinstance(linear, TernaryLinear):
            raise UserError("the teacher is ternary already: distil from a full-precision transformer")
        ternary = start or least_squares(linear.weight)
        scale_N = ternary.scale_N.clamp(min=1e-8)
        latent_NK = linear.weight.detach().float() / scale_N[:, None]
        if start is not None:  # the nearest latents that round to its codes
            codes_NK = start.codes_NK.float()
            inner_NK = latent_NK.clamp(codes_NK - MARGIN, codes_NK + MARGIN)
            latent_NK = torch.where((latent_NK - codes_NK) * codes_NK > 0, latent_NK, inner_NK)
        self.latent = nn.Parameter(latent_NK.to(dtype))
        self.log_scale = nn.Parameter(scale_N.log())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())
        low_rank = ternary.correction
        self.down = None if low_rank is None else nn.Parameter(low_rank.down_RK.detach().to(scale_N, copy=True))
        self.up = None if low_rank is None else nn.Parameter(low_rank.up_NR.detach().to(scale_N, copy=True))

    @property
    def correction(self) -> LowRank | None:
        return None if self.up is None or self.down is None else LowRank(self.up, self.down)

    def codes(self) -> Tensor:
        """[N, K] in {-1, 0, +1}, in the latents' dtype."""
        return codes_of(self.latent)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.int8_activations:
            x = _RoundedToInt8.apply(x)
        y = F.linear(x, _StraightThroughWeight.apply(self.latent, self.log_scale, dtype), self.bias)
        return y if self.correction is None else y + self.correction.of(x)

    def ternary(self) -> TernaryWeight:
        low_rank = self.correction
        if low_rank is not None:
            low_rank = LowRank(low_rank.up_NR.detach().cpu(), low_rank.down_RK.detach().cpu())
        return TernaryWeight(self.codes().detach().to("cpu", torch.int8), self.log_scale.detach().exp().cpu(), low_rank)


def codes_of(latent_NK: Tensor) -> Tensor:
    """The codes that latents round to, in their dtype; -0.5 and 0.5 become 0."""
    return latent_NK.round().clamp_(-1, 1)


class _StraightThroughWeight(torch.autograd.Function):
    """Latents and log scales to the ternary weight. Backward keeps nothing but them: no second copy of the weight."""

    @staticmethod
    def forward(ctx, latent_NK: Tensor, log_scale_N: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(latent_NK, log_scale_N)
        return codes_of(latent_NK).to(dtype) * log_scale_N.exp().to(dtype)[:, None]

    @staticmethod
    def backward(ctx, grad_NK: Tensor) -> tuple[Tensor, Tensor, None]:
        latent_NK, log_scale_N = ctx.saved_tensors
        scale_N = log_scale_N.exp()
        codes_NK = codes_of(latent_NK).to(grad_NK.dtype)
        grad_log_scale_N = (grad_NK * codes_NK).sum(dim=1, dtype=scale_N.dtype) * scale_N
        grad_latent_NK = grad_NK * scale_N.to(grad_NK.dtype)[:, None]
        return grad_latent_NK.to(latent_NK.dtype), grad_log_scale_N, None


class _RoundedToInt8(torch.autograd.Function):
    """Each token's values as `ternary-int8` rounds them; the gradient passes as if they had not been."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return rounded_to_int8(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def make_student(
    teacher: FluxTransformer2DModel,
    start: FluxTransformer2DModel | None = None,
    int8_activations: bool = False,
    latent_dtype: torch.dtype = torch.float32,
) -> FluxTransformer2DModel:
    """The teacher's twin, on its device, whose block linears are latent ternary, started at least squares.

    Latents are in `latent_dtype`, all else in float32. With `start`, a ternary transformer of the same sizes, it
    starts at those codes, scales, biases and all else that `start` has. Beside the result no more than one layer is
    held.
    """
    student, device = empty_transformer(dict(teacher.config)), teacher.device
    for name, linear in block_linears(teacher).items():
        weight = None
        if start is not None:
            layer = start.get_submodule(name)
            assert isinstance(layer, TernaryLinear)
            codes_NK = unpack_planes(layer.packed.to(device), layer.in_features)
            weight = TernaryWeight(codes_NK, layer.scale.to(device), layer.correction)
        student.set_submodule(name, LatentTernaryLinear(linear, weight, int8_activations, latent_dtype))
    source = (start or teacher).state_dict()
    names = student.state_dict().keys() & source.keys()  # not the weights of linears, which have other names
    rest = {name: source[name].detach().to(device, torch.float32, copy=True) for name in names}
    student.load_state_dict(rest, strict=False, assign=True)
    return student.train().requires_grad_(True)


@torch.no_grad()
def finish_student(student: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The trained student with packed TernaryLinear layers, on the CPU, ready for save_ternary."""
    result = FluxTransformer2DModel.from_config(student.config).eval().requires_grad_(False)
    # Strict would refuse the latents; the names of everything else, biases included, are the transformer's own.
    result.load_state_dict(student.state_dict(), strict=False)
    for name, layer in student.named_modules():
        if isinstance(layer, LatentTernaryLinear):
            replace_linear(result, name, layer.ternary())
    return result


class Distiller:
    """Teacher and student on one device, the batch of states between noise and image, and the captured update."""

    def __init__(
        self,
        teacher: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        conditions: Conditions,
        settings: DistillSettings,
        device: torch.device,
        start: FluxTransformer2DModel | None = None,
    ):
        """`start` is the ternary transformer to train on; None starts at least squares."""
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.teacher = copy.deepcopy(teacher).to(device).float().eval().requires_grad_(False)
        self.student = make_student(self.teacher, start, settings.int8_activations).to(device)
        self.start_codes = [layer.codes().to(torch.int8) for layer in self._latent_layers()]
        if device.type == "cuda":
            self.teacher.compile_repeated_blocks()
            self.student.compile_repeated_blocks()

        self.embeds_PTD = conditions.prompt_embeds_PTD.to(device)
        self.pooled_PD = conditions.pooled_PD.to(device)
        self.image_ids_L3 = conditions.image_ids_L3.to(device)
        self.text_ids_T3 = torch.zeros(self.embeds_PTD.shape[1], 3, device=device)
        self.sigmas = sampler_sigmas(scheduler, settings.sampler_steps, len(self.image_ids_L3), device)
        batch, tokens, channels = settings.batch, len(self.image_ids_L3), teacher.config.in_channels
        self.x_BLC = torch.randn(batch, tokens, channels, device=device)
        self.step_B = torch.randint(settings.sampler_steps, (batch,), device=device)
        self.prompt_B = torch.randint(len(self.embeds_PTD), (batch,), device=device)
        self.guidance_B = torch.full((batch,), settings.guidance, device=device)
        self.slot_B = torch.arange(batch, device=device)
        self.own_slots = torch.zeros((), device=device)
        self.loss_mean = RunningMean(device)

        latents, scales, others = self._parameter_groups()
        self.gradients = FlatGradients([*latents, *scales, *others])
        self.rates = [torch.zeros((), device=device) for _ in range(3)]
        groups = [
            {"params": parameters, "lr": rate}
            for parameters, rate in zip((latents, scales, others), self.rates, strict=True)
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, capturable=device.type == "cuda")
        self.update = capture(self._update, device)
        self.steps_made = 0

    def run(self, seconds: float | None = None) -> FluxTransformer2DModel:
        """Trains and returns the finished ternary transformer, on the CPU.

        As many steps as the settings say or, with `seconds`, as take about that long.
        """
        settings = self.settings
        progress = Progress("distill", settings.steps)
        step = 0
        while step < progress.steps:
            if seconds:
                progress.fit_into(seconds, step, self.device)
            factor = warmup_then_cosine(step, progress.steps)
            for rate, base in zip(self.rates, (settings.latent_lr, settings.scale_lr, settings.other_lr), strict=True):
                rate.fill_(base * factor)
            self.own_slots.fill_(settings.own_states * settings.batch * min(1.0, 3 * step / progress.steps))
            self.update()
            progress.report(step, self.loss_mean.mean)
            step += 1
        self.steps_made = step
        print(
            f"distill: relative velocity error {self.loss_mean.mean.item():.5f}, "
            f"{self.codes_flipped():.1%} of the codes flipped",
            flush=True,
        )
        return finish_student(self.student)

    def codes_flipped(self) -> float:
        """Share of the codes that differ from the start."""
        pairs = list(zip(self.start_codes, self._latent_layers(), strict=True))
        flipped = sum((start != layer.codes()).sum().item() for start, layer in pairs)
        return flipped / sum(start.numel() for start, _ in pairs)

    def _update(self) -> None:
        sigma_B = self.sigmas[self.step_B]
        inputs = {
            "hidden_states": self.x_BLC,
            "timestep": sigma_B,
            "guidance": self.guidance_B,
            "encoder_hidden_states": self.embeds_PTD[self.prompt_B].float(),
            "pooled_projections": self.pooled_PD[self.prompt_B].float(),
            "txt_ids": self.text_ids_T3,
            "img_ids": self.image_ids_L3,
            "return_dict": False,
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            with torch.no_grad():
                target_BLC = self.teacher(**inputs)[0].float()
            velocity_BLC = self.student(**inputs)[0].float()
        loss = relative_error(velocity_BLC, target_BLC)
        self.gradients.zero()
        loss.backward()
        self.gradients.clip(1.0)
        self.adam.step()
        self.loss_mean.add(loss)
        self._advance(target_BLC, velocity_BLC.detach(), sigma_B)

    @torch.no_grad()
    def _advance(self, target_BLC: Tensor, velocity_BLC: Tensor, sigma_B: Tensor) -> None:
        """One Euler step for every slot; a slot that reached its image starts over from new noise with a new prompt."""
        own_B = self.slot_B < self.own_slots
        chosen_BLC = torch.where(own_B[:, None, None], velocity_BLC, target_BLC)
        next_BLC = self.x_BLC + (self.sigmas[self.step_B + 1] - sigma_B)[:, None, None] * chosen_BLC
        done_B = self.step_B + 1 == self.settings.sampler_steps
        self.x_BLC.copy_(torch.where(done_B[:, None, None], torch.randn_like(next_BLC), next_BLC))
        fresh_B = torch.randint(len(self.embeds_PTD), self.prompt_B.shape, device=self.device)
        self.prompt_B.copy_(torch.where(done_B, fresh_B, self.prompt_B))
        self.step_B.copy_(torch.where(done_B, 0, self.step_B + 1))

    def _latent_layers(self) -> Iterator[LatentTernaryLinear]:
        return (module for module in self.student.modules() if isinstance(module, LatentTernaryLinear))

    def _parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        layers = list(self._latent_layers())
        latents, scales = [layer.latent for layer in layers], [layer.log_scale for layer in layers]
        taken = {id(p) for p in latents + scales}
        return latents, scales, [p for p in self.student.parameters() if id(p) not in taken]


def relative_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared error over the target's mean square, a scalar."""
    theirs = theirs.detach().float()
    return (mine.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-8)


def sampler_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, image_tokens: int, device: torch.device
) -> Tensor:
    """The noise levels [steps + 1] that FluxPipeline walks: from 1 down to 0."""
    scheduler = copy.deepcopy(scheduler)
    config = scheduler.config
    mu = None
    if config.use_dynamic_shifting:
        mu = calculate_shift(
            image_tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = scheduler.sigmas.to(device, torch.float32)
    if len(sigmas) != steps + 1 or not math.isclose(sigmas[-1].item(), 0.0):
        raise ValueError(f"the scheduler gives {len(sigmas)} noise levels for {steps} steps")
    return sigmas
