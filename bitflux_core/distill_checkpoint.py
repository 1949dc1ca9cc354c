"""Checkpoints of a training under way: one folder a checkpoint, the last one whole, whatever is killed when."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitflux_core.distill_recipe import Record
from bitflux_core.errors import UserError
from bitflux_core.files import read_json, write_json

STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Attributes:
        step: steps made.
        waited: evaluations of the phase since its best one.
        best: held-out error of that one.
        begun: the phase whose first weights were looked at.
        seconds: of training so far.
        records: the log.
    """

    step: int
    waited: int
    best: float
    begun: str | None
    seconds: float
    records: list[Record]


def save_checkpoint(folder: Path, parts: Iterable[tuple[str, Mapping[str, Tensor]]], progress: Progress) -> None:
    """Writes `parts` (name and tensors on the CPU), a safetensors file each, and `progress`, then drops older
    checkpoints.

    `parts` may be a generator, so that one part at a time need be in memory. `progress` is written last: without it a
    folder is no checkpoint.
    """
    made = folder / _name(progress.step)
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed while it wrote
    made.mkdir(parents=True)
    for name, tensors in parts:
        save_tensors(made / f"{name}.safetensors", tensors)
    write_json(made / STATE, asdict(progress))
    for older in folder.glob("step-*"):
        if older != made:
            shutil.rmtree(older)


class Checkpoint:
    """A checkpoint to go on from: `progress`, and its parts as they are asked for. UserError where it is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        state = read_json(folder / STATE, self._remedy)
        try:
            self.progress = Progress(**state | {"records": [Record(**record) for record in state["records"]]})
            if _name(self.progress.step) != folder.name:
                raise ValueError(f"step {self.progress.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / STATE} is damaged ({error}): {self._remedy}") from error

    def part(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.folder / f"{name}.safetensors", self._remedy)

    @property
    def _remedy(self) -> str:
        return f"remove {self.folder.parent} and train from the start"


def _name(step: int) -> str:
    return f"step-{step:08}"


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
