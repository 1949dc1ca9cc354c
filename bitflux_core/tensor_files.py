"""Reading the tensors of a ternary checkpoint, each one checked before it is used."""

from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitflux_core.errors import UserError
from bitflux_core.files import file_digest
from kernels.packing import check_packed, check_trits, trits_length, unpack_trits

REMEDY = "copy or make the checkpoint again"
# safetensors' names of the types.
_EXACT_TYPES = {torch.uint8: "U8", torch.float32: "F32"}
_FLOAT_TYPES = ("F32", "F16", "BF16")


def check_file(file: Path, digest: str | None) -> None:
    """UserError where the file is missing or its SHA-256 is not `digest`; None stands for any."""
    if not file.is_file():
        raise UserError(f"{file} is missing: {REMEDY}")
    if digest is not None and file_digest(file) != digest:
        raise UserError(f"{file} is not the file that was saved (truncated or damaged): {REMEDY}")


def check_files(directory: Path, digests: Mapping[str, str | None]) -> None:
    """`check_file` for each name."""
    for _ in checked_files(directory, digests):
        pass


def checked_files(directory: Path, digests: Mapping[str, str | None]) -> Iterator[Path]:
    """The files of `digests`, in their order, each as soon as `check_file` has passed it.

    Later ones are read and hashed meanwhile: one core hashes more slowly than disks read and GPUs are filled.
    """
    pool = ThreadPoolExecutor()  # hashlib releases the interpreter lock
    try:
        files = [directory / name for name in digests]
        checks = [pool.submit(check_file, directory / name, digest) for name, digest in digests.items()]
        for file, check in zip(files, checks, strict=True):
            check.result()
            yield file
    finally:
        pool.shutdown(cancel_futures=True)


def read_tensors(
    file: Path, expected: Mapping[str, Tensor], columns: Mapping[str, int], exact: Set[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one safetensors file; codes come as planes however they are stored.

    `expected` holds the model's tensors on the meta device; those named in `exact` (packed codes and scales) must have
    the very type, all others any floating type. `columns` are the input features of each tensor of codes. UserError
    naming the file, the tensor and the remedy.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                stored = tensors.get_slice(name)
                shape = stored.get_shape()
                problem = _misfit(name, shape, stored.get_dtype(), expected, columns, exact)
                if problem:
                    raise UserError(f"{file}: tensor {name} {problem}: {REMEDY}")
                tensor = tensors.get_tensor(name)
                if name in columns:
                    yield name, _checked(file, planes_of, tensor, name, len(expected[name]), columns[name])
                else:
                    _checked(file, check_floats, name, tensor, name in exact)
                    yield name, tensor.clone()  # a view of the file would keep all of its pages in memory
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}): {REMEDY}") from error


def planes_of(stored: Tensor, name: str, rows: int, in_features: int) -> Tensor:
    """Codes as a file has them, planes [N, J] or trits [L], as planes. ValueError for a value that is no code."""
    if stored.ndim == 1:
        check_trits(stored, name)
        return unpack_trits(stored, rows, in_features)
    check_packed(stored, name)
    return stored


def check_floats(name: str, tensor: Tensor, is_scale: bool) -> None:
    """ValueError for a value that is not finite, and for a negative scale."""
    low, high = tensor.aminmax()  # without the temporaries of isfinite; a NaN is both
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{name} holds a value that is not finite")
    if is_scale and low < 0:
        raise ValueError(f"{name} holds a negative scale")


def _checked(file: Path, check: Callable[..., Any], *arguments: Any) -> Any:
    """What `check` gives, or its ValueError as a UserError of this file."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise UserError(f"{file}: tensor {error}: {REMEDY}") from error


def _misfit(
    name: str,
    shape: list[int],
    dtype: str,
    expected: Mapping[str, Tensor],
    columns: Mapping[str, int],
    exact: Set[str],
) -> str | None:
    if name not in expected:
        return "does not belong to the model in config.json"
    wanted = list(expected[name].shape)
    if name in columns and len(shape) == 1:
        wanted = [trits_length(wanted[0], columns[name])]
    if shape != wanted:
        return f"has shape {shape} where config.json asks for {wanted}"
    types = (_EXACT_TYPES[expected[name].dtype],) if name in exact else _FLOAT_TYPES
    if dtype not in types:
        return f"has type {dtype} in place of {' or '.join(types)}"
    return None
