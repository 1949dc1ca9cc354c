"""Which evaluator scores which benchmark."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitflux_core.errors import UserError
from evaluators.base import Evaluator
from evaluators.clip import ClipColorClassifier, ClipModel
from evaluators.detectors import load_detector
from evaluators.geneval import THRESHOLD, GenEvalEvaluator, Question
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.mask2former import configured_labels

Models = Mapping[str, str | Path]
Builder = Callable[[Models, str, int], Evaluator]


def _geneval(labels: tuple[str, ...] | None) -> Builder:
    """GenEval over a detector whose classes are called `labels`, or what its own configuration calls them."""

    def build(models: Models, device: str, batch_size: int) -> Evaluator:
        detector = load_detector(models["detector"], device, batch_size=batch_size, labels=labels, min_score=THRESHOLD)
        return GenEvalEvaluator(detector, ClipColorClassifier(ClipModel(models["clip"], device)))

    return build


EVALUATORS: dict[str, Builder] = {
    "geneval": _geneval(GENEVAL_CLASSES),
    "mini-geneval": _geneval(None),
}
LABELS: dict[str, tuple[str, ...] | None] = {"geneval": GENEVAL_CLASSES, "mini-geneval": None}


def check_prompts(evaluator: str, prompts: Mapping[str, Mapping[str, Any]], name: str, detector: str | Path) -> None:
    """UserError for an evaluator that there is not, and for a prompt whose metadata it could not judge an image by.

    `prompts` are metadata by text, from the list called `name`; `detector` is the folder whose classes they may name.
    """
    _check_known(evaluator)
    labels = LABELS[evaluator] or configured_labels(detector)
    for text, metadata in prompts.items():
        try:
            Question.parse(metadata, labels)
        except ValueError as error:
            raise UserError(f"{name}: prompt '{text}': {error}") from error


def build_evaluator(benchmark: str, models: Models, device: str = "cpu", batch_size: int = 8) -> Evaluator:
    """The evaluator of `benchmark` on the folders in `models` ("detector", "clip"), loaded on `device`.

    Raises UserError for a benchmark without an evaluator and for folders that do not hold what it needs.
    """
    _check_known(benchmark)
    return EVALUATORS[benchmark](models, device, batch_size)


def _check_known(evaluator: str) -> None:
    if evaluator not in EVALUATORS:
        raise UserError(f"no evaluator {evaluator!r}: choose one of {', '.join(sorted(EVALUATORS))}")
