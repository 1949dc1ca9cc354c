"""What detectors, colour classifiers and evaluators promise each other, and the plain data that they exchange.

Images are uint8 RGB arrays [H, W, 3]. Boxes are (x1, y1, x2, y2) in pixels, x2 and y2 just past the last pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in an image: its class, its confidence in [0, 1], its extent, its mask (bool [H, W])."""

    label: str
    score: float
    box: Box
    mask: np.ndarray

    def as_json(self, color: str | None = None) -> dict[str, Any]:
        """The detection as a result row keeps it: score to 4 decimals, box to 1, the colour where one was asked for."""
        row = {"label": self.label, "score": round(self.score, 4), "box": [round(edge, 1) for edge in self.box]}
        return row if color is None else {**row, "color": color}


@dataclass(frozen=True)
class Score:
    """What one image got: a score and what was seen, or the error that kept it from being scored."""

    score: float | None
    correct: bool | None
    reason: str
    detections: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> "Score":
        return cls(score=None, correct=None, reason="", error=error)


class Detector(Protocol):
    """Finds objects. `fingerprint` names the weights and the settings that its results depend on."""

    labels: tuple[str, ...]
    fingerprint: str

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Each image's detections, best first. Raises ValueError for an image that `image_fault` finds fault with."""
        ...


class ColorClassifier(Protocol):
    """Names the colour of detected objects."""

    fingerprint: str

    def classify(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str]:
        """A colour name for each detection of this image."""
        ...


class Evaluator(Protocol):
    """Scores images of one benchmark. An image that cannot be scored gets `Score.failed`, never an exception.

    Exceptions are left to what is no image's fault: a device that fails or runs out of memory.
    """

    fingerprint: str

    def score(self, images: Sequence[np.ndarray], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each image, in order; `metadata` is the benchmark's own record of each image's prompt."""
        ...


def image_fault(image: object) -> str | None:
    """Why `image` is not an image that can be scored, or None."""
    if not isinstance(image, np.ndarray):
        return f"an image must be a numpy array, got {type(image).__name__}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        return f"an image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
    return None
