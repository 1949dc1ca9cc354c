"""The actor that scores images and writes them."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cluster.detector_records import check_detector
from cluster.device import claim_device, device_name
from cluster.faults import poisoned_process_ends
from cluster.plan import ShardKey
from cluster.rows import ScoredImage
from cluster.store import ResultStore

if TYPE_CHECKING:
    from evaluators.base import Evaluator, NoImage


@dataclass(frozen=True)
class ImageToScore:
    """Which image of its benchmark this is, and what the evaluator needs to know of its prompt."""

    prompt_index: int
    image_index: int
    metadata: dict[str, Any]


class EvaluatorActor:
    """Holds the evaluator of each benchmark of a run."""

    def __init__(self, evaluators: Mapping[str, str], models: Mapping[str, Path | str], store: ResultStore) -> None:
        """`evaluators` maps benchmarks to names in the evaluators' registry; `models` are what those need, by role."""
        self._names = dict(evaluators)
        self._models = dict(models)
        self._store = store
        self._evaluators: dict[str, Evaluator] = {}

    def start(self) -> None:
        """Loads the models, unless they are there, and lets their detectors test themselves.

        Raises UserError for files that cannot be loaded and for a detector that sees otherwise than it once did, and
        StorageError.
        """
        from evaluators.detector_check import SelfTesting
        from evaluators.registry import build_evaluator

        if not self._evaluators:
            device = claim_device()
            built = {name: build_evaluator(name, self._models, device) for name in sorted(set(self._names.values()))}
            for evaluator in built.values():
                if isinstance(evaluator, SelfTesting):
                    check_detector(self._store.uri, evaluator.self_test(device_name(device)))
            self._evaluators = {benchmark: built[name] for benchmark, name in self._names.items()}

    def score(
        self, key: ShardKey, wanted: list[ImageToScore], images: "Sequence[np.ndarray | NoImage]"
    ) -> list[ScoredImage]:
        """Scores and writes the images of shard `key`, each uint8 [H, W, 3], one for each of `wanted`.

        Raises StorageError where an image cannot be written.
        """
        evaluator = self._evaluators[key.benchmark]
        with poisoned_process_ends():
            # What is no image goes along: evaluators answer it with an error.
            scores = evaluator.score(list(images), [image.metadata for image in wanted])  # type: ignore[arg-type]
        scored = []
        for image, score, pixels in zip(wanted, scores, images, strict=True):
            path = digest = None
            if isinstance(pixels, np.ndarray):
                digest = pixel_digest(pixels)
                path = self._store.write_image(key, image.prompt_index, image.image_index, digest, to_png(pixels))
            scored.append(
                ScoredImage(
                    score.score,
                    score.correct,
                    score.reason,
                    json.dumps(score.detections, ensure_ascii=False),
                    score.error,
                    path,
                    digest,
                    evaluator.fingerprint,
                )
            )
        return scored


def pixel_digest(pixels_HWC: np.ndarray) -> str:
    """SHA-256, in hex, of an image's shape and uint8 RGB values: the same whichever encoder wrote its file."""
    digest = hashlib.sha256(repr(pixels_HWC.shape).encode())
    digest.update(np.ascontiguousarray(pixels_HWC).tobytes())
    return digest.hexdigest()


def to_png(pixels_HWC: np.ndarray) -> bytes:
    """A PNG file of uint8 RGB values."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()
