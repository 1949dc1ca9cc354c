"""The ablation: one ternary transformer for every step of the method, and for what the method leaves out."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from bitflux_core.accounting import BF16_BYTES, SCALE_BYTES
from bitflux_core.distill_recipe import EndToEndSettings, Optimizer
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.loading import load_transformer
from bitflux_core.quantizer.block_walk import CalibrationSet, Init, WalkSettings, quantize_blocks
from bitflux_core.quantizer.blocks import BlockSource
from bitflux_core.quantizer.end_to_end import EndToEndTask, Prompts, split_prompts
from bitflux_core.quantizer.quantize import (
    ARITHMETIC,
    QuantizeSettings,
    arithmetic_of,
    calibrate,
    check_blocks_fit,
    collect,
    digest_of,
    encode,
    provenance_of,
)
from bitflux_core.quantizer.reconstruction import ReconstructionSettings
from bitflux_core.quantizer.work import WorkFolder
from bitflux_core.ternary import least_squares
from kernels.packing import codes_bytes
from kernels.reference import Activations

GROUP = 64  # columns that share a scale in the row with groups
RANK = 16  # of the correction in the row with one
OWN_STATES = EndToEndSettings.own_states


@dataclass(frozen=True)
class Variant:
    """One row. `distilled` trains end to end on velocity, errors `weighted` by what they do to the image; `group` puts
    a scale on every so many columns of a row; `low_rank` corrects every ternary layer.
    """

    name: str
    init: Init = "compensated"
    group: int | None = None
    modulation: bool = True
    low_rank: int = 0
    reconstructed: bool = False
    distilled: bool = False
    weighted: bool = False
    own_states: float = 0.0
    int8_in_training: bool = False
    activations: Activations = "native"


VARIANTS = (
    Variant("absmean", init="absmean"),
    Variant("least squares", init="least-squares"),
    Variant("least squares in groups of 64", init="least-squares", group=GROUP),
    Variant("least squares with bf16 modulation", init="least-squares", modulation=False),
    Variant("+ compensation"),
    Variant("+ compensation with bf16 modulation", modulation=False),
    Variant(f"+ compensation with a correction of rank {RANK}", low_rank=RANK),
    Variant("+ block-wise", reconstructed=True),
    Variant("+ end to end", reconstructed=True, distilled=True),
    Variant("+ weighted noise levels", reconstructed=True, distilled=True, weighted=True),
    Variant("+ own-state rollouts", reconstructed=True, distilled=True, weighted=True, own_states=OWN_STATES),
    Variant(
        "+ own-state rollouts drawn in int8",
        reconstructed=True,
        distilled=True,
        weighted=True,
        own_states=OWN_STATES,
        activations="int8",
    ),
    Variant(
        "+ int8 in the loop drawn in int8",
        reconstructed=True,
        distilled=True,
        weighted=True,
        own_states=OWN_STATES,
        int8_in_training=True,
        activations="int8",
    ),
)


@dataclass(frozen=True)
class TrainingBudget:
    """Of the trained rows: steps a block, steps end to end, and of these the states at once and the optimizer."""

    reconstruction_steps: int
    distill_steps: int
    batch: int
    optimizer: Optimizer


class Ablation:
    """Makes the variants of the pipeline in `pipeline_dir`; blocks under way lie in `directory`.

    `settings` give calibration, sampling and seed; each variant says the rest. UserError as for `quantize`.
    """

    def __init__(
        self,
        pipeline_dir: Path,
        directory: Path,
        settings: QuantizeSettings,
        budget: TrainingBudget,
        device: torch.device,
    ):
        self.pipeline_dir, self.directory = pipeline_dir, directory
        self.settings, self.budget, self.device = settings, budget, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.source = BlockSource(pipeline_dir / "transformer", device, dtype)
        rank = max(variant.low_rank for variant in VARIANTS)
        steps = budget.reconstruction_steps
        check_blocks_fit(self.source, replace(settings, reconstruction_steps=steps, low_rank=rank))
        # Trainings go on from what lies in their folders: all that they are made by is part of the recipe.
        trained = {variant.name: asdict(self._training(variant)) for variant in VARIANTS if variant.distilled}
        prompts = {"distill_prompts": digest_of(settings.distill_prompts)}
        self.recipe = {**provenance_of(pipeline_dir, settings), **vars(budget), **prompts, "end_to_end": trained}
        self.recipe[ARITHMETIC] = arithmetic_of(self.source)
        self.calibration: CalibrationSet = calibrate(
            self.source, pipeline_dir, settings, WorkFolder(directory / "calibration", self.recipe)
        )

    def teacher(self) -> FluxTransformer2DModel:
        """In float32, on the CPU."""
        return load_transformer(
            "bf16", pipeline_dir=self.pipeline_dir, ternary_dir=None, device="cpu", dtype=torch.float32
        )

    def check(self, variant: Variant) -> None:
        """UserError where the variant's training could not be: too few prompts, too little GPU memory."""
        if variant.distilled:
            task, _ = self._task(variant)
            task.check(self.device)

    def transformer(self, variant: Variant) -> FluxTransformer2DModel:
        """The variant's transformer on the CPU, ready to draw."""
        if variant.group:
            return _grouped(self.teacher(), variant.group)
        transformer = self._initialised(variant)
        if variant.distilled:
            transformer = self._distilled(variant, transformer)
        for layer in block_linears(transformer).values():
            if isinstance(layer, TernaryLinear):
                layer.activations = variant.activations
        return transformer

    def storage_bytes(self, variant: Variant) -> int:
        """Bytes of the variant's tensors as stored: five codes a byte, float32 scales, all else in bf16."""
        empty = self.source.empty
        stored = BF16_BYTES * sum(parameter.numel() for parameter in empty.parameters())
        for name, layer in block_linears(empty).items():
            if _is_modulation(name) and not variant.modulation:
                continue
            columns, rows = layer.in_features, layer.out_features
            scales = -(-columns // variant.group) if variant.group else 1
            stored += codes_bytes("trits", rows, columns) + rows * (SCALE_BYTES * scales - BF16_BYTES * columns)
            stored += BF16_BYTES * variant.low_rank * (rows + columns)
        return stored

    def _initialised(self, variant: Variant) -> FluxTransformer2DModel:
        steps = self.budget.reconstruction_steps if variant.reconstructed else 0
        training = ReconstructionSettings(steps, seed=self.settings.seed) if steps else None
        how = WalkSettings(variant.init, training, variant.modulation, variant.low_rank)
        folder = f"{variant.init}{'-trained' if steps else ''}{'' if variant.modulation else '-bf16-modulation'}"
        folder += f"-rank-{variant.low_rank}" if variant.low_rank else ""
        work = WorkFolder(self.directory / folder, self.recipe)
        quantize_blocks(self.source, self.calibration, how, work)
        return collect(self.source, work)

    def _training(self, variant: Variant) -> EndToEndSettings:
        return EndToEndSettings(
            steps=self.budget.distill_steps,
            int8_steps=self.budget.distill_steps // 4 if variant.int8_in_training else 0,
            batch=self.budget.batch,
            sampler_steps=self.settings.sampling.steps,
            guidance=self.settings.sampling.guidance,
            own_states=variant.own_states,
            weighted=variant.weighted,
            optimizer=self.budget.optimizer,
            seed=self.settings.seed,
        )

    def _distilled(self, variant: Variant, start: FluxTransformer2DModel) -> FluxTransformer2DModel:
        task, prompts = self._task(variant)
        if not task.prepared:
            task.prepare(start, encode(self.pipeline_dir, prompts.distinct, self.settings.sampling, self.device))
        task.run(self.device)
        return task.result()[0]

    def _task(self, variant: Variant) -> tuple[EndToEndTask, Prompts]:
        """Rows that differ only in how they draw share one training."""
        how = self._training(variant)
        prompts = split_prompts(self.settings.distill_prompts, how.held_out, how.seed)
        name = f"end-to-end-own-{how.own_states}-int8-{how.int8_steps}{'-weighted' if how.weighted else ''}"
        folder = self.directory.absolute() / name
        parts = (how, self.settings.sampling, prompts.trained, prompts.held_out)
        return EndToEndTask(self.pipeline_dir.absolute(), folder, *parts), prompts


def _is_modulation(name: str) -> bool:
    return name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))


@torch.no_grad()
def _grouped(transformer: FluxTransformer2DModel, group: int) -> FluxTransformer2DModel:
    """Plain linears that hold ternary weights with a least-squares scale for every `group` columns of a row."""
    for linear in block_linears(transformer).values():
        assert isinstance(linear, nn.Linear)
        parts: list[Tensor] = [least_squares(part).dequantize() for part in linear.weight.split(group, dim=1)]
        linear.weight.copy_(torch.cat(parts, dim=1))
    return transformer
