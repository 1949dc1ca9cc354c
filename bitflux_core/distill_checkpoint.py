"""Checkpoints of a training under way: one folder a checkpoint, the last one whole, whatever is killed when."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitflux_core.errors import UserError
from bitflux_core.files import read_json, write_json

STATE = "state.json"


def save_checkpoint(folder: Path, step: int, parts: Iterable[tuple[str, Mapping[str, Tensor]]], state: dict) -> None:
    """Writes `parts` (name and tensors on the CPU), a safetensors file each, and `state`, then drops older checkpoints.

    `parts` may be a generator, so that one part at a time need be in memory. `state` is written last: without it a
    folder is no checkpoint.
    """
    made = folder / f"step-{step:08}"
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed while it wrote
    made.mkdir(parents=True)
    for name, tensors in parts:
        save_tensors(made / f"{name}.safetensors", tensors)
    write_json(made / STATE, state)
    for older in folder.glob("step-*"):
        if older != made:
            shutil.rmtree(older)


class Checkpoint:
    """A checkpoint to go on from: `state`, and its parts as they are asked for. UserError where it is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = read_json(folder / STATE, self._remedy)

    def part(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.folder / f"{name}.safetensors", self._remedy)

    @property
    def _remedy(self) -> str:
        return f"remove {self.folder.parent} and train from the start"


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The whole checkpoint of most steps in `folder`, if there is one."""
    whole = sorted(path.parent for path in folder.glob(f"step-*/{STATE}"))
    return Checkpoint(whole[-1]) if whole else None


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, in place of what is there: whoever reads meanwhile sees the one or the other whole."""
    temporary = file.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, file)


def load_tensors(file: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; UserError with `remedy` where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): {remedy}") from error
