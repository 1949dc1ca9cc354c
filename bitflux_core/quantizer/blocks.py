"""A FLUX transformer read from its files one block at a time, so that no more than one block need lie on the device.

Legend: B batch, L image tokens, T text tokens, C packed latent channels, D width of the transformer.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitflux_core.checkpoint import empty_transformer, is_ternary
from bitflux_core.errors import UserError
from bitflux_core.files import SINGLE_FILE, read_json, weight_map
from bitflux_core.layers import BLOCKS

REMEDY = "copy the model again"
AXES = 3  # of a token's place
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stream:
    """What travels through the blocks: hidden_BLD of the image, encoder_BTD of the text, temb_BD, and the rotary pair.

    Blocks change the first two.
    """

    hidden_BLD: Tensor
    encoder_BTD: Tensor
    temb_BD: Tensor
    rotary: tuple[Tensor, Tensor]

    def through(self, block: nn.Module) -> "Stream":
        """The stream behind `block`."""
        encoder_BTD, hidden_BLD = block(self.hidden_BLD, self.encoder_BTD, self.temb_BD, self.rotary)
        return Stream(hidden_BLD, encoder_BTD, self.temb_BD, self.rotary)


class _Seam(nn.Module):
    """Stands where the blocks were: keeps what went in, and gives what was handed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: Stream | None = None
        self.leaving: Stream | None = None

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, **_):
        self.entered = Stream(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        leaving = self.leaving or self.entered
        return leaving.encoder_BTD, leaving.hidden_BLD


class BlockSource:
    """The transformer in `directory`: each block when asked for, and the rest, on `device`.

    UserError where the folder holds no FLUX transformer, or one that turns images into images; for a tensor that is
    missing, misshapen, not finite or of a type that is no full-precision weight's, when it is read.
    """

    def __init__(self, directory: Path | str, device: torch.device | str, dtype: torch.dtype):
        self.directory, self.device, self.dtype = Path(directory), torch.device(device), dtype
        self.config = read_json(self.directory / "config.json", "name the folder of a FLUX pipeline")
        if self.config.get("_class_name") != FluxTransformer2DModel.__name__ or is_ternary(self.config):
            raise UserError(
                f"{self.directory} holds {self.config.get('_class_name', 'no model')}"
                f"{' that is ternary already' if is_ternary(self.config) else ''}: "
                "name the folder of a full-precision FLUX pipeline"
            )
        try:
            self.empty = empty_transformer(self.config)
        except (TypeError, ValueError, RuntimeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"{self.directory}/config.json describes no FLUX transformer ({problem}): {REMEDY}"
            ) from error
        config = self.empty.config
        if config.out_channels not in (None, config.in_channels):
            raise UserError(
                f"{self.directory} makes {config.out_channels} channels of {config.in_channels}: "
                "a FLUX that is given an image (Fill, Control) cannot be quantized without images"
            )
        axes, head = config.axes_dims_rope, config.attention_head_dim
        # Rotations by time, row and column of a token share the channels of a head, in pairs.
        sizes = isinstance(axes, list | tuple) and all(isinstance(axis, int) and axis % 2 == 0 for axis in axes)
        if not sizes or len(axes) != AXES or min(axes) < 0 or sum(axes) != head:
            raise UserError(
                f"{self.directory}/config.json: axes_dims_rope {axes} must be {AXES} even numbers that add up to "
                f"attention_head_dim {head}: {REMEDY}"
            )
        self._files = _tensor_files(self.directory)
        self.names = [f"{kind}.{index}" for kind in BLOCKS for index in range(len(getattr(self.empty, kind)))]
        if not self.names:
            raise UserError(f"{self.directory}/config.json names no blocks (num_layers, num_single_layers): {REMEDY}")
        missing = sorted(self.empty.state_dict().keys() - self._files.keys())
        if missing:
            raise UserError(f"{self.directory} lacks tensor {missing[0]} and {len(missing) - 1} more: {REMEDY}")
        absent = sorted(file for file in set(self._files.values()) if not (self.directory / file).is_file())
        if absent:
            raise UserError(f"{self.directory} lacks file {absent[0]} and {len(absent) - 1} more: {REMEDY}")
        self._seam = _Seam()

    def block(self, name: str) -> nn.Module:
        """The block `name` (such as `transformer_blocks.0`) with its full weights, frozen, in eval mode."""
        block = copy.deepcopy(self.empty.get_submodule(name))
        block.load_state_dict({key: self._read(f"{name}.{key}") for key in block.state_dict()}, assign=True)
        return block.eval().requires_grad_(False)

    def enter(self, **inputs: Tensor) -> Stream:
        """The stream in front of the first block; `inputs` as FluxTransformer2DModel.forward takes them."""
        self._seam.leaving = None
        self.outside(**inputs, return_dict=False)
        assert self._seam.entered is not None
        return self._seam.entered

    def leave(self, stream: Stream, **inputs: Tensor) -> Tensor:
        """The velocity [B, L, C] that the stream behind the last block becomes; `inputs` as for `enter`."""
        self._seam.leaving = stream
        return self.outside(**inputs, return_dict=False)[0]

    @cached_property
    def outside(self) -> FluxTransformer2DModel:
        """The transformer with nothing in the place of its blocks."""
        outside = copy.deepcopy(self.empty)
        for kind in BLOCKS:
            setattr(outside, kind, nn.ModuleList())
        outside.load_state_dict({key: self._read(key) for key in outside.state_dict()}, assign=True)
        outside.transformer_blocks.append(self._seam)
        return outside.eval().requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        file = self.directory / self._files[name]
        try:
            with safe_open(file, framework="pt", device=str(self.device)) as tensors:
                tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}): {REMEDY}") from error
        expected = self.empty.get_parameter(name).shape
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{file}: {name} has type {tensor.dtype}, which is quantized already or no weight: "
                f"use a checkpoint in {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
            )
        if tensor.shape != expected:
            raise UserError(f"{file}: {name} has shape {list(tensor.shape)} in place of {list(expected)}: {REMEDY}")
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite: use an undamaged checkpoint")
        return tensor.to(self.dtype)


def _tensor_files(directory: Path) -> dict[str, str]:
    """File name of every tensor in the folder, by tensor name."""
    places = weight_map(directory, REMEDY)
    if places is not None:
        return places
    file = directory / SINGLE_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): {REMEDY}") from error


@contextmanager
def recorded_inputs(block: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward of `block` leaves the inputs of its layers `names` in the dict: [M, K]."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str):
        return lambda _module, args: inputs.__setitem__(name, args[0].flatten(0, -2))

    handles = [block.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
