"""The detector's self-test: what it sees in a known image, and whether that is what it saw before.

Confidences have silently differed between GPU types. So a detector's record is taken before it scores anything, kept
at its first run, and every later one is compared with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from evaluators.base import Box, Detection

EDGE = 128  # pixels of the image's sides
SANITY_NAMES = ("circle", "square", "triangle", "cross")  # what a detector that is asked by name is asked for
KEPT = 20  # the best candidates, however faint: so a record is never empty
CONFIDENT = 0.3  # objects above this must be the same ones; below it only the scores must
SCORE_TOLERANCE = 0.01
BOX_TOLERANCE = 2.0  # pixels, each edge


@dataclass(frozen=True)
class Seen:
    """One detection of a record: label, score to 4 decimals, box to 1."""

    label: str
    score: float
    box: Box


@dataclass(frozen=True)
class DetectorRecord:
    """What the detector `fingerprint` saw in the sanity image on `device` (a GPU's name, or cpu), best first."""

    fingerprint: str
    device: str
    torch: str
    seen: tuple[Seen, ...]

    @classmethod
    def of(cls, fingerprint: str, device: str, detections: Sequence[Detection]) -> "DetectorRecord":
        """Of a detector's detections in `sanity_image()`, best first."""
        return cls.from_json(
            {
                "fingerprint": fingerprint,
                "device": device,
                "torch": torch.__version__,
                "seen": [detection.as_json() for detection in detections[:KEPT]],
            }
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DetectorRecord":
        """Raises ValueError, KeyError or TypeError for what `as_json` did not give."""
        seen = []
        for one in record["seen"]:
            x1, y1, x2, y2 = map(float, one["box"])
            seen.append(Seen(str(one["label"]), float(one["score"]), (x1, y1, x2, y2)))
        return cls(str(record["fingerprint"]), str(record["device"]), str(record["torch"]), tuple(seen))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@runtime_checkable
class SelfTesting(Protocol):
    """An evaluator whose scores rest on a detector."""

    def self_test(self, device: str) -> DetectorRecord:
        """What its detector sees in the sanity image on `device`, a GPU's name or cpu."""
        ...


def sanity_image() -> np.ndarray:
    """Four flat shapes on a light ground, uint8 RGB [128, 128, 3]: objects of the mini world, and things to others.

    Drawn by formulas, since a drawing library's next version may set other pixels.
    """
    y, x = np.mgrid[:EDGE, :EDGE]
    shapes = (
        ((219, 26, 31), (x - 32) ** 2 + (y - 34) ** 2 < 20**2),
        ((31, 77, 219), (abs(x - 93) < 18) & (abs(y - 34) < 18)),
        ((36, 158, 51), (y > 74) & (y < 112) & (abs(x - 32) < (y - 74) * 0.58)),
        ((18, 18, 18), ((abs(x - 93) < 8) & (abs(y - 92) < 22)) | ((abs(x - 93) < 22) & (abs(y - 92) < 8))),
    )
    image = np.full((EDGE, EDGE, 3), (225, 228, 230), np.uint8)
    for color, inside in shapes:
        image[inside] = color
    return image


def differences(recorded: DetectorRecord, now: DetectorRecord) -> list[str]:
    """In what the two differ by more than the tolerances, one line each, the largest shift of a score first.

    Two faint candidates may change places, so the scores are compared by rank; objects above `CONFIDENT` must have a
    counterpart of the same label, score and box in the other record.
    """
    nothing = Seen("nothing", 0.0, (0.0, 0.0, 0.0, 0.0))
    pairs = list(zip_longest(recorded.seen, now.seen, fillvalue=nothing))
    shifted = [(was, new) for was, new in pairs if abs(was.score - new.score) > SCORE_TOLERANCE]
    shifted.sort(key=lambda pair: -abs(pair[0].score - pair[1].score))
    found = [f"{was.label} {was.score:.3f} became {new.label} {new.score:.3f}" for was, new in shifted]
    found += [f"{_told(one)} is gone" for one in _without_counterpart(recorded.seen, now.seen)]
    found += [f"{_told(one)} is new" for one in _without_counterpart(now.seen, recorded.seen)]
    return found


def _without_counterpart(ours: Sequence[Seen], theirs: Sequence[Seen]) -> list[Seen]:
    """Our confident detections that theirs lack, each of theirs being one of ours at most."""
    left = list(theirs)
    lacking = []
    for one in ours:
        if one.score <= CONFIDENT:
            continue
        counterpart = next((other for other in left if _same(one, other)), None)
        if counterpart is None:
            lacking.append(one)
        else:
            left.remove(counterpart)
    return lacking


def _same(one: Seen, other: Seen) -> bool:
    return (
        one.label == other.label
        and abs(one.score - other.score) <= SCORE_TOLERANCE
        and all(abs(a - b) <= BOX_TOLERANCE for a, b in zip(one.box, other.box, strict=True))
    )


def _told(one: Seen) -> str:
    return f"{one.label} {one.score:.3f} at {[round(edge) for edge in one.box]}"
