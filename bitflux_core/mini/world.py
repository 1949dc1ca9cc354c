"""The mini world: coloured shapes on a plain background, and the prompts that describe them in GenEval's grammar.

A `PromptSpec` is a prompt together with the scene that it describes; `training_prompts` lists every prompt that the
models learn from, `benchmark_prompts` samples the mini GenEval, whose colour prompts include the held-out pairs.
Textures, forms, overlaps and contacts are T2I-CompBench's part of the world: see `compositions`.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PLURALS = ("circles", "squares", "triangles", "stars", "hearts", "crosses", "rings", "moons")
# RGB in [0, 1]. Scenes use the first eight; brown and white exist so that the colour classifier knows all ten of
# GenEval's colour names (evaluators ask it for the official ten).
PALETTE = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.97, 0.87, 0.12),
    "green": (0.14, 0.62, 0.20),
    "blue": (0.12, 0.30, 0.86),
    "purple": (0.50, 0.16, 0.66),
    "pink": (0.98, 0.55, 0.76),
    "black": (0.07, 0.07, 0.07),
    "brown": (0.45, 0.26, 0.11),
    "white": (1.0, 1.0, 1.0),
}
COLORS = tuple(PALETTE)[:8]
NUMBERS = ("one", "two", "three", "four")
MEDIA = ("photo", "picture", "image", "drawing", "painting", "rendering", "sketch", "print", "poster", "snapshot")
TEXTURES = ("plain", "striped", "dotted", "checkered")  # the first is what no prompt asks for gets
FORMS = ("regular", "tall", "wide", "big", "small")  # likewise
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = (1, 0, 3, 2)  # of RELATIONS
PARAPHRASES = ("on the left of", "on the right of", "on the top of", "on the bottom of")
# Object 1 to object 0, from here on; the last five bring the two together.
NEXT_TO, IN_FRONT, TOUCHING, INSIDE, STANDING, HANGING = range(len(RELATIONS), len(RELATIONS) + 6)

# One pair for every shape and every colour: no training image or caption shows them, scoring asks for all of them.
HELD_OUT = frozenset((shape, (shape * 3 + 2) % len(COLORS)) for shape in range(len(SHAPES)))

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAG_COUNTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
MAX_OBJECTS = 4
ANY = -1


@dataclass(frozen=True)
class PromptSpec:
    """A prompt and its scene.

    A shape and a colour (`ANY` = free) for each object; `relation` is that of object 1 to object 0, `third` that of
    object 2 to object 0. `textures` and `forms` are the first of their kind where left out. A prompt names object 1
    before the object that it is related to, but where it is `turned`.
    """

    tag: str
    text: str
    shapes: tuple[int, ...]
    colors: tuple[int, ...]
    relation: int = ANY
    third: int = ANY
    textures: tuple[int, ...] = ()
    forms: tuple[int, ...] = ()
    turned: bool = False

    @property
    def held_out(self) -> bool:
        return any(pair in HELD_OUT for pair in zip(self.shapes, self.colors, strict=True))

    @property
    def nouns(self) -> list[int]:
        """The objects in the order of the prompt's nouns; of several of one shape, which share a noun, the first."""
        objects = [self.shapes.index(shape) for shape in dict.fromkeys(self.shapes)]
        return objects if self.relation == ANY or self.turned else [1, 0, *objects[2:]]

    def metadata(self) -> dict:
        """The prompt's line of GenEval metadata (`include`, `exclude`), as PROTOCOLS writes it."""
        groups: list[dict] = []
        if self.tag in ("counting", "numeracy"):
            for shape in dict.fromkeys(self.shapes):
                groups.append({"class": SHAPES[shape], "count": self.shapes.count(shape)})
        else:
            for shape, color in zip(self.shapes, self.colors, strict=True):
                group: dict = {"class": SHAPES[shape], "count": 1}
                if color != ANY:
                    group["color"] = COLORS[color]
                groups.append(group)
        meta: dict = {"tag": self.tag, "include": groups, "prompt": self.text}
        if self.tag == "counting":
            meta["exclude"] = [{"class": groups[0]["class"], "count": groups[0]["count"] + 1}]
        if 0 <= self.relation < NEXT_TO:
            groups[1]["position"] = [RELATIONS[self.relation], 0]
        return meta


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _opening(medium: str) -> str:
    return f"{article(medium)} of"


def _single(medium: str) -> list[PromptSpec]:
    return [PromptSpec("single_object", f"{_opening(medium)} a {SHAPES[s]}", (s,), (ANY,)) for s in range(len(SHAPES))]


def _two(medium: str) -> list[PromptSpec]:
    return [
        PromptSpec("two_object", f"{_opening(medium)} a {SHAPES[a]} and a {SHAPES[b]}", (a, b), (ANY, ANY))
        for a, b in itertools.permutations(range(len(SHAPES)), 2)
    ]


def _counting(medium: str, least: int = 2) -> list[PromptSpec]:
    specs = []
    for s, n in itertools.product(range(len(SHAPES)), range(least, MAX_OBJECTS + 1)):
        noun = SHAPES[s] if n == 1 else PLURALS[s]
        specs.append(PromptSpec("counting", f"{_opening(medium)} {NUMBERS[n - 1]} {noun}", (s,) * n, (ANY,) * n))
    return specs


def _colors(medium: str) -> list[PromptSpec]:
    return [
        PromptSpec("colors", f"{_opening(medium)} {article(COLORS[c])} {SHAPES[s]}", (s,), (c,))
        for s, c in itertools.product(range(len(SHAPES)), range(len(COLORS)))
    ]


def _position(medium: str, phrases: tuple[str, ...] = RELATIONS) -> list[PromptSpec]:
    return [
        PromptSpec("position", f"{_opening(medium)} a {SHAPES[b]} {phrase} a {SHAPES[a]}", (a, b), (ANY, ANY), relation)
        for a, b in itertools.permutations(range(len(SHAPES)), 2)
        for relation, phrase in enumerate(phrases)
    ]


def _next_to(medium: str) -> list[PromptSpec]:
    return [
        PromptSpec("two_object", f"{_opening(medium)} a {SHAPES[a]} next to a {SHAPES[b]}", (a, b), (ANY, ANY), NEXT_TO)
        for a, b in itertools.permutations(range(len(SHAPES)), 2)
    ]


def _color_attr(medium: str) -> list[PromptSpec]:
    return [
        PromptSpec(
            "color_attr",
            f"{_opening(medium)} {article(COLORS[c])} {SHAPES[a]} and {article(COLORS[d])} {SHAPES[b]}",
            (a, b),
            (c, d),
        )
        for a, b in itertools.permutations(range(len(SHAPES)), 2)
        for c, d in itertools.permutations(range(len(COLORS)), 2)
    ]


def _numeracy(medium: str) -> list[PromptSpec]:
    specs = []
    for (a, b), (n, m) in itertools.product(
        itertools.permutations(range(len(SHAPES)), 2), ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
    ):
        first = f"{NUMBERS[n - 1]} {(SHAPES if n == 1 else PLURALS)[a]}"
        second = f"{NUMBERS[m - 1]} {(SHAPES if m == 1 else PLURALS)[b]}"
        specs.append(
            PromptSpec("numeracy", f"{_opening(medium)} {first} and {second}", (a,) * n + (b,) * m, (ANY,) * (n + m))
        )
    return specs


# How often training shows each kind of prompt: the hard kinds (binding, relations, counting) most.
TRAINING_MIX: tuple[tuple[float, Callable[[str], list[PromptSpec]]], ...] = (
    (0.04, _single),
    (0.12, _two),
    (0.02, _next_to),
    (0.18, lambda medium: _counting(medium, least=1)),
    (0.06, _colors),
    (0.23, _position),
    (0.05, lambda medium: _position(medium, PARAPHRASES)),
    (0.26, _color_attr),
    (0.04, _numeracy),
)
PHOTO_SHARE = 0.5


def training_prompts(every_pair: bool = False) -> tuple[list[PromptSpec], list[float]]:
    """Every training prompt and its sampling probability (they sum to 1); no held-out pair among them.

    With `every_pair` those too: for models that judge, and must know what the drawing ones never saw.
    """
    specs: list[PromptSpec] = []
    weights: list[float] = []
    for share, build in TRAINING_MIX:
        for medium in MEDIA:
            part = [spec for spec in build(medium) if every_pair or not spec.held_out]
            medium_share = PHOTO_SHARE if medium == "photo" else (1 - PHOTO_SHARE) / (len(MEDIA) - 1)
            specs += part
            weights += [share * medium_share / len(part)] * len(part)
    return specs, weights


def benchmark_prompts(seed: int = 0) -> list[PromptSpec]:
    """The 553 prompts of the mini GenEval: GenEval's tags, order and counts; all held-out pairs stand in `colors`."""
    rng = random.Random(seed)
    builders: dict[str, Callable[[str], list[PromptSpec]]] = {
        "single_object": _single,
        "two_object": _two,
        "counting": _counting,
        "colors": _colors,
        "position": _position,
        "color_attr": _color_attr,
    }
    chosen: list[PromptSpec] = []
    for tag in TAGS:
        photo = builders[tag]("photo")
        rng.shuffle(photo)
        others = [spec for medium in MEDIA[1:] for spec in builders[tag](medium)]
        rng.shuffle(others)
        chosen += (photo + others)[: TAG_COUNTS[tag]]
    return chosen


def vocabulary() -> list[str]:
    """Every word of every prompt, sorted."""
    words = {word for spec in training_prompts()[0] for word in spec.text.split()}
    return sorted(words | set(PALETTE) | {"object"} | {f"{color}-colored" for color in PALETTE})
