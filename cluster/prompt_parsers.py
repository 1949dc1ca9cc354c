"""Parsers of prompt files: one file's content -> its prompts, in file order, each with its line.

A file's tag is given by the workload's manifest where its lines do not name one. Some prompts need what stands in other
files, the companions, which the manifest tells apart by their role.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator

from bitflux_core.errors import UserError
from cluster.manifests import describe
from evaluators.compbench.categories import CATEGORIES, COMPLEX, NUMERACY

COMPLEX_KINDS = ("spatial", "action", "spatialaction")
COMPANIONS = {NUMERACY: ("objects",), COMPLEX: tuple(f"complex-{kind}" for kind in COMPLEX_KINDS)}
PARTI_COLUMNS = ["Prompt", "Category", "Challenge", "Note"]


Line = TypeVar("Line", bound=BaseModel)


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt as its file gives it: line (from 1), tag, text, and the metadata that its evaluator reads."""

    line: int
    tag: str
    text: str
    metadata: dict


@dataclass(frozen=True)
class Source:
    """A file's bytes, its name as messages give it, and the tag of all its prompts, if the manifest gives one."""

    name: str
    content: bytes
    tag: str = ""


Companions = Mapping[str, Source]  # by role


class _GenEvalGroup(BaseModel):
    label: Annotated[str, Field(alias="class", min_length=1)]
    count: PositiveInt
    color: str | None = None
    position: tuple[str, int] | None = None


class _GenEvalLine(BaseModel):
    tag: Annotated[str, Field(min_length=1)]
    prompt: str
    include: Annotated[list[_GenEvalGroup], Field(min_length=1)]
    exclude: list[_GenEvalGroup] = []

    @field_validator("tag")
    @classmethod
    def _not_the_sums(cls, tag: str) -> str:
        return checked_tag(tag)

    @field_validator("prompt")
    @classmethod
    def _encodable(cls, prompt: str) -> str:
        prompt.encode()  # JSON can spell half of a surrogate pair, which is no text; the error is a ValueError
        return prompt


class _CategoryLine(BaseModel):
    category: Annotated[str, Field(min_length=1)]
    prompt: str
    objects: list[tuple[str, PositiveInt]] | None = None
    kind: str | None = None

    @field_validator("category")
    @classmethod
    def _not_the_sums(cls, category: str) -> str:
        return checked_tag(category)


def checked_tag(tag: str) -> str:
    """The tag. ValueError for one that the results use themselves."""
    if tag == "overall":
        raise ValueError("the results call the mean over all tags 'overall'; name the tag otherwise")
    return tag


def parse_geneval(source: Source, _: Companions) -> Iterator[ParsedPrompt]:
    """GenEval's metadata: on each line {tag, include: [{class, count, color?, position?}], exclude?, prompt}."""
    for line, metadata, checked in _json_lines(source, enumerate(_lines(source), start=1), _GenEvalLine):
        yield ParsedPrompt(line, checked.tag, checked.prompt, metadata)


def parse_lines(source: Source, _: Companions) -> Iterator[ParsedPrompt]:
    """A prompt a line, all of the file's tag; empty lines are dropped. Metadata: {category, prompt}."""
    for line, text in _filled_lines(source):
        prompt = text.strip()
        yield ParsedPrompt(line, source.tag, prompt, {"category": source.tag, "prompt": prompt})


def parse_compbench(source: Source, companions: Companions) -> Iterator[ParsedPrompt]:
    """T2I-CompBench: a prompt a line, the tag is the category. Metadata: {category, prompt}, and what the rules of two
    categories ask for: of numeracy `objects` [[name, count], ...], of complex `kind` (spatial, action, spatialaction).
    """
    kinds = _complex_kinds(companions) if source.tag == COMPLEX else {}
    plurals = _plurals(companions["objects"]) if source.tag == NUMERACY else {}
    for prompt in parse_lines(source, companions):
        more: dict[str, object] = {}
        if source.tag == NUMERACY:
            more["objects"] = _objects(prompt.text, plurals)
        elif source.tag == COMPLEX:
            kind = kinds.get(_complex_key(prompt.text))
            if kind is None:
                raise UserError(f"{source.name} line {prompt.line}: no list of the complex kinds holds this prompt")
            more["kind"] = kind
        yield replace(prompt, metadata={**prompt.metadata, **more})


def parse_categories(source: Source, _: Companions) -> Iterator[ParsedPrompt]:
    """T2I-CompBench's metadata: {category, prompt, objects?, kind?} on each line; the categories are the tags."""
    for line, metadata, checked in _json_lines(source, _filled_lines(source), _CategoryLine):
        yield ParsedPrompt(line, checked.category, checked.prompt, metadata)


def _json_lines(
    source: Source, lines: Iterable[tuple[int, str]], model: type[Line]
) -> Iterator[tuple[int, dict, Line]]:
    """Number, object and checked object of each line."""
    for line, text in lines:
        try:
            metadata = json.loads(text)
            checked = model.model_validate(metadata)
        except ValidationError as error:
            raise UserError(f"{source.name} line {line}: {describe(error)}") from error
        except ValueError as error:
            raise UserError(f"{source.name} line {line}: not a JSON object ({error})") from error
        yield line, metadata, checked


def parse_parti(source: Source, _: Companions) -> Iterator[ParsedPrompt]:
    """PartiPrompts' table: tab-separated, never quoted; the tag is the column Category."""
    lines = _filled_lines(source)
    if next(lines, (0, ""))[1].split("\t") != PARTI_COLUMNS:
        raise UserError(f"{source.name} line 1: must be the columns {', '.join(PARTI_COLUMNS)}, separated by tabs")
    for line, text in lines:
        cells = text.split("\t")
        if len(cells) != len(PARTI_COLUMNS):
            raise UserError(f"{source.name} line {line}: {len(cells)} columns of {len(PARTI_COLUMNS)}")
        row = {column.lower(): cell.strip() for column, cell in zip(PARTI_COLUMNS, cells, strict=True)}
        if not row["category"]:
            raise UserError(f"{source.name} line {line}: Category is empty; write one")
        try:
            tag = checked_tag(row["category"])
        except ValueError as error:
            raise UserError(f"{source.name} line {line}: Category: {error}") from error
        yield ParsedPrompt(line, tag, row["prompt"], row)


def _complex_kinds(companions: Companions) -> dict[str, str]:
    """Kind of each complex prompt, by the key that upstream matches prompts with."""
    kinds: dict[str, str] = {}
    for kind in COMPLEX_KINDS:
        source = companions[f"complex-{kind}"]
        for line, text in _filled_lines(source):
            if kinds.setdefault(_complex_key(text), kind) != kind:
                raise UserError(f"{source.name} line {line}: stands also in the list of another complex kind")
    return kinds


def _complex_key(text: str) -> str:
    return text.strip().split(".")[0].lower()


def _objects(prompt: str, plurals: dict[str, str]) -> list[list[object]]:
    from evaluators.compbench.numeracy import parse_objects

    return [[name, count] for name, count in parse_objects(prompt, plurals)]


def _plurals(source: Source) -> dict[str, str]:
    """Upstream's list of objects, `singular - plural` a line: plural -> singular."""
    plurals = {}
    for line, text in _filled_lines(source):
        singular, dash, plural = text.partition(" - ")
        if not dash:
            raise UserError(f"{source.name} line {line}: must be 'singular - plural'")
        plurals[plural.strip()] = singular.strip()
    return plurals


def _filled_lines(source: Source) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of the lines that are not empty; upstream's end in CRLF or LF, the last in neither."""
    for line, text in enumerate(_lines(source), start=1):
        if text.strip():
            yield line, text.removesuffix("\r")


def _lines(source: Source) -> list[str]:
    """Lines without their ends; only the last may be missing or empty. Split on newlines alone, as upstream's are."""
    try:
        text = source.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source.name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return text.removesuffix("\n").split("\n")


@dataclass(frozen=True)
class Parser:
    """How a kind of file is read.

    `tagged`: the manifest gives each file its tag, one of `tags` where there are any. `companions`: the roles that must
    be there beside the prompts of a tag.
    """

    parse: Callable[[Source, Companions], Iterator[ParsedPrompt]]
    tagged: bool = False
    tags: tuple[str, ...] = ()
    companions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


PARSERS = {
    "geneval": Parser(parse_geneval),
    "t2i-compbench": Parser(parse_compbench, tagged=True, tags=CATEGORIES, companions=COMPANIONS),
    "t2i-compbench-jsonl": Parser(parse_categories),
    "lines": Parser(parse_lines, tagged=True),
    "parti": Parser(parse_parti),
}
