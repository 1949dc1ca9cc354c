"""Calibration without images: states along the teacher's own way from noise to image, for calibration prompts.

Legend: S states, P prompts, K kept so far, B batch, L image tokens, C packed latent channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitflux_core.distill import Conditions, drawn_timesteps
from bitflux_core.quantizer.blocks import BlockSource, Stream
from bitflux_core.training import plain_arithmetic

LOG_LINES = 5  # of a walk, at least


@dataclass(frozen=True)
class States:
    """Points on trajectories, on the CPU: latents_SLC float32, noise levels sigma_S, indices of prompts prompt_S."""

    latents_SLC: Tensor
    sigma_S: Tensor
    prompt_S: Tensor


@dataclass(frozen=True)
class Walk:
    """How far prompts have come after `steps` [] steps, on the CPU: latents_PLC, and latents_KLC kept on the way."""

    steps: Tensor
    latents_PLC: Tensor
    latents_KLC: Tensor


class Calibration:
    """The transformer's inputs for every prompt and state, in batches on the source's device."""

    def __init__(self, conditions: Conditions, guidance: float, batch: int):
        self.conditions, self.guidance, self.batch = conditions, guidance, batch

    def inputs(self, source: BlockSource, states: States) -> Iterator[dict[str, Tensor]]:
        """Keyword arguments of FluxTransformer2DModel.forward, `batch` states at a time."""

        def ready(tensor: Tensor) -> Tensor:
            return tensor.to(source.device, source.dtype)

        text_ids_T3 = ready(torch.zeros(self.conditions.prompt_embeds_PTD.shape[1], 3))
        parts = (part.split(self.batch) for part in (states.latents_SLC, states.sigma_S, states.prompt_S))
        for latents_BLC, sigma_B, prompt_B in zip(*parts, strict=True):
            guidance_B = torch.full((len(sigma_B),), self.guidance)
            yield {
                "hidden_states": ready(latents_BLC),
                "timestep": drawn_timesteps(sigma_B, source.dtype).to(source.device),
                **({"guidance": ready(guidance_B)} if source.empty.config.guidance_embeds else {}),
                "encoder_hidden_states": ready(self.conditions.prompt_embeds_PTD[prompt_B]),
                "pooled_projections": ready(self.conditions.pooled_PD[prompt_B]),
                "txt_ids": text_ids_T3,
                "img_ids": ready(self.conditions.image_ids_L3),
            }

    def streams(self, source: BlockSource, states: States) -> list[Stream]:
        """What enters the first block, batch by batch."""
        return [source.enter(**inputs) for inputs in self.inputs(source, states)]

    @torch.no_grad()
    @plain_arithmetic()
    def trajectories(
        self,
        source: BlockSource,
        sigmas: Tensor,
        states_a_prompt: int,
        seed: int,
        begun: Walk | None = None,
        keep: Callable[[Walk], None] | None = None,
    ) -> States:
        """Walks every prompt from noise along the levels `sigmas` and keeps `states_a_prompt` random points of each.

        All prompts take a step together, block by block, so that each block is read once a step. `keep` is given the
        walk behind each step; one that was kept, `begun`, goes on to the same states.
        """
        prompts, steps = len(self.conditions.pooled_PD), len(sigmas) - 1
        generator = torch.Generator().manual_seed(seed)
        tokens, channels = len(self.conditions.image_ids_L3), source.empty.config.in_channels
        noise_PLC = torch.randn(prompts, tokens, channels, generator=generator)
        kept_PS = torch.rand(prompts, steps, generator=generator).argsort(dim=1) < states_a_prompt
        everyone = torch.arange(prompts)
        walk = begun or Walk(torch.tensor(0), noise_PLC, noise_PLC[:0])
        for step in range(int(walk.steps), steps):
            sigma, latents_PLC = sigmas[step], walk.latents_PLC
            now = States(latents_PLC, sigma.expand(prompts), everyone)
            streams = self.streams(source, now)
            for name in source.names:
                block = source.block(name)
                streams = [stream.through(block) for stream in streams]
            leaving = zip(streams, self.inputs(source, now), strict=True)
            velocity_PLC = torch.cat([source.leave(stream, **inputs).float().cpu() for stream, inputs in leaving])
            walk = Walk(
                torch.tensor(step + 1),
                latents_PLC + (sigmas[step + 1] - sigma) * velocity_PLC,
                torch.cat([walk.latents_KLC, latents_PLC[kept_PS[:, step]]]),
            )
            if keep:
                keep(walk)
            if step % max(1, steps // LOG_LINES) == 0:
                print(f"calibration: {prompts} prompts at step {step + 1}/{steps}", flush=True)
        step_K, prompt_K = kept_PS.T.nonzero(as_tuple=True)
        order_S = torch.randperm(len(step_K), generator=generator)  # so that every batch holds all noise levels
        return States(walk.latents_KLC[order_S], sigmas[step_K[order_S]], prompt_K[order_S])
