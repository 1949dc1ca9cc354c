"""What places, depth and numbers share: the frame that boxes are judged in, thresholds, overlaps, names of objects.

Upstream's detector, UniDet, sees an image of at most 479 by 480 pixels, and its boxes stay there: the rules' constants
in pixels mean that frame.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torchvision.ops import batched_nms

from evaluators.base import Box, Detection, Language

SHORT_SIDE, LONG_SIDE = 479, 480
SCORE_THRESHOLD = 0.1  # the one in force upstream; the configured 0.5 is overridden there
NMS_IOU = 0.5
MOST_OBJECTS = 300
NOUNS = ("NOUN",)
PEOPLE = {"girl": "person", "boy": "person", "man": "person", "woman": "person"}


def frame_scale(height: int, width: int) -> tuple[float, float]:
    """Horizontal and vertical factors from an image's pixels to the frame's: short side 479, the long one at most 480.

    1024x1024 becomes 479x479.
    """
    scale = SHORT_SIDE / min(height, width)
    scale = min(scale, LONG_SIDE / max(height, width))
    return max(1, int(width * scale + 0.5)) / width, max(1, int(height * scale + 0.5)) / height


def framed(detections: Sequence[Detection], height: int, width: int) -> list[Detection]:
    """The detections of an image of that size that count, best first, with their boxes in the frame.

    Those above the threshold, of each class without those that overlap a better one, at most 300.
    """
    found = sorted((one for one in detections if one.score > SCORE_THRESHOLD), key=lambda one: -one.score)
    if not found:
        return []
    x_scale, y_scale = frame_scale(height, width)
    boxes = [(x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale) for x1, y1, x2, y2 in (o.box for o in found)]
    labels = {label: index for index, label in enumerate(dict.fromkeys(one.label for one in found))}
    kept = batched_nms(
        torch.tensor(boxes, dtype=torch.float64),
        torch.tensor([one.score for one in found], dtype=torch.float64),
        torch.tensor([labels[one.label] for one in found]),
        NMS_IOU,
    )
    return [replace(found[i], box=boxes[i]) for i in kept.tolist()[:MOST_OBJECTS]]


def overlap(one: Box, other: Box, pixel: float = 0.0) -> float:
    """Area that two boxes share, in squared pixels; `pixel` is added to every width and height."""
    width = min(one[2], other[2]) - max(one[0], other[0]) + pixel
    height = min(one[3], other[3]) - max(one[1], other[1]) + pixel
    return max(width, 0.0) * max(height, 0.0)


def area(box: Box, pixel: float = 0.0) -> float:
    """A box's area in squared pixels."""
    return (box[2] - box[0] + pixel) * (box[3] - box[1] + pixel)


def iou(one: Box, other: Box, pixel: float = 0.0) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    shared = overlap(one, other, pixel)
    union = area(one, pixel) + area(other, pixel) - shared
    return shared / union if union > 0 else 0.0


def person_or(name: str) -> str:
    """What the detector calls an object of this name."""
    return PEOPLE.get(name, name)


def first_and_last_noun(prompt: str, language: Language) -> tuple[str, str] | None:
    """The objects of a prompt about places; None for a prompt without a noun."""
    nouns = [word.text.lower() for word in language.words(prompt) if word.tag in NOUNS]
    return (person_or(nouns[0]), person_or(nouns[-1])) if nouns else None


def as_detail(role: str, name: str, found: Detection | None) -> dict[str, object]:
    """One object in the results: what it was asked for as, and where it was found, if it was."""
    detail: dict[str, object] = {"object": role, "name": name}
    return detail if found is None else {**detail, **found.as_json()}
