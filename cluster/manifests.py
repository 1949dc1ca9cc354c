"""Reading declarations: a YAML file, embedded or the user's own, becomes one validated pydantic model."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bitflux_core.errors import UserError

REPOSITORY = Path(__file__).parent.parent
MANIFESTS = REPOSITORY / "manifests"
FOLDERS = {"profile": MANIFESTS / "profiles", "benchmark": MANIFESTS / "workloads", "gates": MANIFESTS / "gates"}
SUFFIXES = (".yaml", ".yml")
MOST_IMAGES = 10_000  # a prompt; more is a slip of the keyboard, and its plan would not fit in memory

Model = TypeVar("Model", bound=BaseModel)


def find_manifest(kind: str, name_or_path: str) -> Path:
    """The file of an embedded profile or benchmark (`kind`) by name, or the user's own by path."""
    if name_or_path.endswith(SUFFIXES):
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"{kind} {name_or_path}: no such file")
        return path
    known = _embedded(kind)
    if name_or_path not in known:
        raise UserError(
            f"unknown {kind} '{name_or_path}': choose one of {', '.join(known)}, or give the path of a .yaml file"
        )
    return FOLDERS[kind] / f"{name_or_path}.yaml"


def is_manifest(kind: str, name_or_path: str) -> bool:
    """Whether it is the name of an embedded manifest or could be the path of one."""
    return name_or_path.endswith(SUFFIXES) or name_or_path in _embedded(kind)


def _embedded(kind: str) -> list[str]:
    return sorted(path.stem for path in FOLDERS[kind].glob("*.yaml"))


def read_manifest(path: Path, model: type[Model], defaults: dict[str, object] | None = None) -> Model:
    """Parses `path` into `model`; `defaults` fill keys that the file may leave out. Any fault is a UserError."""
    content = read_mapping(path, ", ".join(model.model_fields))
    try:
        return model.model_validate({**(defaults or {}), **content})
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from error


def read_mapping(path: Path, keys: str) -> dict:
    """A YAML file's mapping, not yet validated. UserError, which says what `keys` it may have, where it holds none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a YAML mapping with the keys {keys}")
    return content


def describe(error: ValidationError) -> str:
    """All of pydantic's complaints on one line: `sampling.steps: Input should be greater than 0; ...`."""
    complaints = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        complaints.append(f"{place}: {message}" if place else message)
    return "; ".join(complaints)
