"""How much device memory a quantization takes, from shapes alone, before anything is loaded."""

import torch
from diffusers import FluxTransformer2DModel

from bitflux_core.errors import UserError
from bitflux_core.layers import BLOCKS, block_linears

FLOAT = 4
MOMENT_MATRICES = 10  # K x K float32 at the peak: both moments, two covariances, and three factors in float64
LAYER_MATRICES = 20  # N x K float32: target, codes, errors and slopes of one layer, of all tries at it together
CORRECTION_MATRICES = 2  # more of them with corrections: what one leaves of the target, and the best codes so far
BLOCKS_HELD = 3  # teacher, student, and the student as it was saved
TRAINING_BYTES = 24  # a parameter: latent, gradient, two Adam moments, and the rounded copies of forward and backward
LAYER_OUTPUTS = 40  # widths of activations that a block in training keeps a token


def required_bytes(
    empty: FluxTransformer2DModel,
    *,
    states: int,
    batch: int,
    tokens: int,
    compensated: bool,
    corrected: bool,
    trained: bool,
    dtype: torch.dtype,
) -> int:
    """An estimate of the peak; `tokens` are a state's, image and text. `empty` may lie on the meta device."""
    size = dtype.itemsize
    blocks = [block for kind in BLOCKS for block in getattr(empty, kind)]
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    inside = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    outside = sum(parameter.numel() for parameter in empty.parameters()) - inside
    layers = list(block_linears(empty).values())
    width = empty.inner_dim
    matrices = LAYER_MATRICES + (CORRECTION_MATRICES if corrected else 0)
    working = matrices * FLOAT * max(layer.in_features * layer.out_features for layer in layers)
    if compensated:
        working += MOMENT_MATRICES * FLOAT * max(layer.in_features for layer in layers) ** 2
    if trained:
        working = max(working, TRAINING_BYTES * largest + LAYER_OUTPUTS * size * batch * tokens * width)
    activations = LAYER_OUTPUTS * size * batch * tokens * width
    streams = 2 * states * tokens * width * size
    return (outside + BLOCKS_HELD * largest) * size + working + activations + streams


def check_memory(required: int, device: torch.device) -> None:
    """UserError where a CUDA device has less free memory than is required; other devices are not asked."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if required > free:
        raise UserError(
            f"quantizing takes about {required / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free: "
            "take fewer calibration prompts or states, or a larger GPU"
        )
