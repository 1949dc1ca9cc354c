"""Image-free self-distillation: a ternary student learns its teacher's velocity on the sampler's own trajectories.

No image is used (1.58-bit FLUX, Yang et al. 2024: "self-supervision from FLUX.1-dev"): states start as noise and are
carried along by Euler steps, most by the teacher, later many by the student itself, whose mistakes it then learns to
mend. Every slot of the batch stands at its own step of the trajectory, so each update sees all noise levels.

Legend: B slots, P prompts, T text tokens, D text width, L image tokens, C packed latent channels, N rows, K columns.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F

from bitflux_core.checkpoint import empty_transformer
from bitflux_core.distill_attention import TrainedAttention
from bitflux_core.distill_shards import whole_linear
from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.low_rank import LowRank
from bitflux_core.ternary import TernaryWeight, least_squares
from kernels.packing import unpack_planes
from kernels.training import codes_of, latent_weight, rounded_to_int8

MARGIN = 0.3  # from a code to the latents that start at it: nearer the edges, the first steps would flip most of them


@dataclass(frozen=True)
class Conditions:
    """Encoded calibration prompts and the places of the tokens: prompt_embeds_PTD, pooled_PD, image_ids_L3."""

    prompt_embeds_PTD: Tensor
    pooled_PD: Tensor
    image_ids_L3: Tensor


class LayerNorm(nn.LayerNorm):
    """torch's own, in its input's dtype, as where the model draws; autocast would make float32 of all behind it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


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
        dtype: torch.dtype = torch.float32,
    ):
        """Starts at the linear's own bias and at `start`, or least squares."""
        super().__init__()
        self.int8_activations = False  # whoever trains sets it, phase by phase
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
            x = rounded_to_int8(x)
        y = F.linear(x, latent_weight(self.latent, self.log_scale, dtype), self.bias)
        return y if self.correction is None else y + self.correction.of(x)

    def ternary(self) -> TernaryWeight:
        low_rank = self.correction
        if low_rank is not None:
            low_rank = LowRank(low_rank.up_NR.detach().cpu(), low_rank.down_RK.detach().cpu())
        return TernaryWeight(self.codes().detach().to("cpu", torch.int8), self.log_scale.detach().exp().cpu(), low_rank)


def make_student(
    teacher: FluxTransformer2DModel,
    start: FluxTransformer2DModel | None = None,
    latent_dtype: torch.dtype = torch.float32,
) -> FluxTransformer2DModel:
    """The teacher's twin, on its device, whose block linears are latent ternary, started at least squares.

    Latents are in `latent_dtype`, all else in float32. With `start`, a ternary transformer of the same sizes, it
    starts at those codes, scales, biases and all else that `start` has. Beside the result no more than one layer is
    held, also of a teacher whose layers several ranks share: then every rank must call it, with `start`.
    """
    student, device = empty_transformer(dict(teacher.config)), teacher.device
    for name, linear in block_linears(teacher).items():
        weight = None
        if start is not None:
            layer = start.get_submodule(name)
            assert isinstance(layer, TernaryLinear)
            codes_NK = unpack_planes(layer.packed.to(device), layer.in_features)
            weight = TernaryWeight(codes_NK, layer.scale.to(device), layer.correction)
        student.set_submodule(name, LatentTernaryLinear(whole_linear(linear), weight, latent_dtype))
    student.set_attn_processor(TrainedAttention())
    for norm in student.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.__class__ = LayerNorm  # same parameters, other arithmetic
    source = (start or teacher).state_dict()
    names = student.state_dict().keys() & source.keys()  # not the weights of linears, which have other names
    rest = {name: source[name].detach().to(device, torch.float32, copy=True) for name in names}
    student.load_state_dict(rest, strict=False, assign=True)
    return student.train().requires_grad_(True)


def relative_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared error over the target's mean square, a scalar."""
    theirs = theirs.detach().float()
    return (mine.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-8)


def load_scheduler(pipeline_dir: Path) -> FlowMatchEulerDiscreteScheduler:
    """The pipeline's scheduler. UserError where it has none, or one that steps otherwise than states do here."""
    folder = pipeline_dir / "scheduler"
    name = read_json(folder / "scheduler_config.json", "copy the model again").get("_class_name")
    if name != FlowMatchEulerDiscreteScheduler.__name__:
        raise UserError(f"{folder} holds {name}: name a pipeline with a {FlowMatchEulerDiscreteScheduler.__name__}")
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be loaded ({problem}): copy the model again") from error
    for option in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(option):
            raise UserError(f"{folder} asks for {option}, which FLUX is not drawn with: copy FLUX's own scheduler")
    return scheduler


def drawn_timesteps(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """The times at which a pipeline in `dtype` asks the transformer for its velocity at these noise levels.

    FluxPipeline rounds a thousand times the level, which in bfloat16 is up to 0.2 % from the level itself.
    """
    return (1000 * sigmas).to(dtype) / 1000


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
