"""How many bytes a model takes, counted exactly from its shapes: a model on the meta device will do."""

from dataclasses import dataclass

from diffusers import FluxTransformer2DModel
from torch import nn

from bitflux_core.layers import block_linears
from kernels.packing import Codes, codes_bytes

BF16_BYTES = 2
SCALE_BYTES = 4  # float32, one an output row


@dataclass(frozen=True)
class SizeReport:
    """Sizes of a FLUX transformer in bf16 and as a ternary checkpoint.

    Attributes:
        total_params: all parameters, the ternary weights and their corrections included.
        ternary_params: weights of the block linears; neither their biases nor their corrections are ternary.
        ternary_share: ternary_params / total_params.
        bf16_bytes: the full-precision transformer, which has no corrections, in bf16.
        code_bytes: the codes, padding of ragged rows included.
        scale_bytes: the float32 scales.
        correction_bytes: low-rank corrections in bf16.
        rest_bytes: everything else in bf16.
        storage_bytes: codes + scales + corrections + rest: the bytes of a ternary checkpoint's tensors.
        ratio: bf16_bytes / storage_bytes.
    """

    total_params: int
    ternary_params: int
    ternary_share: float
    bf16_bytes: int
    code_bytes: int
    scale_bytes: int
    correction_bytes: int
    rest_bytes: int
    storage_bytes: int
    ratio: float


def size_report(transformer: FluxTransformer2DModel, codes: Codes = "trits") -> SizeReport:
    """Counts a full-precision or an already ternary transformer; both give the same report, but for corrections.

    `codes` as in a checkpoint: "trits" are the smallest, "planes" what a loaded model holds in memory.
    """
    layers = block_linears(transformer)
    ternary_params = sum(layer.in_features * layer.out_features for layer in layers.values())
    code_bytes = sum(codes_bytes(codes, layer.out_features, layer.in_features) for layer in layers.values())
    scale_bytes = SCALE_BYTES * sum(layer.out_features for layer in layers.values())
    weights = {f"{name}.{part}" for name in layers for part in ("weight", "packed", "scale")}
    corrections = {f"{name}.{part}" for name in layers for part in ("down", "up")}
    sizes = {name: tensor.numel() for name, tensor in transformer.state_dict().items() if name not in weights}
    correction_params = sum(size for name, size in sizes.items() if name in corrections)
    rest_params = sum(sizes.values()) - correction_params
    total_params = ternary_params + correction_params + rest_params

    bf16_bytes = BF16_BYTES * (ternary_params + rest_params)
    storage_bytes = code_bytes + scale_bytes + BF16_BYTES * (correction_params + rest_params)
    return SizeReport(
        total_params=total_params,
        ternary_params=ternary_params,
        ternary_share=ternary_params / total_params,
        bf16_bytes=bf16_bytes,
        code_bytes=code_bytes,
        scale_bytes=scale_bytes,
        correction_bytes=BF16_BYTES * correction_params,
        rest_bytes=BF16_BYTES * rest_params,
        storage_bytes=storage_bytes,
        ratio=bf16_bytes / storage_bytes,
    )


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they lie in memory now."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
