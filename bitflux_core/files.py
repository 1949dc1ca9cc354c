"""Reading and identifying model folders."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitflux_core.errors import UserError

# Configurations, tokenizers and weights: all that decides what a model computes. mmdet's are .pth and .py files.
MODEL_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".pth", ".py")
# diffusers' names.
SINGLE_FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE_FILE}.index.json"


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in `path`; UserError with `remedy` where there is none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {remedy}")
    return value


def weight_map(directory: Path, remedy: str) -> dict[str, str] | None:
    """File name of every tensor by tensor name, as diffusers' index of shards has it; None where there is no index.

    UserError with `remedy` for an index that does not say so.
    """
    index = directory / INDEX
    if not index.is_file():
        return None
    places = read_json(index, remedy).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index} holds no weight_map: {remedy}")
    for name, place in places.items():
        if not isinstance(place, str):
            raise UserError(f"{index} names no file for {name}, but {place!r}: {remedy}")
    return places


def write_json(path: Path, value: object) -> None:
    """Writes `value` to `path`, in place of what is there; whoever reads meanwhile sees the one or the other whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*folders: Path | str) -> str:
    """First 16 hex digits of a SHA-256 over the model files in `folders`: their relative names and their bytes.

    The folders' own names and places do not count, their order does. UserError for a folder without model files.
    """
    parts = [_model_files(Path(folder)) for folder in folders]
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        digests = [dict(zip(files, pool.map(file_digest, files.values()), strict=True)) for files in parts]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _model_files(folder: Path) -> dict[str, Path]:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix in MODEL_SUFFIXES and path.is_file()
    }
    if not files:
        raise UserError(f"{folder} holds no model files: name the folder of a saved model")
    return files
