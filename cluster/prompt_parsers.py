"""Parsers of prompt files: bytes of one file -> its prompts, in file order, each with its line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator

from bitflux_core.errors import UserError
from cluster.manifests import describe


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt as its file gives it: line (from 1), tag, text, and the metadata that its evaluator reads."""

    line: int
    tag: str
    text: str
    metadata: dict


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
        if tag == "overall":
            raise ValueError("the results call the mean over all tags 'overall'; name the tag otherwise")
        return tag

    @field_validator("prompt")
    @classmethod
    def _encodable(cls, prompt: str) -> str:
        prompt.encode()  # JSON can spell half of a surrogate pair, which is no text; the error is a ValueError
        return prompt


def parse_geneval(content: bytes, name: str) -> Iterator[ParsedPrompt]:
    """GenEval's metadata: on each line {tag, include: [{class, count, color?, position?}], exclude?, prompt}."""
    for line, text in enumerate(_lines(content, name), start=1):
        try:
            metadata = json.loads(text)
            checked = _GenEvalLine.model_validate(metadata)
        except ValidationError as error:
            raise UserError(f"{name} line {line}: {describe(error)}") from error
        except ValueError as error:
            raise UserError(f"{name} line {line}: not a JSON object ({error})") from error
        yield ParsedPrompt(line, checked.tag, checked.prompt, metadata)


def _lines(content: bytes, name: str) -> list[str]:
    """Lines without their ends; only the last may be missing or empty. Split on newlines alone, as upstream's are."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return text.removesuffix("\n").split("\n")


PARSERS: dict[str, Callable[[bytes, str], Iterator[ParsedPrompt]]] = {"geneval": parse_geneval}
