"""A workload: the prompts of one benchmark, how many images each gets, and which evaluator scores them.

Declared in manifests/workloads or in a user's own YAML; upstream's prompt files are never shipped, only addressed.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bitflux_core.errors import UserError
from cluster.manifests import MOST_IMAGES, find_manifest, read_manifest
from cluster.prompt_files import PromptFile, read_prompt_file
from cluster.prompt_parsers import PARSERS, ParsedPrompt


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: its place in the benchmark (from 0), its category, its text, and what its evaluator needs to know."""

    index: int
    tag: str
    text: str
    metadata: dict


@dataclass(frozen=True)
class Workload:
    """A benchmark ready to plan. `seed` goes into every sample; `digest` is the SHA-256 of the prompt files' bytes."""

    name: str
    evaluator: str
    prompts: tuple[PromptRecord, ...]
    images_per_prompt: int
    seed: int
    digest: str


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    evaluator: Annotated[str, Field(min_length=1)]
    parser: str
    files: Annotated[tuple[PromptFile, ...], Field(min_length=1)]
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_IMAGES)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # as wide as the results' column
    repeated_prompts: bool = False  # official lists may repeat a prompt: its index tells the two apart

    @field_validator("parser")
    @classmethod
    def _known(cls, parser: str) -> str:
        if parser not in PARSERS:
            raise ValueError(f"unknown parser '{parser}', choose one of {', '.join(PARSERS)}")
        return parser


def load_workload(name_or_path: str, data_dir: Path | None = None) -> Workload:
    """Reads an embedded workload by name or a user's own by path; `data_dir` holds upstream's files.

    Raises UserError for an unknown name, a fault in the manifest, a missing or altered file, and an empty or (unless
    the manifest allows it) repeated prompt.
    """
    path = find_manifest("benchmark", name_or_path)
    manifest = read_manifest(path, _Manifest, defaults={"name": path.stem})
    prompts: list[PromptRecord] = []
    digest = hashlib.sha256()
    seen: dict[str, str] = {}
    for file in manifest.files:
        source, content = read_prompt_file(file, path.parent, data_dir)
        digest.update(hashlib.sha256(content).digest())
        parsed = list(PARSERS[manifest.parser](content, str(source)))
        _check(parsed, str(source), seen, manifest.repeated_prompts)
        first = len(prompts)
        prompts += [
            PromptRecord(first + i, prompt.tag, prompt.text, prompt.metadata) for i, prompt in enumerate(parsed)
        ]
    return Workload(
        manifest.name,
        manifest.evaluator,
        tuple(prompts),
        manifest.images_per_prompt,
        manifest.seed,
        digest.hexdigest(),
    )


def _check(parsed: Iterable[ParsedPrompt], source: str, seen: dict[str, str], may_repeat: bool) -> None:
    """Refuses empty and repeated prompts. `seen` maps each prompt to where it stood first, over all files."""
    for prompt in parsed:
        place = f"{source} line {prompt.line}"
        if not prompt.text.strip():
            raise UserError(f"{place}: empty prompt; write one or remove the line")
        if not may_repeat and prompt.text in seen:
            raise UserError(
                f"{place}: the prompt '{prompt.text}' stands already in {seen[prompt.text]}; remove one of them"
            )
        seen.setdefault(prompt.text, place)
