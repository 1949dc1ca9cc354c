"""Complex compositions: 3-in-1, the mean of what the other rules say of those parts that a prompt has."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluators.base import Language, Word
from evaluators.compbench.attributes import AttributeJudge
from evaluators.compbench.judgment import Judgment
from evaluators.compbench.non_spatial import ClipScoreJudge

# Which rules a kind of prompt is judged by.
PARTS = {
    "spatial": ("spatial", "attributes"),
    "action": ("clip", "attributes"),
    "spatialaction": ("attributes", "spatial", "clip"),
}
PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
ADJECTIVE = "ADJ"
OBJECTS_BEFORE = ("NOUN", "PROPN")

Triple = tuple[str, str, str]
SpatialScorer = Callable[[Sequence[np.ndarray], Sequence[Triple | None]], list[Judgment]]


def without_adjectives(prompt: str, language: Language) -> str:
    """The prompt's words but for its adjectives, one space apart."""
    return " ".join(word.text for word in language.words(prompt) if word.tag != ADJECTIVE)


def spatial_objects(words: Sequence[Word]) -> Triple | None:
    """The object before the first preposition of place, the preposition, and the object after it; None unless both
    objects are there."""
    lowered = [word.text.lower() for word in words]
    for preposition in PREPOSITIONS:
        parts = preposition.split()
        for start in range(len(words) - len(parts) + 1):
            if lowered[start : start + len(parts)] == parts:
                before = _before(words[:start])
                after = _after(words[start + len(parts) :])
                return (before, preposition, after) if before and after else None
    return None


def _before(words: Sequence[Word]) -> str | None:
    """The noun nearest to the left."""
    return next((word.text.lower() for word in reversed(words) if word.tag in OBJECTS_BEFORE), None)


def _after(words: Sequence[Word]) -> str | None:
    """The first noun to the right; where there is none, the first proper noun that no other one follows."""
    for word in words:
        if word.tag == "NOUN":
            return word.text.lower()
    for place, word in enumerate(words):
        if word.tag == "PROPN" and (place + 1 == len(words) or words[place + 1].tag != "PROPN"):
            return word.text.lower()
    return None


class ComplexJudge:
    """3-in-1 over the judges of attributes, of places and of CLIPScore."""

    def __init__(
        self, attributes: AttributeJudge, spatial: SpatialScorer, clip: ClipScoreJudge, language: Language
    ) -> None:
        self.attributes = attributes
        self.spatial = spatial
        self.clip = clip
        self.language = language

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str], kinds: Sequence[str]) -> list[Judgment]:
        """One judgment for each image; `kinds` are of `PARTS`. Details: each part's score, then what each saw."""
        parts: dict[str, dict[int, Judgment]] = {}
        for name, judge in (("attributes", self._attributes), ("spatial", self._spatial), ("clip", self._clip)):
            chosen = [index for index, kind in enumerate(kinds) if name in PARTS[kind]]
            found = judge([images[index] for index in chosen], [prompts[index] for index in chosen])
            parts[name] = dict(zip(chosen, found, strict=True))
        judgments = []
        for index, kind in enumerate(kinds):
            seen = {name: parts[name][index] for name in PARTS[kind]}
            scores: dict[str, object] = {name: round(judgment.score, 4) for name, judgment in seen.items()}
            details = [detail for judgment in seen.values() for detail in judgment.details]
            mean = sum(judgment.score for judgment in seen.values()) / len(seen)
            judgments.append(Judgment(mean, [scores, *details]))
        return judgments

    def _attributes(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        return self.attributes.judge(images, prompts)

    def _spatial(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        return self.spatial(images, [spatial_objects(self.language.words(prompt)) for prompt in prompts])

    def _clip(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        return self.clip.judge(images, [without_adjectives(prompt, self.language) for prompt in prompts])
