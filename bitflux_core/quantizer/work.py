"""The folder of a quantization under way: one file a finished block, and the recipe that all of them follow."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitflux_core.errors import UserError
from bitflux_core.files import read_json, write_json
from bitflux_core.quantizer.calibration import States, Walk
from bitflux_core.quantizer.snr import Snr

RECIPE = "recipe.json"
STATES = "states"
WALK = "walk"  # to the states
REMEDY = "remove it, the next run makes it again"
MOST_NAMED = 3  # settings that differ, in one line


class WorkFolder:
    """Opens or makes `directory` for `recipe` (JSON-able). UserError where it holds the work of another recipe.

    Files appear whole, under their final name: a killed process loses the block or the step in hand.
    """

    def __init__(self, directory: Path, recipe: Mapping[str, object]):
        self.directory = directory
        recipe = json.loads(json.dumps(recipe))
        file = directory / RECIPE
        if file.is_file():
            found = read_json(file, f"remove {directory} and begin again")
            differing = list(itertools.islice(_differing(found, recipe), MOST_NAMED))
            if differing:
                raise UserError(
                    f"{directory} holds work of another recipe ({'; '.join(differing)}): "
                    "give the same settings, or remove the folder"
                )
            return
        begun = file.with_suffix(".tmp")  # of a process that was killed while it wrote the recipe
        if directory.exists() and (not directory.is_dir() or any(path != begun for path in directory.iterdir())):
            raise UserError(f"{directory} is in use and holds no {RECIPE}: name another output")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(file, recipe)
        except OSError as error:
            raise UserError(f"{directory} cannot be made ({error.strerror}): name another output") from error

    def holds(self, name: str) -> bool:
        return self._file(name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], rows: list[Snr]) -> None:
        """Keeps a block's tensors with its ratios."""
        self._write(name, tensors, {"snr": json.dumps([asdict(row) for row in rows])})

    def load(self, name: str) -> tuple[dict[str, Tensor], list[Snr]]:
        """What `save` kept. UserError for a file that is damaged."""
        tensors, metadata = self._read(name)
        with self._as_kept(name):
            return tensors, [Snr(**row) for row in json.loads(metadata["snr"])]

    def save_states(self, states: States) -> None:
        self._write(STATES, vars(states), {})
        self._file(WALK).unlink(missing_ok=True)

    def load_states(self) -> States | None:
        """The calibration states, if they were made."""
        if not self.holds(STATES):
            return None
        with self._as_kept(STATES):
            return States(**self._read(STATES)[0])

    def save_walk(self, walk: Walk) -> None:
        self._write(WALK, vars(walk), {})

    def load_walk(self) -> Walk | None:
        """The walk to the calibration states, if one was begun."""
        if not self.holds(WALK):
            return None
        with self._as_kept(WALK):
            return Walk(**self._read(WALK)[0])

    def remove(self) -> None:
        """Deletes the folder: for when its blocks stand in a checkpoint.

        The recipe goes last: killed in the middle, it still says whose the rest is.
        """
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != RECIPE:
                path.unlink()
        shutil.rmtree(self.directory)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        temporary = self._file(name).with_suffix(".tmp")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, self._file(name))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            return load_file(file), metadata
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}): {REMEDY}") from error

    @contextmanager
    def _as_kept(self, name: str) -> Iterator[None]:
        """UserError where the file's contents turn out to be others than were kept in it."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._file(name)} holds something else ({error}): {REMEDY}") from error


def _differing(found: Mapping, wanted: Mapping, prefix: str = "") -> Iterator[str]:
    """What differs, as `key: found, not wanted`, settings within settings each by itself."""
    for key in sorted({*found, *wanted}):
        theirs, mine = found.get(key), wanted.get(key)
        if isinstance(theirs, dict) and isinstance(mine, dict):
            yield from _differing(theirs, mine, f"{prefix}{key}.")
        elif theirs != mine:
            yield f"{prefix}{key}: {theirs}, not {mine}"
