"""Numbers: T2I-CompBench's numeracy rule, on the boxes of a detector."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from evaluators.base import Detection, PromptedDetector
from evaluators.compbench.judgment import Judgment
from evaluators.compbench.objects import PEOPLE, area, framed, iou, overlap

NUMBERS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
}
# What upstream's detector calls some of the objects; "telivision" is upstream's own spelling.
NAMES = {
    **PEOPLE,
    "ship": "boat",
    "telivision": "tv",
    "goldfish": "fish",
    "painting": "picture",
}
SAME_OBJECT = 0.9  # IoU, or share of either box inside the other, from which two boxes are one object
PIXEL = 1.0  # added to widths and heights

Wanted = Sequence[tuple[str, int]]


def parse_objects(prompt: str, plurals: Mapping[str, str]) -> list[tuple[str, int]]:
    """What a numeracy prompt asks for: each object as the detector is asked for it, and how many.

    A number word, then the next two words or the next one, where `plurals` has them: upstream's list of objects, plural
    to singular.
    """
    forms = {**{singular: singular for singular in plurals.values()}, **plurals}
    words = re.findall(r"[\w'-]+", prompt.lower())
    found: list[tuple[str, int]] = []
    for place, word in enumerate(words):
        if word not in NUMBERS:
            continue
        for length in (2, 1):
            phrase = " ".join(words[place + 1 : place + 1 + length])
            if phrase in forms:
                name = forms[phrase]
                found.append((NAMES.get(name, name), NUMBERS[word]))
                break
    return found


def without_doubles(detections: Sequence[Detection]) -> list[Detection]:
    """Detections, best first, without those that show the same object as a better one of the same label."""
    kept: list[Detection] = []
    for one in detections:
        if not any(one.label == better.label and _same(one, better) for better in kept):
            kept.append(one)
    return kept


def _same(one: Detection, other: Detection) -> bool:
    shared = overlap(one.box, other.box, PIXEL)
    inside = max(shared / area(one.box, PIXEL), shared / area(other.box, PIXEL))
    return iou(one.box, other.box, PIXEL) > SAME_OBJECT or inside > SAME_OBJECT


def count(detections: Sequence[Detection], name: str) -> int:
    """How many detections have this label or, where none has, one that contains it."""
    exact = sum(one.label == name for one in detections)
    return exact or sum(name in one.label for one in detections)


def judge_numbers(detections: Sequence[Detection], wanted: Wanted) -> Judgment:
    """The rule on detections in the frame, best first: half for each object that is there, half for its number."""
    kept = without_doubles(detections)
    score, details = 0.0, []
    for name, number in wanted:
        found = count(kept, name)
        score += (0.5 * (found > 0) + 0.5 * (found == number)) / len(wanted)
        details.append({"name": name, "wanted": number, "found": found})
    return Judgment(score, details)


class NumeracyJudge:
    """Numeracy: the objects that a prompt names, each in its number."""

    def __init__(self, detector: PromptedDetector) -> None:
        self.detector = detector

    def judge(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[Judgment]:
        """One judgment for each image and the objects wanted in it; none wanted scores 0."""
        names = [tuple(dict.fromkeys(name for name, _ in objects)) for objects in wanted]
        found = self.detector.detect_named(images, names)
        return [
            judge_numbers(framed(detections, *image.shape[:2]), objects)
            for image, detections, objects in zip(images, found, wanted, strict=True)
        ]
