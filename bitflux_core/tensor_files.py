"""Reading the tensors of a ternary checkpoint, each one checked before it is used."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitflux_core.errors import UserError
from bitflux_core.files import file_digest
from kernels.packing import check_packed

REMEDY = "copy or make the checkpoint again"
# safetensors' names of the types.
_EXACT_TYPES = {torch.uint8: "U8", torch.float32: "F32"}
_FLOAT_TYPES = ("F32", "F16", "BF16")


def read_tensors(
    file: Path, digest: str, expected: Mapping[str, Tensor], exact: Set[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one safetensors file whose SHA-256 must be `digest`.

    `expected` holds the model's tensors on the meta device; those named in `exact` (packed codes and scales) must have
    the very type, all others any floating type. UserError naming the file, the tensor and the remedy.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: {REMEDY}")
    if file_digest(file) != digest:
        raise UserError(f"{file} is not the file that was saved (truncated or damaged): {REMEDY}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                stored = tensors.get_slice(name)
                problem = _misfit(name, stored.get_shape(), stored.get_dtype(), expected, exact)
                if problem:
                    raise UserError(f"{file}: tensor {name} {problem}: {REMEDY}")
                tensor = tensors.get_tensor(name)
                _check_values(file, name, tensor, is_scale=name in exact)
                yield name, tensor
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}): {REMEDY}") from error


def _misfit(name: str, shape: list[int], dtype: str, expected: Mapping[str, Tensor], exact: Set[str]) -> str | None:
    if name not in expected:
        return "does not belong to the model in config.json"
    if shape != list(expected[name].shape):
        return f"has shape {shape} where config.json asks for {list(expected[name].shape)}"
    types = (_EXACT_TYPES[expected[name].dtype],) if name in exact else _FLOAT_TYPES
    if dtype not in types:
        return f"has type {dtype} in place of {' or '.join(types)}"
    return None


def _check_values(file: Path, name: str, tensor: Tensor, is_scale: bool) -> None:
    if tensor.dtype == torch.uint8:
        try:
            check_packed(tensor, name)
        except ValueError as error:
            raise UserError(f"{file}: {error}: {REMEDY}") from error
    elif not tensor.isfinite().all():
        raise UserError(f"{file}: tensor {name} holds a value that is not finite: {REMEDY}")
    elif is_scale and (tensor < 0).any():
        raise UserError(f"{file}: tensor {name} holds a negative scale: {REMEDY}")
