"""Loads the transformer of a variant, and counts what it takes."""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError

from bitflux_core.accounting import size_report
from bitflux_core.checkpoint import empty_transformer, load_ternary, stored_size
from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.fused import fuse
from bitflux_core.variants import VARIANTS, transformer_folder


def load_transformer(
    variant: str, *, pipeline_dir: Path, ternary_dir: Path | None, device: torch.device | str, dtype: torch.dtype
) -> FluxTransformer2DModel:
    """The transformer of a variant, frozen, in eval mode; on CUDA fused and in CUDA graphs where it runs kernels.

    UserError where its files are missing or damaged.
    """
    how = VARIANTS[variant]
    folder = transformer_folder(variant, pipeline_dir=pipeline_dir, ternary_dir=ternary_dir)
    if not how.ternary:
        return _load_full_precision(folder, device, dtype)
    model = load_ternary(folder, dtype=dtype, device=device, activations=how.activations, execution=how.execution)
    return fuse(model, graphs=True) if how.execution == "kernel" and torch.device(device).type == "cuda" else model


def storage_bytes(variant: str, *, pipeline_dir: Path, ternary_dir: Path | None) -> int:
    """Bytes of the variant's transformer tensors as stored, from its configuration alone: no weights are needed."""
    folder = transformer_folder(variant, pipeline_dir=pipeline_dir, ternary_dir=ternary_dir)
    if VARIANTS[variant].ternary:
        return stored_size(folder).storage_bytes
    config = read_json(folder / "config.json", "name the folder of a FLUX pipeline")
    return size_report(empty_transformer(config)).bf16_bytes


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
