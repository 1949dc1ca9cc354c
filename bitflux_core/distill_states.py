"""Where distillation trains: states between noise and image, carried along by the teacher and by the student.

Every random number comes from a seed of its own place (slot and lap), so that a state depends neither on how many GPUs
share the slots nor on an interruption.

Legend: S slots, B batch, P prompts, L image tokens, C packed latent channels, T text tokens, D text width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bitflux_core.distill import Conditions
from bitflux_core.distill_optimizer import seed_of
from bitflux_core.training import sent

Inputs = dict[str, Tensor]  # keyword arguments of FluxTransformer2DModel.forward, float32


class Rollouts:
    """`slots` trajectories on their way from noise to image, a multiple of the `batch` that a step trains on.

    With several ranks each carries its own part of every batch. `sigmas` [steps + 1] fall from 1 to 0; `prompts` are
    places in `conditions`, which may lie on the CPU or in a mapped file. `guidance` is None for models without it.
    """

    def __init__(
        self,
        conditions: Conditions,
        prompts: Sequence[int],
        sigmas: Tensor,
        guidance: float | None,
        *,
        slots: int,
        batch: int,
        channels: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ):
        if slots % batch or batch % ranks:
            raise ValueError(f"{slots} slots, batches of {batch} and {ranks} ranks do not divide")
        self.conditions, self.prompts = conditions, torch.tensor(prompts)
        self.seed, self.device, self.rank, self.ranks, self.batch = seed, device, rank, ranks, batch
        self.sigmas = sigmas.cpu()
        self.steps = len(sigmas) - 1
        self.lap_S, self.step_S = torch.zeros(slots, dtype=torch.long), torch.zeros(slots, dtype=torch.long)
        self.prompt_S = self.prompts[torch.arange(slots) % len(prompts)]
        self.latents_SLC = torch.empty(slots, len(conditions.image_ids_L3), channels, device=device)
        generator = torch.Generator().manual_seed(seed_of(seed, slots))
        count = batch // ranks
        self._same = {  # for every batch
            "txt_ids": torch.zeros(conditions.prompt_embeds_PTD.shape[1], 3, device=device),
            "img_ids": conditions.image_ids_L3.to(device, torch.float32),
        }
        if guidance is not None:
            self._same["guidance"] = torch.full((count,), guidance, device=device)
        self.own_order_S = torch.randperm(slots, generator=generator)  # the lower a slot's, the sooner it is own
        self._to_noise(torch.arange(slots))

    def part_of(self, step: int) -> Tensor:
        """This rank's slots of the batch that training step `step` takes."""
        mine = self.batch // self.ranks
        first = step * self.batch % len(self.step_S) + self.rank * mine
        return torch.arange(first, first + mine)

    def inputs(self, slots: Tensor) -> Inputs:
        """What the transformer is given for these slots."""
        prompt_B, device = self.prompt_S[slots], self.device
        return {
            "hidden_states": self.latents_SLC[sent(slots, device)],
            "timestep": sent(self.sigmas[self.step_S[slots]], device),
            "encoder_hidden_states": self._of_prompts(self.conditions.prompt_embeds_PTD, prompt_B),
            "pooled_projections": self._of_prompts(self.conditions.pooled_PD, prompt_B),
            **self._same,
        }

    def _of_prompts(self, conditions_P: Tensor, prompt_B: Tensor) -> Tensor:
        if conditions_P.is_cuda:
            return conditions_P[sent(prompt_B, self.device)].float()
        return sent(conditions_P[prompt_B], self.device).float()

    def spread(self, velocity: Callable[[Inputs], Tensor]) -> None:
        """Walks slots that all stand at noise to steps spread evenly over the trajectory, at random.

        Every rank calls `velocity` equally often, as shards want it.
        """
        slots = len(self.step_S)
        generator = torch.Generator().manual_seed(seed_of(self.seed, slots, 1))
        target_S = (torch.arange(slots) * self.steps // slots)[torch.randperm(slots, generator=generator)]
        for step in range(slots // self.batch):
            part = self.part_of(step)
            for walked in range(self.steps - 1):
                theirs_BLC = velocity(self.inputs(part))
                going = part[target_S[part] > walked]
                self._move(going, theirs_BLC[target_S[part] > walked])

    def advance(self, slots: Tensor, theirs_BLC: Tensor, mine_BLC: Tensor, own_states: float) -> None:
        """One Euler step by the teacher's velocity or, for a share `own_states` of all slots, by the student's own.

        A slot that reached its image starts over from new noise with a new prompt.
        """
        own_B = sent(self.own_order_S[slots] < own_states * len(self.step_S), self.device)
        self._move(slots, torch.where(own_B[:, None, None], mine_BLC, theirs_BLC))
        done = slots[self.step_S[slots] == self.steps]
        if not len(done):
            return
        self.lap_S[done] += 1
        self.step_S[done] = 0
        self._to_noise(done)
        places = [torch.randint(len(self.prompts), (), generator=self._generator(slot, 1)) for slot in done.tolist()]
        self.prompt_S[done] = self.prompts[torch.stack(places)]

    def tensors(self) -> dict[str, Tensor]:
        """All that changes, on the CPU, of all ranks: every one must call it."""
        parts = {name: tensor.clone() for name, tensor in self._changing().items()}
        if self.ranks > 1:
            mine = torch.cat([self.part_of(step) for step in range(len(self.step_S) // self.batch)])
            for name, tensor in parts.items():
                only_mine = torch.zeros_like(tensor, device=self.device)
                only_mine[mine] = tensor[mine.to(tensor.device)].to(self.device)
                dist.all_reduce(only_mine)
                parts[name] = only_mine
        return {name: tensor.cpu() for name, tensor in parts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for name, tensor in self._changing().items():
            tensor.copy_(tensors[name])

    def _changing(self) -> dict[str, Tensor]:
        return {"latents": self.latents_SLC, "step": self.step_S, "lap": self.lap_S, "prompt": self.prompt_S}

    def _move(self, slots: Tensor, velocity_BLC: Tensor) -> None:
        now_B = self.step_S[slots]
        stride_B = sent(self.sigmas[now_B + 1] - self.sigmas[now_B], self.device)
        self.latents_SLC[sent(slots, self.device)] += stride_B[:, None, None] * velocity_BLC.float()
        self.step_S[slots] += 1

    def _to_noise(self, slots: Tensor) -> None:
        """New noise, of each slot's own lap, in one copy to the device."""
        shape = self.latents_SLC.shape[1:]
        noise = [torch.randn(shape, generator=self._generator(slot, 0)) for slot in slots.tolist()]
        self.latents_SLC[sent(slots, self.device)] = sent(torch.stack(noise), self.device)

    def _generator(self, slot: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, slot, int(self.lap_S[slot]), use))


class HeldOut:
    """States of the teacher's trajectories for prompts that are not trained on, one a prompt; the same on every rank.

    `batch` states are passed at once.
    """

    def __init__(
        self,
        conditions: Conditions,
        prompts: Sequence[int],
        sigmas: Tensor,
        guidance: float | None,
        *,
        batch: int,
        channels: int,
        seed: int,
        device: torch.device,
        velocity: Callable[[Inputs], Tensor],
    ):
        batch = next(size for size in range(min(batch, len(prompts)), 0, -1) if len(prompts) % size == 0)
        self._rollouts = Rollouts(
            conditions,
            prompts,
            sigmas,
            guidance,
            slots=len(prompts),
            batch=batch,
            channels=channels,
            seed=seed,
            device=device,
        )
        self._rollouts.spread(velocity)

    def __iter__(self) -> Iterator[Inputs]:
        for step in range(len(self._rollouts.step_S) // self._rollouts.batch):
            yield self._rollouts.inputs(self._rollouts.part_of(step))
