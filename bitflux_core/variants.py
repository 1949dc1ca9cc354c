"""The ways in which one FLUX is run and compared; they differ in what this table says and nowhere else."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError

from bitflux_core.accounting import size_report
from bitflux_core.checkpoint import empty_transformer, load_ternary
from bitflux_core.errors import UserError
from bitflux_core.files import fingerprint, read_json
from bitflux_core.linear import Execution
from kernels.reference import Activations

# Everything of a FluxPipeline that shapes an image beside the transformer.
PIPELINE_PARTS = ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Variant:
    """Full precision, or ternary weights with the given arithmetic (see TernaryLinear)."""

    ternary: bool
    activations: Activations = "native"
    execution: Execution = "kernel"


VARIANTS = {
    "bf16": Variant(ternary=False),
    "ternary": Variant(ternary=True),
    "ternary-int8": Variant(ternary=True, activations="int8"),
    "ternary-reference": Variant(ternary=True, execution="reference"),
}


def load_transformer(
    variant: str, *, pipeline_dir: Path, ternary_dir: Path, device: torch.device | str, dtype: torch.dtype
) -> FluxTransformer2DModel:
    """The transformer of a variant, frozen, in eval mode. UserError where its files are missing or damaged."""
    how = VARIANTS[variant]
    if how.ternary:
        return load_ternary(
            ternary_dir, dtype=dtype, device=device, activations=how.activations, execution=how.execution
        )
    return _load_full_precision(Path(pipeline_dir) / "transformer", device, dtype)


def model_fingerprint(variant: str, *, pipeline_dir: Path, ternary_dir: Path) -> str:
    """Identity of all that shapes a variant's images: its transformer and the rest of the pipeline."""
    transformer = Path(ternary_dir) if VARIANTS[variant].ternary else Path(pipeline_dir) / "transformer"
    return fingerprint(transformer, *(Path(pipeline_dir) / part for part in PIPELINE_PARTS))


def storage_bytes(variant: str, *, pipeline_dir: Path) -> int:
    """Bytes of the variant's transformer tensors as stored, from its configuration alone: no weights are needed."""
    config = read_json(Path(pipeline_dir) / "transformer" / "config.json", "name the folder of a FLUX pipeline")
    report = size_report(empty_transformer(config))
    return report.storage_bytes if VARIANTS[variant].ternary else report.bf16_bytes


def _load_full_precision(directory: Path, device: torch.device | str, dtype: torch.dtype) -> FluxTransformer2DModel:
    if not directory.is_dir():
        raise UserError(f"{directory} is missing: name the folder of a FLUX pipeline")
    try:
        model, report = FluxTransformer2DModel.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{directory} cannot be loaded ({problem}): copy the model again") from error
    # diffusers only warns of these and fills the gaps with random weights.
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            raise UserError(f"{directory} has {kind.replace('_', ' ')} such as {report[kind][0]}: copy the model again")
    return model.to(device).eval().requires_grad_(False)
