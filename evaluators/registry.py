"""Which evaluator scores which benchmark."""

from collections.abc import Callable, Mapping
from pathlib import Path

from bitflux_core.errors import UserError
from evaluators.base import Evaluator
from evaluators.clip import ClipColorClassifier, ClipModel
from evaluators.geneval import THRESHOLD, GenEvalEvaluator
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.mask2former import Mask2FormerDetector

Models = Mapping[str, str | Path]
Builder = Callable[[Models, str, int], Evaluator]


def _geneval(labels: tuple[str, ...] | None) -> Builder:
    """GenEval over a detector whose classes are called `labels`, or what its own configuration calls them."""

    def build(models: Models, device: str, batch_size: int) -> Evaluator:
        detector = Mask2FormerDetector(
            models["detector"], device, batch_size=batch_size, labels=labels, min_score=THRESHOLD
        )
        return GenEvalEvaluator(detector, ClipColorClassifier(ClipModel(models["clip"], device)))

    return build


EVALUATORS: dict[str, Builder] = {
    "geneval": _geneval(GENEVAL_CLASSES),
    "mini-geneval": _geneval(None),
}


def build_evaluator(benchmark: str, models: Models, device: str = "cpu", batch_size: int = 8) -> Evaluator:
    """The evaluator of `benchmark` on the folders in `models` ("detector", "clip"), loaded on `device`.

    Raises UserError for a benchmark without an evaluator and for folders that do not hold what it needs.
    """
    if benchmark not in EVALUATORS:
        raise UserError(f"no evaluator for benchmark {benchmark!r}: choose one of {', '.join(sorted(EVALUATORS))}")
    return EVALUATORS[benchmark](models, device, batch_size)
