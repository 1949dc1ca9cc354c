"""What models that look at images, evaluators and language tools promise each other, and the plain data they exchange.

Images are uint8 RGB arrays [H, W, 3]. Boxes are (x1, y1, x2, y2) in pixels, x2 and y2 just past the last pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in an image: its class, its confidence in [0, 1], its extent, its mask (bool [H, W]).

    `mask` is None where the detector finds boxes alone.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = None

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


@dataclass(frozen=True)
class NoImage:
    """Stands where an image should be that cannot be had, and says why."""

    reason: str


class Detector(Protocol):
    """Finds objects of the classes in `labels`. `fingerprint` names the weights and settings its results depend on."""

    labels: tuple[str, ...]
    fingerprint: str

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Each image's detections, best first. Raises ValueError for an image that `image_fault` finds fault with."""
        ...

    def detect_faint(self, image: np.ndarray) -> list[Detection]:
        """All candidates in one image, best first, those included that `detect` leaves out for their low score."""
        ...


class PromptedDetector(Protocol):
    """Finds the objects that it is asked for by name, or those of its own classes that a name means."""

    fingerprint: str

    def detect_named(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's detections of its own `names`, best first, labelled as asked. ValueError as for a Detector."""
        ...

    def detect_faint(self, image: np.ndarray, names: Sequence[str]) -> list[Detection]:
        """Candidates in one image that is asked for these names, best first, those of low score included."""
        ...


class QuestionAnswerer(Protocol):
    """Answers yes-or-no questions about images."""

    fingerprint: str

    def probability_of_yes(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) in [0, 1] for each image and its own question, in order."""
        ...


class DepthEstimator(Protocol):
    """Says how near each pixel is."""

    fingerprint: str

    def depth(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Relative depth of each image, uint8 [H, W] in the model's own frame, larger = nearer, 0 to 255 an image."""
        ...


@dataclass(frozen=True)
class Word:
    """A word of a prompt and its part of speech: NOUN, PROPN, ADJ, NUM, ADP, DET, or another of the universal tags."""

    text: str
    tag: str


class Language(Protocol):
    """Takes prompts apart. `name` says in results which tool did: it decides what is asked about an image."""

    name: str
    fingerprint: str

    def words(self, text: str) -> list[Word]:
        """The words and punctuation marks of a text, in order."""
        ...

    def noun_chunks(self, text: str) -> list[str]:
        """Its noun phrases without what follows the noun ("a red apple", "the table"), in order, as they stand."""
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
    if isinstance(image, NoImage):
        return image.reason
    if not isinstance(image, np.ndarray):
        return f"an image must be a numpy array, got {type(image).__name__}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        return f"an image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
    return None
