"""T2I-CompBench over any models that keep the evaluators' promises: each image goes to its category's judge."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.base import (
    DepthEstimator,
    Language,
    PromptedDetector,
    QuestionAnswerer,
    Score,
    image_fault,
)
from evaluators.compbench.attributes import AttributeJudge
from evaluators.compbench.categories import ATTRIBUTES, CATEGORIES, COMPLEX, NUMERACY
from evaluators.compbench.complex import PARTS, ComplexJudge
from evaluators.compbench.judgment import Judgment
from evaluators.compbench.non_spatial import ClipScoreJudge
from evaluators.compbench.numeracy import NumeracyJudge
from evaluators.compbench.spatial import DepthJudge, SpatialJudge
from evaluators.detector_check import SANITY_NAMES, DetectorRecord, sanity_image
from evaluators.inference import fingerprint
from evaluators.modes import CORRECTIONS, Mode

if TYPE_CHECKING:
    from evaluators.clip import ClipModel

PROTOCOL = "t2i-compbench"

Metadata = Mapping[str, Any]
Judge = Callable[[Sequence[np.ndarray], Sequence[Metadata]], list[Judgment]]


def check_metadata(metadata: Metadata) -> None:
    """ValueError for metadata by which no image could be judged."""
    category = metadata.get("category")
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}: must be one of {', '.join(CATEGORIES)}")
    if not isinstance(metadata.get("prompt"), str):
        raise ValueError("metadata must have the prompt")
    if category == NUMERACY:
        objects = metadata.get("objects")
        if not isinstance(objects, list) or not all(_is_wanted(one) for one in objects):
            raise ValueError(f"numeracy needs objects [[name, number], ...], not {objects!r}")
    if category == COMPLEX and metadata.get("kind") not in PARTS:
        raise ValueError(f"complex needs a kind of {', '.join(PARTS)}, not {metadata.get('kind')!r}")


def _is_wanted(one: object) -> bool:
    return isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], int)


class CompBenchEvaluator:
    """All eight categories. The score is the category's own, not right or wrong."""

    def __init__(
        self,
        *,
        answerer: QuestionAnswerer,
        detector: PromptedDetector,
        depth: DepthEstimator,
        clip: "ClipModel",
        language: Language,
        mode: Mode,
    ) -> None:
        self.detector = detector
        attributes = AttributeJudge(answerer, language, mode)
        spatial = SpatialJudge(detector, language, mode)
        in_depth = DepthJudge(detector, depth, language, mode)
        numeracy, clip_score = NumeracyJudge(detector), ClipScoreJudge(clip)
        composed = ComplexJudge(attributes, spatial.score_relations, clip_score, language)
        self._judges: dict[str, Judge] = {
            **dict.fromkeys(ATTRIBUTES, _of_prompts(attributes.judge)),
            "spatial": _of_prompts(spatial.judge),
            "3d_spatial": _of_prompts(in_depth.judge),
            NUMERACY: lambda images, about: numeracy.judge(images, [one["objects"] for one in about]),
            "non_spatial": _of_prompts(clip_score.judge),
            COMPLEX: lambda images, about: composed.judge(
                images, [one["prompt"] for one in about], [one["kind"] for one in about]
            ),
        }
        parts = (answerer, detector, depth, clip, language)
        rules = f"{mode} {CORRECTIONS}" if mode == "corrected" else mode
        self.fingerprint = fingerprint(PROTOCOL, rules, *(part.fingerprint for part in parts))
        self._reason = f"{mode}, {language.name}"

    def self_test(self, device: str) -> DetectorRecord:
        """What the detector sees in the sanity image on this device."""
        seen = self.detector.detect_faint(sanity_image(), SANITY_NAMES)
        return DetectorRecord.of(self.detector.fingerprint, device, seen)

    def score(self, images: Sequence[np.ndarray], metadata: Sequence[Metadata]) -> list[Score]:
        """One score for each image; `reason` says which mode and which language tool judged it.

        What is not an image, or has metadata that make no sense, gets an error.
        """
        scores: list[Score | None] = [None] * len(images)
        by_category: dict[str, list[int]] = defaultdict(list)
        for index, (image, about) in enumerate(zip(images, metadata, strict=True)):
            if fault := image_fault(image) or _fault(about):
                scores[index] = Score.failed(fault)
            else:
                by_category[about["category"]].append(index)
        for category, indices in by_category.items():
            judged = self._judges[category]([images[i] for i in indices], [metadata[i] for i in indices])
            for index, judgment in zip(indices, judged, strict=True):
                scores[index] = Score(judgment.score, None, self._reason, judgment.details)
        return [score for score in scores if score is not None]


def _of_prompts(judge: Callable[[Sequence[np.ndarray], Sequence[str]], list[Judgment]]) -> Judge:
    return lambda images, about: judge(images, [one["prompt"] for one in about])


def _fault(metadata: Metadata) -> str | None:
    try:
        check_metadata(metadata)
    except ValueError as fault:
        return str(fault)
    return None
