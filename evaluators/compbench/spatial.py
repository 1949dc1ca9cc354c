"""Places: T2I-CompBench's 2D-spatial and 3D-spatial rules, on the boxes of a detector and a depth map.

Modes: `compatible` keeps upstream's rules, quirks included, on detectors that find what they are asked for by name;
`corrected` repairs four quirks: "on top of" has no rule upstream, its depth map is read with x and y swapped, boxes
keep the proportions of the image where the depth map is a square that it was stretched to, and an object's depth is its
box's mean, so that what a ring's box holds beside the ring counts too: where the detector gives masks, they say which
pixels are the object's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluators.base import Box, DepthEstimator, Detection, Language, PromptedDetector
from evaluators.compbench.judgment import Judgment
from evaluators.compbench.objects import as_detail, first_and_last_noun, frame_scale, framed, iou, person_or
from evaluators.modes import Mode

Direction = Literal["near", "left", "right", "top", "bottom"]

# What a prompt says, in the order in which upstream looks for it, and the rule that it means.
RELATIONS: dict[str, Direction] = {
    "on side of": "near",
    "next to": "near",
    "near": "near",
    "on the left of": "left",
    "on the right of": "right",
    "on the bottom of": "bottom",
    "on the top of": "top",
}
# The words of a complex prompt differ a little.
COMPLEX_RELATIONS: dict[str, Direction] = {
    "on bottom of": "bottom",
    "on the left": "left",
    "on the right": "right",
    "next to": "near",
    "on side of": "near",
    "near": "near",
}
ON_TOP_OF = "on top of"  # the quirk: known as a relation, without a rule

NEAR = 150.0  # pixels of the frame
OVERLAPPING = 0.1  # IoU above which a direction counts less
PASSES = 0.5  # what scores less in the plane scores nothing
DEPTH_OVERLAP = 0.5  # IoU from which one object lies fully in front of the other
IN_FRONT = "in front of"
BEHIND = ("behind", "hidden")
DEPTH_SIDE = 480  # upstream's depth maps: the frame's coordinates are read there as they are


@dataclass(frozen=True)
class Relation:
    """Two objects by name and how the first one is to lie to the second; `direction` None where no rule is known."""

    first: str
    second: str
    direction: Direction | None


def relation_of(prompt: str, mode: Mode) -> Direction | None:
    """The rule that a prompt of 2D-spatial is judged by: that of the first relation that it contains."""
    for words, direction in RELATIONS.items():
        if words in prompt:
            return direction
    return "top" if mode == "corrected" and ON_TOP_OF in prompt else None


def complex_relation(words: str, mode: Mode) -> Direction | None:
    """The rule of a complex prompt's preposition."""
    if words == ON_TOP_OF:
        return "top" if mode == "corrected" else None
    return COMPLEX_RELATIONS[words]


def position_score(first: Box, second: Box, direction: Direction | None) -> float:
    """How well two boxes of the frame lie as asked, in [0, 1]."""
    dx = (second[0] + second[2] - first[0] - first[2]) / 2
    dy = (second[1] + second[3] - first[1] - first[3]) / 2
    if direction is None:
        return 0.0
    if direction == "near":
        return 1.0 if min(abs(dx), abs(dy)) < NEAR else NEAR / max(abs(dx), abs(dy))
    along, across = (dx, dy) if direction in ("left", "right") else (dy, dx)
    forward = along if direction in ("left", "top") else -along
    if forward <= 0 or abs(along) <= abs(across):
        return 0.0
    shared = iou(first, second)
    return 1.0 if shared < OVERLAPPING else OVERLAPPING / shared


def depth_score(first: Box, second: Box, nearness: float) -> float:
    """How well two boxes overlap where the depths are as asked, by `nearness` above 0; else nothing."""
    if nearness <= 0:
        return 0.0
    shared = iou(first, second)
    if shared > DEPTH_OVERLAP:
        return 1.0
    return shared / DEPTH_OVERLAP if 0 < shared < DEPTH_OVERLAP else 0.0


def mean_depth(depth_HW: np.ndarray, box: Box, mode: Mode, image_size: tuple[int, int]) -> float:
    """Mean of a depth map inside a box of the frame; 0 where the box holds no pixel of it.

    `image_size` is the image's (height, width): `corrected` scales the frame's sides to the depth map's each by itself.
    """
    height, width = depth_HW.shape
    frame_width = frame_height = float(DEPTH_SIDE)
    if mode == "corrected":
        x_scale, y_scale = frame_scale(*image_size)
        frame_height, frame_width = image_size[0] * y_scale, image_size[1] * x_scale
    x1, x2 = (int(edge * width / frame_width) for edge in (box[0], box[2]))
    y1, y2 = (int(edge * height / frame_height) for edge in (box[1], box[3]))
    part = depth_HW[y1:y2, x1:x2] if mode == "corrected" else depth_HW[x1:x2, y1:y2]
    return float(part.mean()) if part.size else 0.0


def object_depth(depth_HW: np.ndarray, found: Detection, mode: Mode, image_size: tuple[int, int]) -> float:
    """Mean of a depth map over an object of the frame: over its mask's pixels in `corrected`, or those of its box.

    The mask is of the image, whose (height, width) is `image_size`; each pixel of the map looks up the nearest of it.
    """
    if mode == "corrected" and found.mask is not None:
        rows, columns = (
            (2 * np.arange(side) + 1) * length // (2 * side)
            for side, length in zip(depth_HW.shape, found.mask.shape, strict=True)
        )
        inside_HW = found.mask[np.ix_(rows, columns)]
        if inside_HW.any():
            return float(depth_HW[inside_HW].mean())
    return mean_depth(depth_HW, found.box, mode, image_size)


def combined(first: Detection | None, second: Detection | None, position: float) -> float:
    """A quarter of each found object's confidence, and half of their position where both are found."""
    confidence = 0.25 * sum(one.score for one in (first, second) if one is not None)
    return confidence + 0.5 * position if first is not None and second is not None else confidence


def best_of_label(detections: Sequence[Detection], name: str) -> Detection | None:
    """The most confident detection with exactly this label."""
    return next((one for one in detections if one.label == name), None)


def scanned(detections: Sequence[Detection], first: str, second: str) -> tuple[Detection | None, Detection | None]:
    """Both objects as upstream's 3D rule finds them, best detections first.

    A quirk: each object is overwritten by every further detection of it, until both have been seen.
    """
    found: dict[str, Detection] = {}
    for one in detections:
        found |= {name: one for name in (first, second) if name in one.label}
        if first in found and second in found:
            break
    return found.get(first), found.get(second)


class SpatialJudge:
    """2D-spatial: two objects in the plane."""

    def __init__(self, detector: PromptedDetector, language: Language, mode: Mode = "compatible") -> None:
        self.detector = detector
        self.language = language
        self.mode: Mode = mode

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        """One judgment for each image; a prompt without a noun scores 0, as nothing of it can be found."""
        relations = []
        for prompt in prompts:
            names = first_and_last_noun(prompt, self.language)
            relations.append(Relation(*names, relation_of(prompt, self.mode)) if names else None)
        return self._judge(images, relations)

    def score_relations(
        self, images: Sequence[np.ndarray], triples: Sequence[tuple[str, str, str] | None]
    ) -> list[Judgment]:
        """The part of a complex prompt: object, preposition and object of each image; None, no such pair, scores 0."""
        relations = [
            triple and Relation(person_or(triple[0]), person_or(triple[2]), complex_relation(triple[1], self.mode))
            for triple in triples
        ]
        return self._judge(images, relations)

    def _judge(self, images: Sequence[np.ndarray], relations: Sequence[Relation | None]) -> list[Judgment]:
        asked = [index for index, relation in enumerate(relations) if relation is not None]
        wanted = [relation for relation in relations if relation is not None]
        names = [tuple(dict.fromkeys((one.first, one.second))) for one in wanted]
        found = self.detector.detect_named([images[index] for index in asked], names) if asked else []
        judgments = [Judgment(0.0) for _ in images]
        for index, relation, detections in zip(asked, wanted, found, strict=True):
            kept = framed(detections, *images[index].shape[:2])
            judgments[index] = judge_places(kept, relation)
        return judgments


def judge_places(detections: Sequence[Detection], relation: Relation) -> Judgment:
    """The 2D rule on detections in the frame, best first."""
    first, second = (best_of_label(detections, name) for name in (relation.first, relation.second))
    position = position_score(first.box, second.box, relation.direction) if first and second else 0.0
    score = combined(first, second, position)
    details = [as_detail("first", relation.first, first), as_detail("second", relation.second, second)]
    return Judgment(
        score if score >= PASSES else 0.0, [*details, {"relation": relation.direction, "position": round(position, 4)}]
    )


class DepthJudge:
    """3D-spatial: one object in front of or behind another."""

    def __init__(
        self, detector: PromptedDetector, depth: DepthEstimator, language: Language, mode: Mode = "compatible"
    ) -> None:
        self.detector = detector
        self.depth = depth
        self.language = language
        self.mode: Mode = mode

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        """One judgment for each image; a prompt without a noun scores 0."""
        pairs = [first_and_last_noun(prompt, self.language) for prompt in prompts]
        asked = [index for index, pair in enumerate(pairs) if pair is not None]
        wanted = [pair for pair in pairs if pair is not None]
        chosen = [images[index] for index in asked]
        found = self.detector.detect_named(chosen, [tuple(dict.fromkeys(pair)) for pair in wanted]) if asked else []
        depths = self.depth.depth(chosen) if asked else []
        judgments = [Judgment(0.0) for _ in images]
        for index, pair, detections, depth_HW in zip(asked, wanted, found, depths, strict=True):
            size = images[index].shape[:2]
            kept = framed(detections, *size)
            judgments[index] = judge_depth(kept, depth_HW, pair, prompts[index], self.mode, size)
        return judgments


def judge_depth(
    detections: Sequence[Detection],
    depth_HW: np.ndarray,
    pair: tuple[str, str],
    prompt: str,
    mode: Mode,
    image_size: tuple[int, int],
) -> Judgment:
    """The 3D rule on detections in the frame of an image of (height, width), best first, and a depth map, larger =
    nearer.
    """
    first, second = scanned(detections, *pair)
    position = 0.0
    details = [as_detail("first", pair[0], first), as_detail("second", pair[1], second)]
    if first and second:
        near_first, near_second = (object_depth(depth_HW, one, mode, image_size) for one in (first, second))
        nearness = _nearness(prompt, near_first - near_second)
        position = depth_score(first.box, second.box, nearness)
        details.append({"depths": [round(near_first, 1), round(near_second, 1)], "position": round(position, 4)})
    return Judgment(combined(first, second, position), details)


def _nearness(prompt: str, difference: float) -> float:
    """By how much the depths satisfy the prompt; 0 for a prompt that names no relation in depth."""
    if IN_FRONT in prompt:
        return difference
    return -difference if any(word in prompt for word in BEHIND) else 0.0
