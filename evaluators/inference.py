"""What every scoring model shares: its folder, batches of one fixed size, and arithmetic that repeats."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from bitflux_core.errors import UserError

# Everything that a model is made of; a folder's README or git files leave its fingerprint alone.
MODEL_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin", ".pth", ".py"}

# What transformers builds but no output depends on, so published checkpoints lack it: a Swin backbone's last
# normalisation (Mask2Former, Grounding DINO), and the residual unit of DPT's first fusion layer, which has no residual.
UNUSED_TENSORS = re.compile(r"\bswin\.layernorm\.|\bneck\.fusion_stage\.layers\.0\.residual_layer1\.")


def model_folder(directory: str | Path, role: str, files: tuple[str, ...]) -> Path:
    """`directory` as a path, once it is known to hold `files`. UserError names the folder and what it lacks."""
    folder = Path(directory)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{role} folder {folder} has no {' or '.join(missing)}: name a folder that holds a complete {role} model"
        )
    return folder


def configured_labels(folder: str | Path) -> tuple[str, ...]:
    """The classes of a detector folder, from its configuration alone. UserError where that cannot be read."""
    file = Path(folder) / "config.json"
    try:
        names = json.loads(file.read_text())["id2label"]
        return tuple(names[str(index)] for index in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} names no classes of a detector ({error!r}): copy the model again") from error


def unloadable(folder: Path, role: str, fault: object) -> UserError:
    """The error for a folder whose files are there but are not a usable model; `fault` is cut to its first line."""
    detail = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return UserError(f"{role} folder {folder} cannot be loaded ({detail}): fetch or train the {role} again")


def fingerprint(*parts: object) -> str:
    """First 16 hex digits of the SHA-256 of settings (anything that JSON can write) and of folders' model files."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
            continue
        for path in sorted(part.iterdir()):
            if path.suffix in MODEL_SUFFIXES:
                digest.update(path.name.encode() + b"\n")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_pretrained(loader: Any, folder: Path, role: str, device: str | torch.device) -> Any:
    """`loader.from_pretrained` (a class of transformers) of a local folder: float32, on `device`, for inference.

    Raises UserError for a folder that cannot be loaded or lacks tensors that an output depends on: transformers fills
    what a checkpoint lacks with random numbers and only warns.
    """
    try:
        with _quiet():
            model, report = loader.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as fault:
        raise unloadable(folder, role, fault) from fault
    missing = [key for key in report["missing_keys"] if not UNUSED_TENSORS.search(key)]
    if lacking := sorted(str(key) for key in (*missing, *report["mismatched_keys"])):
        raise unloadable(folder, role, f"{len(lacking)} tensors lacking or misshapen, {lacking[0]} the first")
    return model.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from transformers, and no warnings of what is checked here anyway."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def exact_inference() -> Iterator[None]:
    """No gradients, no TF32, deterministic convolutions: confidences have silently differed between GPU types."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def pad_batch(rows_BX: Tensor, size: int) -> Tensor:
    """Zero rows added up to `size`: a result's last bits depend on the batch's shape, so every batch has the same."""
    return torch.cat([rows_BX, rows_BX.new_zeros(size - len(rows_BX), *rows_BX.shape[1:])])
