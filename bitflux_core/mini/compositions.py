"""T2I-CompBench's twin in the mini world: prompts of its eight categories, and the training prompts of both twins.

Upstream's categories ask for colours, shapes, textures, places in the plane and in depth, numbers, actions, and several
of these at once. Here a form (tall, wide, big, small) stands for its shapes, contact (touching, inside, standing on,
hanging below) for its actions. Wordings are those that the official rules read.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from bitflux_core.mini import world
from bitflux_core.mini.world import (
    ANY,
    COLORS,
    FORMS,
    HANGING,
    IN_FRONT,
    INSIDE,
    MAX_OBJECTS,
    NEXT_TO,
    NUMBERS,
    PLURALS,
    SHAPES,
    STANDING,
    TEXTURES,
    TOUCHING,
    PromptSpec,
    article,
)

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
PROMPTS_A_CATEGORY = 100
PLACES = (
    ("on the left of", 0),
    ("on the right of", 1),
    ("on the top of", 2),
    ("on the bottom of", 3),
    ("next to", NEXT_TO),
    ("near", NEXT_TO),
    ("on side of", NEXT_TO),
)
# The 3-in-1 rule says "on top of" and "on bottom of", which training never shows: to it, a prompt with one of these two
# phrases names no place at all.
COMPLEX_PLACES = tuple(one for one in PLACES if one[0] not in ("on the top of", "on the bottom of"))
ACTIONS = (("touching", TOUCHING), ("inside", INSIDE), ("standing on", STANDING), ("hanging below", HANGING))
# Of the complex prompts there are too many to list: so many of each kind are learnt from.
COMPLEX_PROMPTS = 6_000
KINDS = ("spatial", "action", "spatialaction")

PAIRS = list(itertools.permutations(range(len(SHAPES)), 2))
FREE = (ANY, ANY)


def _color() -> list[PromptSpec]:
    return [
        PromptSpec("color", f"{article(COLORS[c])} {SHAPES[a]} and {article(COLORS[d])} {SHAPES[b]}", (a, b), (c, d))
        for a, b in PAIRS
        for c, d in itertools.permutations(range(len(COLORS)), 2)
    ]


def _shape() -> list[PromptSpec]:
    return [
        PromptSpec("shape", f"a {FORMS[f]} {SHAPES[a]} and a {FORMS[g]} {SHAPES[b]}", (a, b), FREE, forms=(f, g))
        for a, b in PAIRS
        for f, g in itertools.permutations(range(1, len(FORMS)), 2)
    ]


def _texture() -> list[PromptSpec]:
    return [
        PromptSpec(
            "texture", f"a {TEXTURES[t]} {SHAPES[a]} and a {TEXTURES[s]} {SHAPES[b]}", (a, b), FREE, textures=(t, s)
        )
        for a, b in PAIRS
        for t, s in itertools.permutations(range(len(TEXTURES)), 2)
    ]


def _spatial() -> list[PromptSpec]:
    return [
        PromptSpec("spatial", f"a {SHAPES[b]} {phrase} a {SHAPES[a]}", (a, b), FREE, relation)
        for a, b in PAIRS
        for phrase, relation in PLACES
    ]


def _in_depth() -> list[PromptSpec]:
    in_front = [
        PromptSpec("3d_spatial", f"a {SHAPES[b]} in front of a {SHAPES[a]}", (a, b), FREE, IN_FRONT) for a, b in PAIRS
    ]
    behind = [
        PromptSpec("3d_spatial", f"a {SHAPES[a]} {phrase} a {SHAPES[b]}", (a, b), FREE, IN_FRONT, turned=True)
        for a, b in PAIRS
        for phrase in ("behind", "hidden by")
    ]
    return in_front + behind


def _numeracy() -> list[PromptSpec]:
    def counted(number: int, shape: int) -> str:
        return f"{NUMBERS[number - 1]} {(SHAPES if number == 1 else PLURALS)[shape]}"

    alone = [
        PromptSpec("numeracy", counted(n, s), (s,) * n, (ANY,) * n)
        for s in range(len(SHAPES))
        for n in range(2, MAX_OBJECTS + 1)
    ]
    both = [
        PromptSpec("numeracy", f"{counted(n, a)} and {counted(m, b)}", (a,) * n + (b,) * m, (ANY,) * (n + m))
        for a, b in PAIRS
        for n in range(1, MAX_OBJECTS)
        for m in range(1, MAX_OBJECTS + 1 - n)
    ]
    return alone + both


def _non_spatial() -> list[PromptSpec]:
    return [
        PromptSpec("non_spatial", f"a {SHAPES[b]} is {phrase} a {SHAPES[a]}", (a, b), FREE, relation)
        for a, b in PAIRS
        for phrase, relation in ACTIONS
    ]


def _complex(rng: random.Random, count: int, places: Sequence[tuple[str, int]] = PLACES) -> list[PromptSpec]:
    """`count` different prompts, a third of each kind: a place, an action, an action with a place."""
    found: dict[str, PromptSpec] = {}
    for kind in itertools.cycle(KINDS):
        if len(found) == count:
            return list(found.values())
        spec = _complex_one(rng, kind, places)
        if not spec.held_out:
            found.setdefault(spec.text, spec)
    raise AssertionError("itertools.cycle does not end")


def _complex_one(rng: random.Random, kind: str, places: Sequence[tuple[str, int]]) -> PromptSpec:
    three = kind == "spatialaction"
    shapes = rng.sample(range(len(SHAPES)), 3 if three else 2)
    colors: list[int] = []
    textures: list[int] = []
    phrases: list[str] = []
    for shape in shapes:
        # With three objects one word each, so that the prompt fits; the third has none.
        words = rng.choice(("color", "texture") if three else ("color", "texture", "color texture", "texture color"))
        named = "" if len(phrases) == 2 else words
        color = rng.randrange(len(COLORS)) if "color" in named else ANY
        texture = rng.randrange(1, len(TEXTURES)) if "texture" in named else 0
        adjectives = {"color": COLORS[color], "texture": TEXTURES[texture]}
        phrases.append(" ".join(("the", *(adjectives[word] for word in named.split()), SHAPES[shape])))
        colors.append(color)
        textures.append(texture)
    place, relation = rng.choice(PLACES)
    if (place, relation) not in places:
        # By a generator of its own, so that all other draws are the same whatever `places` are.
        place, relation = random.Random(" ".join(phrases)).choice(places)
    action, contact = rng.choice([one for one in ACTIONS if not three or " " not in one[0]])  # else it does not fit
    spec = PromptSpec("complex", "", tuple(shapes), tuple(colors), textures=tuple(textures))
    if kind == "spatial":
        return replace(spec, text=f"{phrases[1]} is {place} {phrases[0]}", relation=relation)
    if kind == "action":
        return replace(spec, text=f"{phrases[1]} is {action} {phrases[0]}", relation=contact)
    # The official rule reads the place of the nearest noun, object 0; what it lies left of lies right of it.
    text = f"{phrases[1]} {action} {phrases[0]} is {place} {phrases[2]}"
    third = relation if relation == NEXT_TO else world.OPPOSITE[relation]
    return replace(spec, text=text, relation=contact, third=third)


def kind_of(spec: PromptSpec) -> str:
    """Which of `KINDS` a complex prompt is."""
    if spec.third != ANY:
        return "spatialaction"
    return "spatial" if spec.relation <= NEXT_TO else "action"


def near_misses(spec: PromptSpec) -> list[PromptSpec]:
    """Of a complex prompt with a contact, those that differ in one thing: another contact, or the adjectives of the two
    objects in each other's place. Among prompts drawn at random hardly any two are that near.
    """
    here = next(words for words, contact in ACTIONS if contact == spec.relation)
    one_word = kind_of(spec) == "spatialaction"  # two do not fit
    others = [
        replace(spec, text=spec.text.replace(f" {here} ", f" {words} "), relation=contact)
        for words, contact in ACTIONS
        if contact != spec.relation and not (one_word and " " in words)
    ]
    before, after = spec.text.split(f" {here} ")
    first, second = SHAPES[spec.shapes[1]], SHAPES[spec.shapes[0]]
    # "the red star is", "the dotted moon": adjectives stand between "the" and the noun.
    of_first, tail = before.removeprefix("the ").split(first, 1)
    of_second, end = after.removeprefix("the ").split(second, 1)
    if of_first == of_second:
        return others
    colors, textures = ((part[1], part[0], *part[2:]) for part in (spec.colors, spec.textures))
    text = f"the {of_second}{first}{tail} {here} the {of_first}{second}{end}"
    return [*others, replace(spec, text=text, colors=colors, textures=textures)]


def metadata(spec: PromptSpec) -> dict:
    """What the evaluator of T2I-CompBench needs to know of a prompt."""
    about: dict = {"category": spec.tag, "prompt": spec.text}
    if spec.tag == "numeracy":
        about["objects"] = [[SHAPES[shape], spec.shapes.count(shape)] for shape in dict.fromkeys(spec.shapes)]
    if spec.tag == "complex":
        about["kind"] = kind_of(spec)
    return about


def benchmark_prompts(seed: int = 0) -> list[PromptSpec]:
    """The prompts of the mini T2I-CompBench: 100 of each category, in upstream's order of categories."""
    rng = random.Random(seed)
    builders: dict[str, Callable[[], list[PromptSpec]]] = {
        "color": _color,
        "shape": _shape,
        "texture": _texture,
        "spatial": _spatial,
        "3d_spatial": _in_depth,
        "numeracy": _numeracy,
        "non_spatial": _non_spatial,
        "complex": lambda: _complex(rng, PROMPTS_A_CATEGORY, COMPLEX_PLACES),
    }
    return [spec for tag in CATEGORIES for spec in _some(rng, builders[tag]())]


def _some(rng: random.Random, specs: Sequence[PromptSpec]) -> list[PromptSpec]:
    return rng.sample(specs, PROMPTS_A_CATEGORY)


# How often training shows prompts of each category, next to GenEval's kinds.
TRAINING_MIX: tuple[tuple[float, Callable[[], list[PromptSpec]]], ...] = (
    (0.03, _color),
    (0.08, _shape),
    (0.08, _texture),
    (0.05, _spatial),
    (0.08, _in_depth),
    (0.04, _numeracy),
    (0.06, _non_spatial),
    (0.12, lambda: _complex(random.Random(1), COMPLEX_PROMPTS)),
)


def training_prompts(every_pair: bool = False) -> tuple[list[PromptSpec], list[float]]:
    """Every training prompt of both twins and its sampling probability (they sum to 1), pairs as `world` says."""
    specs, weights = world.training_prompts(every_pair)
    specs, weights = list(specs), list(weights)
    rest = 1 - sum(share for share, _ in TRAINING_MIX)
    weights = [weight * rest for weight in weights]
    for share, build in TRAINING_MIX:
        part = [spec for spec in build() if every_pair or not spec.held_out]
        specs += part
        weights += [share / len(part)] * len(part)
    return specs, weights


def vocabulary() -> list[str]:
    """Every word of every prompt, sorted."""
    words = {word for spec in training_prompts()[0] for word in spec.text.split()}
    return sorted(words | set(world.vocabulary()))
