"""GenEval: an image is right when a detector finds in it what the prompt asks for, by the official rules.

Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment". An image scores
1 or 0; a tag's score is the mean over its images, the overall score the unweighted mean of the tags' (statistics.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluators.base import ColorClassifier, Detection, Detector, Score, image_fault
from evaluators.detector_check import DetectorRecord, sanity_image
from evaluators.inference import fingerprint

PROTOCOL = "geneval official"
THRESHOLD = 0.3  # a detection counts when its score is above this ...
COUNTING_THRESHOLD = 0.9  # ... and in the counting task above this
MAX_OBJECTS = 16  # the best 16 of a class count; NMS is off (`max_overlap` 1.0)
POSITION_THRESHOLD = 0.1  # the share of the summed sizes that an offset must exceed
DIRECTION_THRESHOLD = 0.5  # the share of the offset's length that makes it point along an axis
NO_OFFSET = 1e-3  # pixels: revised offsets under this on both axes mean no relation
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Objects = Mapping[str, Sequence[Detection]]
ColorsOf = Callable[[Sequence[Detection]], list[str]]


@dataclass(frozen=True)
class Group:
    """What the prompt wants of one class; `position` is (relation, index of the earlier group that it relates to)."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Question:
    """A prompt's GenEval metadata, checked."""

    tag: str
    include: tuple[Group, ...]
    exclude: tuple[Group, ...]

    @classmethod
    def parse(cls, metadata: Mapping[str, Any], labels: Sequence[str]) -> "Question":
        """Raises ValueError for metadata that is incomplete or names what cannot be found by these `labels`."""
        include = tuple(_group(item, index, labels) for index, item in enumerate(metadata.get("include", ())))
        exclude = tuple(_group(item, 0, labels) for item in metadata.get("exclude", ()))
        if not include or "tag" not in metadata:
            raise ValueError("metadata must have a tag and at least one class to include")
        return cls(metadata["tag"], include, exclude)


def _group(item: Mapping[str, Any], index: int, labels: Sequence[str]) -> Group:
    label, count = str(item.get("class")), item.get("count")
    if label not in labels:
        raise ValueError(f"metadata names the class {label!r}, which the detector does not know")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"metadata asks for {count!r} of {label}: a count must be a whole number of at least 1")
    color = item.get("color")
    if color is not None and color not in COLORS:
        raise ValueError(f"metadata names the color {color!r}; known are {', '.join(COLORS)}")
    if item.get("position") is None:
        return Group(label, count, color)
    relation, target = item["position"]
    if relation not in RELATIONS or target not in range(index):
        raise ValueError(f"metadata asks for {relation!r} of group {target!r}: not a relation to an earlier group")
    return Group(label, count, color, (relation, target))


def confident_objects(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count in this task, by class and best first, at most 16 a class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda found: -found.score):
        if detection.score > threshold:
            objects.setdefault(detection.label, []).append(detection)
    return {label: same[:MAX_OBJECTS] for label, same in objects.items()}


def relations(found: Detection, target: Detection) -> set[str]:
    """How `found` lies to `target`: none, one or two of `RELATIONS`, from the boxes' centres and sizes."""
    found_2X, target_2X = (np.array(each.box).reshape(2, 2) for each in (found, target))
    offset_X = found_2X.mean(axis=0) - target_2X.mean(axis=0)
    size_X = np.abs(found_2X[1] - found_2X[0]) + np.abs(target_2X[1] - target_2X[0])
    revised_X = np.maximum(np.abs(offset_X) - POSITION_THRESHOLD * size_X, 0) * np.sign(offset_X)
    if (np.abs(revised_X) < NO_OFFSET).all():
        return set()
    # The norm is the un-revised offset's, so near the sizes' share even a straight offset can fall under the threshold.
    dx, dy = revised_X / np.linalg.norm(offset_X)
    holds = (
        dx < -DIRECTION_THRESHOLD,
        dx > DIRECTION_THRESHOLD,
        dy < -DIRECTION_THRESHOLD,
        dy > DIRECTION_THRESHOLD,
    )
    return {relation for relation, held in zip(RELATIONS, holds, strict=True) if held}


def judge(objects: Objects, question: Question, colors_of: ColorsOf) -> list[str]:
    """Why the image is wrong, one line a fault; an empty list means that it is right."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # None: the group failed, so nothing can lie relative to it
    for wanted in question.include:
        found = objects.get(wanted.label, [])[: wanted.count]
        fault = _missing(wanted, found) or _miscolored(wanted, found, colors_of) or _misplaced(wanted, found, groups)
        groups.append(None if fault else found)
        if fault:
            reasons.append(fault)
    for unwanted in question.exclude:
        count = len(objects.get(unwanted.label, []))
        if count >= unwanted.count:
            reasons.append(f"expected {unwanted.label}<{unwanted.count}, found {count}")
    return reasons


def _missing(wanted: Group, found: Sequence[Detection]) -> str | None:
    if len(found) >= wanted.count:
        return None
    return f"expected {wanted.label}>={wanted.count}, found {len(found)}"


def _miscolored(wanted: Group, found: Sequence[Detection], colors_of: ColorsOf) -> str | None:
    """Colour is asked of the best `count` detections alone: a right one that comes after them does not help."""
    if wanted.color is None:
        return None
    colors = colors_of(found)
    if colors.count(wanted.color) >= wanted.count:
        return None
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return f"expected {wanted.color} {wanted.label}>={wanted.count}, found {seen}"


def _misplaced(wanted: Group, found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]) -> str | None:
    """Every pair of a found object and a target must satisfy the relation."""
    if wanted.position is None:
        return None
    relation, index = wanted.position
    targets = groups[index]
    if targets is None:
        return f"no target for {wanted.label} to be {relation}"
    for one in found:
        for target in targets:
            held = relations(one, target)
            if relation not in held:
                seen = " and ".join(sorted(held)) or "no relation to"
                return f"expected {wanted.label} {relation} target, found {seen} target"
    return None


class GenEvalEvaluator:
    """GenEval over any detector and colour classifier: the full-size ones and the mini world's alike."""

    def __init__(self, detector: Detector, colors: ColorClassifier) -> None:
        self.detector = detector
        self.colors = colors
        self.fingerprint = fingerprint(PROTOCOL, detector.fingerprint, colors.fingerprint)

    def self_test(self, device: str) -> DetectorRecord:
        """What the detector sees in the sanity image on this device."""
        return DetectorRecord.of(self.detector.fingerprint, device, self.detector.detect_faint(sanity_image()))

    def score(self, images: Sequence[np.ndarray], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each image; what is not an image, or has metadata that make no sense, gets an error."""
        faults = [image_fault(image) for image in images]
        detected = iter(self.detector.detect([i for i, fault in zip(images, faults, strict=True) if fault is None]))
        return [
            self._score_one(image, next(detected), about) if fault is None else Score.failed(fault)
            for image, about, fault in zip(images, metadata, faults, strict=True)
        ]

    def _score_one(self, image: np.ndarray, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> Score:
        try:
            question = Question.parse(metadata, self.detector.labels)
        except (ValueError, TypeError, AttributeError) as fault:
            return Score.failed(str(fault))
        seen: dict[int, str] = {}  # id of a detection -> the colour that the classifier saw

        def colors_of(found: Sequence[Detection]) -> list[str]:
            colors = self.colors.classify(image, found)
            seen.update(zip(map(id, found), colors, strict=True))
            return colors

        objects = confident_objects(detections, question.tag)
        reasons = judge(objects, question, colors_of)
        kept = sorted((one for same in objects.values() for one in same), key=lambda found: -found.score)
        return Score(
            score=0.0 if reasons else 1.0,
            correct=not reasons,
            reason="; ".join(reasons),
            detections=[one.as_json(seen.get(id(one))) for one in kept],
        )
