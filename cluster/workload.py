"""A workload: the prompts of one benchmark, how many images each gets, and which evaluator scores them.

Declared in manifests/workloads or in a user's own YAML; upstream's prompt files are never shipped, only addressed.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from bitflux_core.errors import UserError
from bitflux_core.samples import SeedRule
from cluster.manifests import MOST_IMAGES, SUFFIXES, find_manifest, read_manifest, read_mapping
from cluster.prompt_files import PROMPTS, PromptFile, read_prompt_file
from cluster.prompt_parsers import PARSERS, ParsedPrompt, Source, checked_tag


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: its place in the benchmark (from 0), its category, its text, and what its evaluator needs to know."""

    index: int
    tag: str
    text: str
    metadata: dict


@dataclass(frozen=True)
class Workload:
    """A benchmark ready to plan. `seed` goes into every sample, by `seed_rule`; `digest` is the SHA-256 of the prompt
    files' bytes; `protocol` says what the benchmark's own harness draws with."""

    name: str
    evaluator: str
    prompts: tuple[PromptRecord, ...]
    images_per_prompt: int
    seed: int
    digest: str
    seed_rule: SeedRule = "pair"
    protocol: "Protocol | None" = None


class _Declaration(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Protocol(_Declaration):
    """What upstream's own harness draws with: pixels, steps, guidance scale, noise. None where it leaves it open."""

    width: PositiveInt | None = None
    height: PositiveInt | None = None
    steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    seed_rule: SeedRule | None = None


class _PromptList(_Declaration):
    """Prompts that nothing scores, such as calibration's."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    parser: str
    files: Annotated[tuple[PromptFile, ...], Field(min_length=1)]
    repeated_prompts: bool = False  # official lists may repeat a prompt: its index tells the two apart

    @field_validator("parser")
    @classmethod
    def _known(cls, parser: str) -> str:
        if parser not in PARSERS:
            raise ValueError(f"unknown parser '{parser}', choose one of {', '.join(PARSERS)}")
        return parser

    @model_validator(mode="after")
    def _whole(self) -> Self:
        roles = [file.role for file in self.files if file.role != PROMPTS]
        taken = [role for part in PARSERS[self.parser].companions.values() for role in part]
        for role in roles:
            if role not in taken or roles.count(role) > 1:
                raise ValueError(f"files: role '{role}' is not one that parser {self.parser} takes, or stands twice")
        if len(roles) == len(self.files):
            raise ValueError(f"files: none has the role '{PROMPTS}'")
        for file in self.files:
            if file.role == PROMPTS:
                self._check_tag(file, roles)
        return self

    def _check_tag(self, file: PromptFile, roles: Sequence[str]) -> None:
        parser = PARSERS[self._known(self.parser_of(file))]
        if file.tag is None:
            if parser.tagged:
                raise ValueError(f"file {file.path}: needs a tag")
            return
        if not parser.tagged:
            raise ValueError(f"file {file.path}: its lines name their tags; remove the tag '{file.tag}'")
        if parser.tags and file.tag not in parser.tags:
            raise ValueError(f"file {file.path}: unknown tag '{file.tag}', choose one of {', '.join(parser.tags)}")
        checked_tag(file.tag)
        missing = [role for role in parser.companions.get(file.tag, ()) if role not in roles]
        if missing:
            raise ValueError(f"file {file.path}: prompts of tag '{file.tag}' need files of role {', '.join(missing)}")

    def parser_of(self, file: PromptFile) -> str:
        return file.parser or self.parser


class _Benchmark(_PromptList):
    evaluator: Annotated[str, Field(min_length=1)]
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_IMAGES)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # as wide as the results' column
    seed_rule: SeedRule = "pair"
    protocol: Protocol | None = None


class _Group(_Declaration):
    """Benchmarks that one name stands for: names, or files beside the group's own."""

    benchmarks: Annotated[tuple[str, ...], Field(min_length=1)]


def load_workloads(names: Sequence[str], data_dir: Path | None = None) -> list[Workload]:
    """The benchmarks in order, groups such as `all` as their members. Raises UserError as load_workload does."""
    return [load_workload(member, data_dir) for name in names for member in _members(name)]


def evaluators_of(names: Sequence[str]) -> list[str]:
    """The benchmarks' evaluators, in order; needs no prompt files. Raises UserError for a fault in a manifest."""
    paths = [find_manifest("benchmark", member) for name in names for member in _members(name)]
    return [read_manifest(path, _Benchmark, defaults={"name": path.stem}).evaluator for path in paths]


def load_workload(name_or_path: str, data_dir: Path | None = None) -> Workload:
    """Reads an embedded benchmark by name or a user's own by path; `data_dir` holds upstream's files.

    Raises UserError for an unknown name, a fault in the manifest, a missing or altered file, and an empty or (unless
    the manifest allows it) repeated prompt.
    """
    path = find_manifest("benchmark", name_or_path)
    manifest = read_manifest(path, _Benchmark, defaults={"name": path.stem})
    prompts, digest = _read_prompts(manifest, path.parent, data_dir)
    return Workload(
        manifest.name,
        manifest.evaluator,
        prompts,
        manifest.images_per_prompt,
        manifest.seed,
        digest,
        manifest.seed_rule,
        manifest.protocol,
    )


def load_prompts(name_or_path: str, data_dir: Path | None = None) -> tuple[PromptRecord, ...]:
    """The prompts of a workload that no evaluator scores. Raises UserError as load_workload does."""
    path = find_manifest("benchmark", name_or_path)
    manifest = read_manifest(path, _PromptList, defaults={"name": path.stem})
    return _read_prompts(manifest, path.parent, data_dir)[0]


def _members(name_or_path: str) -> list[str]:
    path = find_manifest("benchmark", name_or_path)
    if "benchmarks" not in read_mapping(path, "files or benchmarks"):
        return [name_or_path]
    members = read_manifest(path, _Group).benchmarks
    return [str(path.parent / member) if member.endswith(SUFFIXES) else member for member in members]


def _read_prompts(manifest: _PromptList, folder: Path, data_dir: Path | None) -> tuple[tuple[PromptRecord, ...], str]:
    """All prompts in the order of the files, and the SHA-256 of the files' own."""
    digest = hashlib.sha256()
    sources: list[tuple[PromptFile, Source]] = []
    for file in manifest.files:
        path, content = read_prompt_file(file, folder, data_dir)
        digest.update(hashlib.sha256(content).digest())
        sources.append((file, Source(str(path), content, file.tag or "")))
    companions: dict[str, Source] = {file.role: source for file, source in sources if file.role != PROMPTS}
    prompts: list[PromptRecord] = []
    seen: dict[str, str] = {}
    for file, source in sources:
        if file.role != PROMPTS:
            continue
        parsed = list(PARSERS[manifest.parser_of(file)].parse(source, companions))
        _check(parsed, source.name, seen, manifest.repeated_prompts)
        first = len(prompts)
        prompts += [
            PromptRecord(first + i, prompt.tag, prompt.text, prompt.metadata) for i, prompt in enumerate(parsed)
        ]
    return tuple(prompts), digest.hexdigest()


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
