"""Getting a workload's prompt files: beside the manifest, from --data-dir, or fetched once and cached; hash checked."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import pooch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitflux_core.errors import UserError

Role = Literal["prompts", "objects", "complex-spatial", "complex-action", "complex-spatialaction"]
PROMPTS: Role = "prompts"


class PromptFile(BaseModel):
    """One prompt file. With a `url` (pinned to a commit) it is upstream's and `sha256` is required; without one it lies
    beside the manifest. `path` is its place under --data-dir, or beside the manifest.

    `tag`: of all its prompts, where its lines do not name their own. `parser`: of this file, if not the workload's.
    `role`: a file that is no list of prompts tells the parser something about them (see prompt_parsers.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    tag: Annotated[str, Field(min_length=1)] | None = None
    role: Role = PROMPTS
    parser: str | None = None
    url: str | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _pinned(self) -> "PromptFile":
        if self.url is not None and self.sha256 is None:
            raise ValueError("a file with a url needs its sha256")
        return self


def read_prompt_file(file: PromptFile, folder: Path, data_dir: Path | None) -> tuple[Path, bytes]:
    """The file and its bytes, checked against its hash. UserError where it is missing, unreadable or another file."""
    if file.url is None:
        path = folder / file.path
    elif data_dir is not None:
        path = data_dir / file.path
    else:
        path = _fetch(file.url, file.path, str(file.sha256))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompt file {path}: cannot be read ({error.strerror}); {_remedy(file)}") from error
    actual = hashlib.sha256(content).hexdigest()
    if file.sha256 not in (None, actual):
        raise UserError(f"prompt file {path}: wrong sha256, expected {file.sha256} but found {actual}; {_remedy(file)}")
    return path, content


def _remedy(file: PromptFile) -> str:
    if file.url is None:
        return "restore it, or correct its path and sha256 in the manifest"
    return f"copy it again from {file.url}, or leave --data-dir out to have it fetched"


def _fetch(url: str, name: str, sha256: str) -> Path:
    """Downloads into the user's cache, once; pooch checks the hash and keeps nothing that fails it."""
    try:
        return Path(pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=name, path=pooch.os_cache("bitflux")))
    except ValueError as error:  # the wrong hash: pooch's text gives both
        raise UserError(
            f"prompt file {url}: {' '.join(str(error).split())}; try again, or give --data-dir DIR with DIR/{name}"
        ) from error
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(
            f"prompt file {url}: cannot be downloaded ({type(error).__name__}); give --data-dir DIR with DIR/{name}"
        ) from error
