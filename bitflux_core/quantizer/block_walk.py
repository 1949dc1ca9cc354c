"""The walk through the transformer: each block is quantized behind the ternary blocks before it, then stepped over.

Legend: N output features, K input features, R rank of a correction.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bitflux_core.errors import UserError
from bitflux_core.layers import check_rank
from bitflux_core.low_rank import LowRank, best_low_rank
from bitflux_core.quantizer.blocks import BlockSource, Stream, recorded_inputs
from bitflux_core.quantizer.calibration import Calibration, States
from bitflux_core.quantizer.compensation import Compensator, InputMoments
from bitflux_core.quantizer.reconstruction import Reconstruction, ReconstructionSettings, reconstruct
from bitflux_core.quantizer.snr import Snr, measure
from bitflux_core.quantizer.work import WorkFolder
from bitflux_core.ternary import TernaryWeight, absmean, least_squares
from bitflux_core.training import plain_arithmetic
from kernels.packing import pack_planes
from kernels.reference import dequantize

Init = Literal["absmean", "least-squares", "compensated"]
ROUNDING: dict[Init, Callable[[Tensor], TernaryWeight]] = {"absmean": absmean, "least-squares": least_squares}
INITS: tuple[Init, ...] = ("compensated", "least-squares", "absmean")

# The order in which a block uses its linears, those with one input together: what a stage reads depends only on
# stages before it.
STAGES = {
    "transformer_blocks": (
        (("norm1.linear", "norm1_context.linear"),),
        (
            ("attn.to_q", "attn.to_k", "attn.to_v"),
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ),
        (("attn.to_out.0",), ("attn.to_add_out",)),
        (("ff.net.0.proj",), ("ff_context.net.0.proj",)),
        (("ff.net.2",), ("ff_context.net.2",)),
    ),
    "single_transformer_blocks": (
        (("norm.linear",),),
        (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),),
        (("proj_out",),),
    ),
}


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration states and what turns them into the transformer's inputs."""

    calibration: Calibration
    states: States


@dataclass(frozen=True)
class WalkSettings:
    """How every block is quantized: without `reconstruction` it stays as initialised, without `modulation` the layers
    that make scales and shifts of the embeddings keep their full weights. Ternary layers have corrections of rank
    `low_rank`, or none for 0.
    """

    init: Init
    reconstruction: ReconstructionSettings | None = None
    modulation: bool = True
    low_rank: int = 0

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise UserError(f"unknown initialisation '{self.init}': choose from {', '.join(INITS)}")


@torch.no_grad()
@plain_arithmetic()
def quantize_blocks(
    source: BlockSource,
    calibration: CalibrationSet | None,
    settings: WalkSettings,
    work: WorkFolder,
    report: Callable[[str, list[Snr]], None] = lambda _name, _rows: None,
) -> None:
    """Quantizes every block that `work` does not hold yet and saves it there with its signal-to-noise ratios.

    A block is always stepped over as it was saved, so that an interrupted and resumed walk gives the same codes.
    Without calibration nothing is measured but weights; `compensated` and reconstruction need it. UserError where
    they lack it, for weights that are missing or not finite, and for a rank that a layer cannot have.
    """
    check_rank(source.empty, settings.low_rank)
    if calibration is None and (settings.init == "compensated" or settings.reconstruction):
        raise UserError(f"{settings.init} codes need calibration prompts: name a file of them")
    streams = calibration.calibration.streams(source, calibration.states) if calibration else []
    teacher_streams, student_streams = streams, list(streams)
    for name in source.names:
        teacher = source.block(name)
        if not work.holds(name):
            tensors, training = _quantize_block(name, teacher, teacher_streams, student_streams, settings)
            student = assemble(teacher, tensors)
            rows = measure(name, teacher, student, teacher_streams, student_streams)
            if training:
                rows[-1] = replace(rows[-1], **asdict(training))
            work.save(name, tensors, rows)
        tensors, rows = work.load(name)
        report(name, rows)
        if streams:
            student = assemble(teacher, tensors)
            for index, stream in enumerate(teacher_streams):  # in place: streams are the most that is held
                teacher_streams[index] = stream.through(teacher)
                student_streams[index] = student_streams[index].through(student)


def assemble(teacher: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The teacher's block with ternary weights and all else from `tensors`, as plain linears of the teacher's dtype."""
    student = copy.deepcopy(teacher)
    state = {}
    for key, full in teacher.state_dict().items():
        layer = key.removesuffix(".weight")
        if f"{layer}.packed" in tensors:
            packed_NJ, scale_N = tensors[f"{layer}.packed"].to(full.device), tensors[f"{layer}.scale"].to(full.device)
            state[key] = dequantize(packed_NJ, scale_N, full.shape[1], full.dtype)
            if f"{layer}.up" in tensors:
                correction = LowRank(tensors[f"{layer}.up"].to(full.device), tensors[f"{layer}.down"].to(full.device))
                state[key] = (state[key].float() + correction.product()).to(full.dtype)
        else:
            state[key] = tensors[key].to(full)
    student.load_state_dict(state)
    return student


def _quantize_block(
    name: str, teacher: nn.Module, teacher_streams: list[Stream], student_streams: list[Stream], settings: WalkSettings
) -> tuple[dict[str, Tensor], Reconstruction | None]:
    """The ternary block's tensors, as `assemble` takes them, on the CPU; and how its training went, if it had one."""
    student, teacher_dtype = copy.deepcopy(teacher), next(teacher.parameters()).dtype
    weights: dict[str, TernaryWeight] = {}
    for stage in STAGES[name.split(".")[0]][0 if settings.modulation else 1 :]:
        if settings.init == "compensated":
            streams = (teacher_streams, student_streams)
            ternaries = _compensated_stage(name, stage, teacher, student, *streams, settings.low_rank)
        else:
            ternaries = _rounded_stage(stage, teacher, settings.init, settings.low_rank)
        for layer, ternary, shift_N in ternaries:
            linear = student.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            weights[layer] = ternary
            linear.weight.copy_(ternary.dequantize())
            if shift_N is not None and linear.bias is not None:
                linear.bias.add_(shift_N.to(linear.bias.dtype))
    training = None
    if settings.reconstruction:
        weights, training = reconstruct(
            name, teacher, student, weights, teacher_streams, student_streams, settings.reconstruction
        )
    tensors = {
        key: tensor.cpu() for key, tensor in student.state_dict().items() if key.removesuffix(".weight") not in weights
    }
    for layer, ternary in weights.items():
        tensors[f"{layer}.packed"] = pack_planes(ternary.codes_NK).cpu()
        tensors[f"{layer}.scale"] = ternary.scale_N.float().cpu().contiguous()
        if ternary.correction is not None:
            for part, thin in zip(("up", "down"), ternary.correction, strict=True):
                # As a checkpoint has it: later blocks must see no more than it keeps.
                tensors[f"{layer}.{part}"] = thin.bfloat16().to(teacher_dtype).cpu().contiguous()
    return tensors, training


Quantized = Iterator[tuple[str, TernaryWeight, Tensor | None]]  # a layer, its weight, what its bias gains


def _rounded_stage(stage: tuple[tuple[str, ...], ...], teacher: nn.Module, init: Init, rank: int) -> Quantized:
    for layer in (layer for group in stage for layer in group):
        weight_NK = teacher.get_parameter(f"{layer}.weight")
        ternary = ROUNDING[init](weight_NK)
        if rank:
            ternary = replace(ternary, correction=best_low_rank(weight_NK.float() - ternary.dequantize(), rank))
        yield layer, ternary, None


def _compensated_stage(
    name: str,
    stage: tuple[tuple[str, ...], ...],
    teacher: nn.Module,
    student: nn.Module,
    teacher_streams: list[Stream],
    student_streams: list[Stream],
    rank: int,
) -> Quantized:
    """One group after the other, so that the moments of only one are held."""
    for group in stage:
        first = group[0]
        weight_NK = teacher.get_parameter(f"{first}.weight")
        moments = InputMoments(weight_NK.shape[1], weight_NK.device)
        with recorded_inputs(teacher, (first,)) as theirs, recorded_inputs(student, (first,)) as mine:
            for teacher_stream, student_stream in zip(teacher_streams, student_streams, strict=True):
                teacher_stream.through(teacher)
                student_stream.through(student)
                moments.add(mine[first], theirs[first])
        compensator = Compensator(moments, f"{name}.{first}")
        for layer in group:
            yield layer, *compensator.quantize(teacher.get_parameter(f"{layer}.weight"), rank)
