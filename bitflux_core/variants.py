"""The ways in which one FLUX is run and compared; they differ in what this table says and nowhere else.

Imports no torch: a job reads the table and the fingerprints before anything is loaded (see loading.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from bitflux_core.files import fingerprint

if TYPE_CHECKING:
    from bitflux_core.linear import Execution
    from kernels.reference import Activations

# Everything of a FluxPipeline that shapes an image beside the transformer.
PIPELINE_PARTS = ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Variant:
    """Full precision, or ternary weights with the given arithmetic (see TernaryLinear)."""

    ternary: bool
    activations: "Activations" = "native"
    execution: "Execution" = "kernel"


VARIANTS = {
    "bf16": Variant(ternary=False),
    "ternary": Variant(ternary=True),
    "ternary-int8": Variant(ternary=True, activations="int8"),
    "ternary-reference": Variant(ternary=True, execution="reference"),
}


def transformer_folder(variant: str, *, pipeline_dir: Path, ternary_dir: Path | None) -> Path:
    """Where the variant's transformer lies. UserError for a ternary variant without a ternary checkpoint."""
    if not VARIANTS[variant].ternary:
        return Path(pipeline_dir) / "transformer"
    if ternary_dir is None:
        raise UserError(f"variant {variant} needs a ternary checkpoint: name its folder or leave the variant out")
    return Path(ternary_dir)


def model_fingerprint(variant: str, *, pipeline_dir: Path, ternary_dir: Path | None) -> str:
    """Identity of all that shapes a variant's images: its transformer and the rest of the pipeline."""
    transformer = transformer_folder(variant, pipeline_dir=pipeline_dir, ternary_dir=ternary_dir)
    return fingerprint(transformer, *(Path(pipeline_dir) / part for part in PIPELINE_PARTS))
