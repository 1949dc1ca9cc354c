"""End-to-end self-distillation at any size: a ternary student of 11.9 billion parameters trains on one 80 GB GPU.

Latent weights are bfloat16 and step inside the backward pass (distill_optimizer.py), or float32 and AdamW's where there
is room; every block is computed again in it; the teacher stays beside the student, in its own dtype. distill_memory.py
gives the arithmetic.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint as computed_again

from bitflux_core.checkpoint import empty_transformer
from bitflux_core.distill import Conditions, LatentTernaryLinear, drawn_timesteps, make_student, sampler_sigmas
from bitflux_core.distill_attention import TrainedAttention
from bitflux_core.distill_checkpoint import (
    Checkpoint,
    Progress,
    latest_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from bitflux_core.distill_features import BlockOutputs, spread_names, state_errors
from bitflux_core.distill_optimizer import FactoredInBackward, dampen, seed_of
from bitflux_core.distill_recipe import EndToEndSettings, Record
from bitflux_core.distill_sensitivity import error_weights, velocities_weighing
from bitflux_core.distill_shards import local, local_rows, shard, whole_of, whole_rows
from bitflux_core.distill_states import HeldOut, Inputs, Rollouts
from bitflux_core.errors import UserError
from bitflux_core.layers import BLOCKS, empty_ternary_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.training import (
    FlatGradients,
    Replayed,
    deterministic,
    rising_cosine,
    use_fast_math,
    warmup_then_cosine,
)
from kernels.packing import pack_planes, unpack_planes
from kernels.training import codes_of

RESULT = "best.safetensors"
NEAR_BYTES = 1 << 30  # conditions smaller than this lie on the GPU; FLUX.1-dev's are 30 GB
WARMUP_SHARE = 20  # of the steps, one in so many
WEIGHED_ON = 4  # trajectories, or a batch of them, that say how much each of the sampler's steps counts
_REST = "rest"  # the checkpoint's part with all but latents


class EndToEnd:
    """Teacher and student on `device`, the states they are trained on, and the way back to the last checkpoint.

    `teacher` is full-precision and on `device`, `start` the ternary transformer to train on, on the CPU; `folder` is
    where checkpoints and the best weights go. With `mesh`, one rank a GPU: every rank is given the same arguments, and
    keeps its rows of teacher and latents. With `graph` one CUDA graph launches a step, which keeps what its backward
    pass needs, where others compute it again; it pays where models are so small that Python is slower than the GPU.
    UserError for a batch that the ranks cannot share, for AdamW on several and for a damaged checkpoint.
    """

    def __init__(
        self,
        teacher: FluxTransformer2DModel,
        start: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        conditions: Conditions,
        trained: Sequence[int],
        held_out: Sequence[int],
        settings: EndToEndSettings,
        device: torch.device,
        folder: Path,
        mesh: DeviceMesh | None = None,
        graph: bool = False,
    ):
        """`trained` and `held_out` are places of prompts in `conditions`; one that is named twice counts twice."""
        if device.type == "cuda":
            use_fast_math()
        self.settings, self.device, self.folder = settings, device, folder
        self.rank, self.ranks = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
        if settings.batch % self.ranks:
            raise UserError(f"batches of {settings.batch} images on {self.ranks} GPUs: take a multiple of {self.ranks}")
        by_adam = settings.optimizer == "adam"
        if by_adam and mesh:
            raise UserError("AdamW trains on one GPU: take the factored optimizer on several")
        self.start = start
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher.set_attn_processor(TrainedAttention())
        if mesh:
            shard(self.teacher, mesh, set())  # before there is a student, so that never both are whole on a GPU
        self.student = make_student(teacher, start, latent_dtype=torch.float32 if by_adam else torch.bfloat16)
        if not graph:
            # No layer draws random numbers.
            again = partial(computed_again, use_reentrant=False, preserve_rng_state=False)
            self.student.enable_gradient_checkpointing(again)
        if mesh:
            rest = {p for name, p in self.student.named_parameters() if not name.endswith(".latent")}
            shard(self.student, mesh, rest)
        self.blocks = [f"{kind}.{index}" for kind in BLOCKS for index in range(len(getattr(teacher, kind)))]
        chosen = spread_names(self.blocks, settings.features)
        self._theirs, self._mine = BlockOutputs(self.teacher, chosen), BlockOutputs(self.student, chosen)

        named = dict(self.student.named_parameters())
        self._layers = [layer for layer in self.student.modules() if isinstance(layer, LatentTernaryLinear)]
        self.latents = {name: p for name, p in named.items() if name.endswith(".latent")}
        self.others = {name: p for name, p in named.items() if name not in self.latents}
        scales = [p for name, p in self.others.items() if name.endswith(".log_scale")]
        rest_of_others = [p for name, p in self.others.items() if not name.endswith(".log_scale")]
        groups: list[dict[str, Any]] = [
            {"params": scales, "peak": settings.scale_lr},
            {"params": rest_of_others, "peak": settings.other_lr},
        ]
        self.factored: FactoredInBackward | None = None
        if by_adam:
            groups.append({"params": list(self.latents.values()), "peak": settings.latent_lr})
        else:
            self.factored = FactoredInBackward(self.latents, settings.seed)
        self.gradients = FlatGradients(parameter for group in groups for parameter in group["params"])
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

        self.step = 0
        self.waited = 0  # evaluations since the best one
        self.best = float("inf")
        self.begun: str | None = None  # the phase whose first weights were looked at
        self.seconds = 0.0
        self.records: list[Record] = []
        self._losses = torch.zeros((), device=device)
        self._losses_added = 0

        if sum(tensor.nbytes for tensor in vars(conditions).values()) < NEAR_BYTES:
            conditions = Conditions(**{name: tensor.to(device) for name, tensor in vars(conditions).items()})
        sigmas = sampler_sigmas(scheduler, settings.sampler_steps, len(conditions.image_ids_L3), torch.device("cpu"))
        guidance = settings.guidance if teacher.config.guidance_embeds else None
        share = settings.batch // self.ranks
        common = {"channels": teacher.config.in_channels, "device": device}
        self.held_out = HeldOut(
            conditions,
            held_out,
            sigmas,
            guidance,
            batch=share,
            seed=seed_of(settings.seed, 1),
            velocity=self._teach,
            **common,
        )
        self.rollouts = Rollouts(
            conditions,
            trained,
            sigmas,
            guidance,
            slots=whole_batches(settings.slots, settings.batch),
            batch=settings.batch,
            seed=seed_of(settings.seed, 2),
            rank=self.rank,
            ranks=self.ranks,
            **common,
        )
        self._sigmas_K = sigmas[:-1].to(device)
        self.weights_K = torch.ones_like(self._sigmas_K)  # of the errors at each of the sampler's steps
        checkpoint = latest_checkpoint(folder)
        if checkpoint:
            self._restore(checkpoint)
        else:
            if self.rank == 0:
                print(f"distill: before the first step, {velocities_before(settings):,} velocities", flush=True)
            if settings.weighted:
                starts = Rollouts(
                    conditions,
                    trained,
                    sigmas,
                    guidance,
                    slots=whole_batches(WEIGHED_ON, settings.batch),  # as many on many GPUs as on one
                    batch=share,
                    seed=seed_of(settings.seed, 3),
                    **common,
                )
                at_noise = (starts.inputs(starts.part_of(step)) for step in range(len(starts.step_S) // share))
                self.weights_K.copy_(error_weights(at_noise, sigmas, self._teach, self._predict))
            self.rollouts.spread(self._teach)
        self._replayed = Replayed(self._forward_backward) if graph else None

    @property
    def native_steps(self) -> int:
        """Where the int8 phase begins."""
        return self.settings.steps - self.settings.int8_steps

    @property
    def phase(self) -> str:
        return "native" if self.step < self.native_steps else "int8"

    def run(self, look: Callable[[FluxTransformer2DModel, int], None] = lambda _student, _step: None) -> list[Record]:
        """Trains to the end, from wherever it stands; the best weights of the last phase are in `folder` then.

        `look` is given the student and the steps made, on every rank, with each record. UserError for a loss that
        is not finite.
        """
        began = time.monotonic() - self.seconds
        while self.step < self.settings.steps:
            if self.begun != self.phase:
                self._begin_phase(began)
                self.show(look)
            self.train_step()
            if self.step % self.settings.interval == 0 or self.step in (self.native_steps, self.settings.steps):
                self._evaluate(began)
                self.show(look)
        return self.records

    def train_step(self) -> None:
        """One batch forward and backward, in which the latents step; then all else, and the states."""
        with deterministic():
            self._train_step()

    def _train_step(self) -> None:
        settings = self.settings
        self._set_activations(self.phase)
        factor = self._rate_factor()
        latent_lr = settings.latent_lr * factor
        dampening = latent_lr * settings.dampening * rising_cosine(self.step, settings.steps)
        slots = self.rollouts.part_of(self.step)
        self.gradients.zero()
        if self.factored:
            self.factored.begin(self.step, latent_lr, dampening)
        run = self._replayed or self._forward_backward
        target_BLC, velocity_BLC, loss = run(self.rollouts.inputs(slots))
        self.gradients.average_over_ranks(self.ranks)
        self.gradients.clip(1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        if not self.factored:
            dampen(list(self.latents.values()), dampening)
        self._losses += loss
        self._losses_added += 1
        own = settings.own_states * min(1.0, 3 * self.step / settings.steps)
        self.rollouts.advance(slots, target_BLC, velocity_BLC, own)
        self.step += 1

    def _rate_factor(self) -> float:
        steps = self.settings.steps
        return warmup_then_cosine(self.step, steps, max(1, steps // WARMUP_SHARE))

    def _forward_backward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's velocity, the student's, and the loss; gradients are added up, and factored latents stepped."""
        with self._theirs.kept():
            target_BLC = self._teach(inputs)
        with self._mine.kept():
            velocity_BLC = self._predict(inputs)
        errors_B = state_errors(velocity_BLC, target_BLC)
        if self._mine.outputs:
            pairs = list(zip(self._mine.outputs, self._theirs.outputs, strict=True))
            errors_B = errors_B + self.settings.feature_weight * sum(state_errors(*pair) for pair in pairs) / len(pairs)
        loss = (self._weights_of(inputs) * errors_B).mean()
        self._theirs.drop()
        self._mine.drop()
        loss.backward()
        return target_BLC, velocity_BLC.detach(), loss.detach()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Mean relative velocity error on the held-out states, weighted as in training, as the student is now."""
        errors = [
            self._weights_of(inputs) * state_errors(self._predict(inputs), self._teach(inputs))
            for inputs in self.held_out
        ]
        return torch.cat(errors).mean().item()

    @torch.no_grad()
    def codes_flipped(self) -> float:
        """Share of the codes that differ from the start."""
        flipped, count = torch.zeros((), device=self.device, dtype=torch.long), 0
        for name, latent in self.latents.items():
            layer = self.start.get_submodule(name.removesuffix(".latent"))
            assert isinstance(layer, TernaryLinear)
            packed_NJ = layer.packed[local_rows(latent)].to(self.device)
            flipped += (unpack_planes(packed_NJ, layer.in_features) != codes_of(local(latent))).sum()
            count += latent.numel()
        if self.ranks > 1:
            dist.all_reduce(flipped)
        return flipped.item() / count

    def _weights_of(self, inputs: Inputs) -> Tensor:
        """[B], by the step of the sampler at which each state stands."""
        return ((inputs["timestep"][:, None] == self._sigmas_K) * self.weights_K).sum(1)

    def _teach(self, inputs: Inputs) -> Tensor:
        """The teacher's velocity, in its own dtype's arithmetic, as it draws."""
        cast = {name: tensor.to(self._drawn_in) for name, tensor in self._as_drawn(inputs).items()}
        with torch.no_grad():
            return self.teacher(**cast, return_dict=False)[0].float()

    def _predict(self, inputs: Inputs) -> Tensor:
        with self._autocast():
            return self.student(**self._as_drawn(inputs), return_dict=False)[0].float()

    def _as_drawn(self, inputs: Inputs) -> Inputs:
        return {**inputs, "timestep": drawn_timesteps(inputs["timestep"], self._drawn_in).float()}

    @property
    def _drawn_in(self) -> torch.dtype:
        return next(self.teacher.parameters()).dtype

    def show(self, look: Callable[[FluxTransformer2DModel, int], None]) -> None:
        """Gives `look` the student as it is, with the activations and the step of the last record."""
        self._set_activations(self.records[-1].phase)
        with torch.no_grad(), self._autocast():
            look(self.student, self.records[-1].step)

    def _autocast(self) -> torch.autocast:
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)

    def _set_activations(self, phase: str) -> None:
        int8 = phase == "int8"
        if self._replayed and any(layer.int8_activations != int8 for layer in self._layers):
            self._replayed.forget()
        for layer in self._layers:
            layer.int8_activations = int8

    def _begin_phase(self, began: float) -> None:
        """Other activations, other errors: what the phase starts from is the first to be its best.

        It goes on from the last weights, whose latents and moments there are, not from the best of the phase before,
        of which only the codes were kept: the result is the best of the int8 phase.
        """
        self.begun = self.phase
        self._set_activations(self.phase)
        self._record(self.phase, None, began)
        self.best, self.waited = self.records[-1].held_out, 0
        self._save_best()

    def _evaluate(self, began: float) -> None:
        """Ends an interval: a record, the best weights, a checkpoint; and a phase that gains nothing any more."""
        loss = self._losses / self._losses_added
        if self.ranks > 1:
            dist.all_reduce(loss)
        assert self.begun is not None
        self._record(self.begun, loss.item() / self.ranks, began)
        self._losses.zero_()
        self._losses_added = 0
        self.waited += self._rate_factor() <= 0.5
        if self.records[-1].held_out < self.best:
            self.best, self.waited = self.records[-1].held_out, 0
            self._save_best()
        if self.waited >= self.settings.patience:
            self.step = self.native_steps if self.begun == "native" else self.settings.steps
        self.save()

    def _record(self, phase: str, loss: float | None, began: float) -> None:
        held_out, flipped = self.held_out_error(), self.codes_flipped()
        self.seconds = time.monotonic() - began
        if not math.isfinite(held_out) or not math.isfinite(loss or 0):
            problem = f"distill: loss {loss} and held-out error {held_out} at step {self.step} are not finite"
            if not self.step:
                raise UserError(f"{problem}: copy the full-precision model again")
            raise UserError(
                f"{problem}: remove {self.folder.parent}, the training's own folder, and take a lower learning rate "
                "(--distill-rate); the blocks that it started at are kept"
            )
        self.records.append(Record(self.step, phase, loss, held_out, flipped, self.seconds))
        if self.rank == 0:
            print(
                f"distill: step {self.step}/{self.settings.steps} ({phase}) "
                f"loss {'-' if loss is None else f'{loss:.5f}'} held out {held_out:.5f} "
                f"{flipped:.2%} of the codes flipped {self.seconds:.0f} s",
                flush=True,
            )

    @torch.no_grad()
    def _save_best(self) -> None:
        """The student as a ternary transformer's tensors, in float32."""
        tensors = {name: whole_of(p).cpu() for name, p in self.others.items() if not name.endswith(".log_scale")}
        for name, latent in self.latents.items():
            layer = name.removesuffix(".latent")
            packed_NJ = pack_planes(codes_of(whole_of(latent)).to(torch.int8)).cpu()
            if self.rank == 0:
                tensors[f"{layer}.packed"] = packed_NJ
                tensors[f"{layer}.scale"] = self.others[f"{layer}.log_scale"].exp().cpu()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / RESULT, tensors)

    def save(self) -> None:
        """Writes a checkpoint of this step; every rank must call it."""
        progress = Progress(self.step, self.waited, self.best, self.begun, self.seconds, self.records)
        parts = self._parts()
        if self.rank == 0:
            save_checkpoint(self.folder, parts, progress)
        else:
            for _ in parts:  # its share in gathering them
                pass
        if self.ranks > 1:
            dist.barrier()  # nobody goes on from a checkpoint that is not whole

    @torch.no_grad()
    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for block in self.blocks:
            part = {}
            for name in (name for name in self.latents if name.startswith(f"{block}.")):
                part[name] = whole_of(self.latents[name].detach()).cpu()
                if self.factored:
                    part[f"{name}.row"] = whole_rows(self.factored.rows[name], self.latents[name]).cpu()
                    part[f"{name}.column"] = self.factored.columns[name].cpu()
            yield block, part
        rest = {name: p.detach().cpu() for name, p in self.others.items()}
        for index, moments in self.adam.state_dict()["state"].items():
            rest |= {f"adam.{index}.{key}": tensor.cpu() for key, tensor in moments.items()}
        rest["weights"] = self.weights_K.cpu()
        rest |= {f"rollouts.{key}": tensor for key, tensor in self.rollouts.tensors().items()}
        yield _REST, rest

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            for block in self.blocks:
                part = checkpoint.part(block)
                for name in (name for name in self.latents if name.startswith(f"{block}.")):
                    rows = local_rows(self.latents[name])
                    local(self.latents[name]).copy_(part[name][rows])
                    if self.factored:
                        self.factored.rows[name].copy_(part[f"{name}.row"][rows])
                        self.factored.columns[name].copy_(part[f"{name}.column"])
            rest = checkpoint.part(_REST)
            for name, parameter in self.others.items():
                parameter.copy_(rest[name])
            self.weights_K.copy_(rest["weights"])
            moments: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in rest if key.startswith("adam.")):
                _, index, moment = key.split(".")
                moments.setdefault(int(index), {})[moment] = rest[key]
            groups = self.adam.state_dict()["param_groups"]
            self.adam.load_state_dict({"state": moments, "param_groups": groups})
            prefix = "rollouts."
            self.rollouts.restore({k.removeprefix(prefix): v for k, v in rest.items() if k.startswith(prefix)})
        except (KeyError, RuntimeError, TypeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"{checkpoint.folder} is no checkpoint of this training ({problem}): remove {self.folder}"
            ) from error
        progress = checkpoint.progress
        self.step, self.waited, self.seconds = progress.step, progress.waited, progress.seconds
        self.best, self.begun, self.records = progress.best, progress.begun, progress.records


def velocities_before(settings: EndToEndSettings) -> int:
    """How many velocities of a state are computed before the first step: to weigh errors, and to walk states apart."""
    weighed_on = whole_batches(WEIGHED_ON, settings.batch) if settings.weighted else 0
    walked = settings.held_out + whole_batches(settings.slots, settings.batch)
    return weighed_on * velocities_weighing(settings.sampler_steps) + walked * (settings.sampler_steps - 1)


def whole_batches(count: int, batch: int) -> int:
    """The least multiple of `batch` that is no less than `count`."""
    return math.ceil(count / batch) * batch


def finished(folder: Path, steps: int) -> list[Record] | None:
    """The log of a training of `steps` steps in `folder` that has come to its end; None for any other."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None or checkpoint.progress.step != steps:
        return None
    return checkpoint.progress.records


def load_result(config: dict, folder: Path) -> FluxTransformer2DModel:
    """The best student in `folder` as a ternary transformer, on the CPU. UserError for a damaged file."""
    remedy = f"remove {folder} and train from the start"
    tensors = load_tensors(folder / RESULT, remedy)
    rank = next((len(tensor) for name, tensor in tensors.items() if name.endswith(".down")), 0)
    transformer = empty_transformer(config)
    empty_ternary_linears(transformer, rank=rank)
    try:
        transformer.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / RESULT} is of another model ({problem}): {remedy}") from error
    return transformer.eval().requires_grad_(False)
