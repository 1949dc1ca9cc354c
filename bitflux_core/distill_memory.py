"""The memory plan of end-to-end training: 11.9 billion parameters, teacher and student, on one 80 GB GPU.

Held all along: the teacher and the student's latent weights in bfloat16 (23.8 + 23.7 GB for FLUX.1-dev); all else of
the student, 0.07 billion parameters, in float32 with gradients and AdamW's two moments (1.1 GB); of the latents' second
moments a row and a column each (0.02 GB). Alive for a while: what enters each block (28 MB a block and image of
1024x1024); one block, computed again for its backward pass, with its ternary weights; and one layer's gradient, for the
optimizer steps inside the backward pass and frees it at once. Plain AdamW would want 12 bytes more for every latent,
142 GB.

A step that ends inside backward leaves nothing to accumulate gradients in: a step's images all pass at once, on one GPU
or spread over several, which then share teacher and latents (FSDP2) and gather a block's weights while they compute it.
"""

import gc
from dataclasses import asdict, dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from bitflux_core.errors import UserError
from bitflux_core.layers import BLOCKS, block_linears

FLOAT, BF16 = 4, 2
ADAM_BYTES = 16  # a parameter: itself, its gradient, two moments, all in float32
STEP_BYTES = 16  # an element of the layer whose latents step: bfloat16 and float32 gradients, update, random bits
SAVED_WIDTHS = 30  # bfloat16 numbers a token and channel that a block keeps for its backward pass
GRADIENT_WIDTHS = 26  # and that are alive beside them while it runs; 12 of them in flash attention's ordered sums
GATHERED_BLOCKS = 2  # with several GPUs: the one computed and the next one
RESERVE = 1_500_000_000  # libraries' workspaces, and what the allocator cannot use


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU: what is alive at the peak of a step, and `building`, while a model is still whole."""

    building: int
    teacher: int
    latents: int
    others: int
    moments: int
    block_inputs: int
    block: int
    gradients: int
    gathered: int
    reserve: int = RESERVE

    @property
    def step(self) -> int:
        """The peak of a step."""
        return sum(asdict(self).values()) - self.building

    @property
    def total(self) -> int:
        return max(self.building, self.step)


def memory_plan(
    empty: FluxTransformer2DModel,
    *,
    batch: int,
    tokens: int,
    features: int,
    gpus: int = 1,
    low_rank: int = 0,
    dtype: torch.dtype,
    by_adam: bool = False,
    recomputed: bool = True,
) -> MemoryPlan:
    """An estimate from shapes alone; `empty` may lie on the meta device.

    `batch` images on each GPU, `tokens` of text and image each, `features` blocks whose outputs are compared, the
    teacher in `dtype`, corrections of `low_rank` beside the latents, which AdamW keeps in float32 if `by_adam`. Blocks
    that are not `recomputed` keep what their backward pass needs.
    """
    blocks = [block for kind in BLOCKS for block in getattr(empty, kind)]
    layers = list(block_linears(empty).values())
    sizes = [layer.in_features * layer.out_features for layer in layers]
    every = sum(parameter.numel() for parameter in empty.parameters())
    scales = sum(layer.out_features for layer in layers)
    largest_block = max(_latents_of(block) for block in blocks)
    passing = batch * tokens * empty.inner_dim * BF16  # what goes from block to block
    gathered = 0
    if gpus > 1:  # teacher's or student's blocks, and the student's gradients in bfloat16 and float32
        gathered = GATHERED_BLOCKS * largest_block * BF16 + largest_block * (BF16 + FLOAT)
    corrections = sum(low_rank * (layer.in_features + layer.out_features) for layer in layers)
    keeping = 1 if recomputed else len(blocks)
    others = every - sum(sizes) + scales + corrections
    teacher, student = every * dtype.itemsize, sum(sizes) * (FLOAT if by_adam else BF16) + others * FLOAT
    # The teacher is spread before the student is made.
    building = max(teacher, teacher // gpus + student + max(sizes) * STEP_BYTES)
    return MemoryPlan(
        building=building + RESERVE,
        teacher=teacher // gpus,
        latents=sum(sizes) * (ADAM_BYTES if by_adam else BF16) // gpus,
        others=others * ADAM_BYTES,
        moments=0 if by_adam else sum(layer.in_features + layer.out_features for layer in layers) * FLOAT,
        block_inputs=(len(blocks) + 2 * features) * passing,
        block=largest_block * BF16 + (SAVED_WIDTHS * keeping + GRADIENT_WIDTHS) * passing,
        gradients=max(sizes) * STEP_BYTES,
        gathered=gathered,
    )


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """UserError where a CUDA device has less free memory than the plan says; other devices are not asked."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()  # what earlier work here held is free
    free = torch.cuda.mem_get_info(device)[0]
    if plan.total > free:
        raise UserError(
            f"training end to end takes about {plan.total / 1e9:.1f} GB on each GPU, {free / 1e9:.1f} GB are free: "
            "take a smaller batch, more GPUs or larger ones, or leave the end-to-end phase out"
        )


def _latents_of(block: nn.Module) -> int:
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
