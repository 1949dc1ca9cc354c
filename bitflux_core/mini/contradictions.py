"""Scenes that a prompt is wrong about, by one thing only: what an evaluator must tell from the right ones."""

import random
from dataclasses import replace

from bitflux_core.mini.world import (
    ANY,
    COLORS,
    HANGING,
    IN_FRONT,
    INSIDE,
    MAX_OBJECTS,
    NEXT_TO,
    OPPOSITE,
    SHAPES,
    STANDING,
    TEXTURES,
    TOUCHING,
    PromptSpec,
)

# The contact that looks least like each.
OTHER_CONTACT = {TOUCHING: INSIDE, INSIDE: STANDING, STANDING: HANGING, HANGING: STANDING}


def contradicted(spec: PromptSpec, rng: random.Random) -> PromptSpec:
    """The same prompt over a scene that contradicts it: another attribute, number, place, depth, contact or shape.

    Attributes of two objects are exchanged where they differ: the mistake that models make.
    """
    if spec.tag in ("counting", "numeracy"):
        return _another_number(spec, rng)
    if _differ(spec.textures):
        return replace(spec, textures=_exchanged(spec.textures))
    if _differ(spec.forms):
        return replace(spec, forms=_exchanged(spec.forms))
    if _differ(spec.colors) and ANY not in spec.colors[:2]:
        return replace(spec, colors=_exchanged(spec.colors))
    if spec.tag == "colors":
        return replace(spec, colors=(_other(spec.colors[0], len(COLORS), rng),))
    if 0 <= spec.relation < NEXT_TO:
        return replace(spec, relation=OPPOSITE[spec.relation])
    if spec.relation == IN_FRONT:
        return replace(spec, shapes=(spec.shapes[1], spec.shapes[0]), colors=(spec.colors[1], spec.colors[0]))
    if spec.relation in OTHER_CONTACT:
        return replace(spec, relation=OTHER_CONTACT[spec.relation])
    if spec.tag == "complex":
        return _another_attribute(spec, rng)
    shapes = [*spec.shapes]
    shapes[-1] = rng.choice([shape for shape in range(len(SHAPES)) if shape not in spec.shapes])
    return replace(spec, shapes=tuple(shapes))


def _differ(values: tuple[int, ...]) -> bool:
    return len(values) > 1 and values[0] != values[1]


def _exchanged(values: tuple[int, ...]) -> tuple[int, ...]:
    """Those of object 0 and object 1 in each other's place."""
    return (values[1], values[0], *values[2:])


def _another_number(spec: PromptSpec, rng: random.Random) -> PromptSpec:
    """One object of one shape more or less."""
    if (len(spec.shapes) < MAX_OBJECTS and rng.random() < 0.5) or len(spec.shapes) == 1:
        return replace(spec, shapes=(*spec.shapes, spec.shapes[-1]), colors=(*spec.colors, spec.colors[-1]))
    return replace(spec, shapes=spec.shapes[:-1], colors=spec.colors[:-1])


def _another_attribute(spec: PromptSpec, rng: random.Random) -> PromptSpec:
    """Another texture or colour of object 0, whichever the prompt names."""
    if spec.textures and spec.textures[0]:
        return replace(spec, textures=(_other(spec.textures[0], len(TEXTURES), rng), *spec.textures[1:]))
    return replace(spec, colors=(_other(spec.colors[0], len(COLORS), rng), *spec.colors[1:]))


def _other(value: int, limit: int, rng: random.Random) -> int:
    return rng.choice([one for one in range(limit) if one != value])
