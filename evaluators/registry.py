"""Which evaluator scores which benchmark, what it needs, and which prompts it can judge.

Networks are imported where they are built: a job asks here for roles and prompts first, and their classes take seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bitflux_core.errors import UserError
from evaluators.base import Evaluator
from evaluators.compbench.evaluator import CompBenchEvaluator, check_metadata
from evaluators.compbench.objects import SCORE_THRESHOLD
from evaluators.geneval import THRESHOLD, GenEvalEvaluator, Question
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.inference import configured_labels
from evaluators.language import language
from evaluators.modes import COMPBENCH, Mode, check_loadable

# Folders by role, and under `LANGUAGE` the name of the tool that takes prompts apart.
Models = Mapping[str, str | Path]
Metadata = Mapping[str, Any]

LANGUAGE = "language"


@dataclass(frozen=True)
class _Kind:
    """An evaluator: the roles of the models that it needs, how it is built (on a device, with a batch size), and a
    function that makes one which raises ValueError for metadata that it could not judge an image by."""

    roles: tuple[str, ...]
    build: Callable[[Models, str, int], Evaluator]
    checker: Callable[[Models], Callable[[Metadata], object]]


def _geneval(labels: tuple[str, ...] | None) -> _Kind:
    """GenEval over a detector whose classes are called `labels`, or what its own configuration calls them."""

    def build(models: Models, device: str, batch_size: int) -> Evaluator:
        from evaluators.clip import ClipColorClassifier, ClipModel
        from evaluators.detectors import load_detector

        detector = load_detector(models["detector"], device, batch_size=batch_size, labels=labels, min_score=THRESHOLD)
        return GenEvalEvaluator(detector, ClipColorClassifier(ClipModel(models["clip"], device)))

    def checker(models: Models) -> Callable[[Metadata], object]:
        known = labels or configured_labels(models["detector"])
        return lambda metadata: Question.parse(metadata, known)

    return _Kind(("detector", "clip"), build, checker)


def _compbench(mode: Mode) -> _Kind:
    def build(models: Models, device: str, batch_size: int) -> Evaluator:
        from evaluators.blip_vqa import BlipQuestionAnswerer
        from evaluators.clip import ClipModel
        from evaluators.depth import DptDepthEstimator
        from evaluators.open_vocabulary import load_named_detector

        return CompBenchEvaluator(
            answerer=BlipQuestionAnswerer(models["vqa"], device, batch_size=batch_size),
            detector=load_named_detector(models["named_detector"], device, SCORE_THRESHOLD),
            depth=DptDepthEstimator(models["depth"], device, batch_size=batch_size),
            clip=ClipModel(models["clip_score"], device, batch_size=batch_size),
            language=language(str(models[LANGUAGE])),
            mode=mode,
        )

    return _Kind(("vqa", "named_detector", "depth", "clip_score", LANGUAGE), build, lambda _: check_metadata)


def _judged(models: Models, device: str, batch_size: int) -> Evaluator:
    from evaluators.multimodal_judge import JudgeEvaluator, MultimodalModel

    return JudgeEvaluator(MultimodalModel(models["judge"], device), language(str(models[LANGUAGE])))


EVALUATORS: dict[str, _Kind] = {
    "geneval": _geneval(GENEVAL_CLASSES),
    "mini-geneval": _geneval(None),
    **{f"{COMPBENCH}-{mode}": _compbench(mode) for mode in get_args(Mode)},
    f"{COMPBENCH}-judge": _Kind(("judge", LANGUAGE), _judged, lambda _: check_metadata),
}


def roles_of(evaluator: str) -> tuple[str, ...]:
    """The roles of the models that an evaluator needs. UserError for one that there is not."""
    return _known(evaluator).roles


def check_prompts(evaluator: str, prompts: Mapping[str, Metadata], name: str, models: Models) -> None:
    """UserError for an evaluator that there is not, and for a prompt whose metadata it could not judge an image by.

    `prompts` are metadata by text, from the list called `name`.
    """
    check = _known(evaluator).checker(models)
    for text, metadata in prompts.items():
        try:
            check(metadata)
        except ValueError as error:
            raise UserError(f"{name}: prompt '{text}': {error}") from error


def build_evaluator(evaluator: str, models: Models, device: str = "cpu", batch_size: int = 8) -> Evaluator:
    """The evaluator of that name on `models`, loaded on `device`.

    Raises UserError for a name that there is not and for folders that do not hold what it needs.
    """
    return _known(evaluator).build(models, device, batch_size)


def _known(evaluator: str) -> _Kind:
    check_loadable(evaluator)
    if evaluator not in EVALUATORS:
        raise UserError(f"no evaluator {evaluator!r}: choose one of {', '.join(sorted(EVALUATORS))}")
    return EVALUATORS[evaluator]
