"""Rows of measurements: failures become rows, and tables become files that say on what they were measured."""

import gc
import json
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bitflux_core.environment import git_revision, gpu_driver, package_version
from bitflux_core.errors import UserError

DOES_NOT_FIT = "does not fit"
GB = 1e9

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Machine:
    """On what and with what a table was measured; None where it cannot be told."""

    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    diffusers: str | None
    transformers: str | None
    git_revision: str | None
    date: str  # UTC, ISO 8601


@dataclass(frozen=True)
class Result:
    """A measured section. `settings` holds what all its rows share; rows are dataclasses of one type."""

    section: str
    rows: list[Any]
    machine: Machine
    settings: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict:
        """In plain values: section, machine, settings, rows."""
        return asdict(self)

    @property
    def failed(self) -> list[Any]:
        """Rows that went wrong; one that only did not fit in memory is a finding."""
        return [row for row in self.rows if row.error and not row.error.startswith(DOES_NOT_FIT)]


def attempt(row: Row, measure: Callable[[], dict[str, Any]]) -> Row:
    """`row` with the columns that `measure` returns, or with its error. Memory is given back either way."""
    try:
        return replace(row, **measure())  # type: ignore[type-var]
    except torch.OutOfMemoryError as error:
        return replace(row, error=f"{DOES_NOT_FIT}: {_line(error)}")  # type: ignore[type-var]
    except Exception as error:  # whatever a library raises: the other rows still count
        return replace(row, error=f"{type(error).__name__}: {_line(error)}")  # type: ignore[type-var]
    finally:
        release()


def release() -> None:
    """Gives back the memory that no one refers to any more, and forgets peaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def this_machine(device: torch.device, repository: Path) -> Machine:
    """`repository` is the source code's folder, whose git revision counts."""
    on_cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_cuda else "CPU",
        driver=gpu_driver() if on_cuda else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=package_version("triton"),
        diffusers=package_version("diffusers"),
        transformers=package_version("transformers"),
        git_revision=git_revision(repository),
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )


def check_folder(folder: Path) -> None:
    """Makes it, before anything is measured. UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder as --output") from error


def write(result: Result, folder: Path) -> list[Path]:
    """`SECTION-DATE.json` is the document; the Parquet file beside it holds the rows, the machine's columns in each."""
    stem = f"{result.section}-{result.machine.date.replace('-', '').replace(':', '')}"
    document, table = folder / f"{stem}.json", folder / f"{stem}.parquet"
    document.write_text(json.dumps(result.document(), indent=2) + "\n")
    kind = type(result.rows[0])
    machine = {"section": result.section, **asdict(result.machine)}
    machine_schema = [("section", pa.string()), *_columns(Machine)]
    schema = pa.schema([*machine_schema, *_columns(kind)])
    pq.write_table(pa.Table.from_pylist([{**machine, **asdict(row)} for row in result.rows], schema=schema), table)
    return [document, table]


def _columns(kind: type) -> list[tuple[str, pa.DataType]]:
    """Name and Arrow type of each field of a dataclass of strings, numbers and their optionals."""
    hints = typing.get_type_hints(kind)
    return [(f.name, _ARROW[_bare(hints[f.name])]) for f in fields(kind)]


def _bare(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
