"""What scoring costs: milliseconds an image of each evaluator, with random weights of the models' full size.

The product's own evaluators score uint8 images, as many a call as a shard brings about, on one CPU thread, which is
what Ray leaves an evaluator; decoding and preprocessing on the CPU are in the time, files are not. Random weights would
find nothing (Mask2Former) or everything (OWLv2), so after loading the detectors' last layers are shifted until about
`OBJECTS` pass the protocol's threshold in an image. GenEval's questions ask for classes that were found, its six tags
in turn, so that colours are classified for as many crops as the real prompts want, on masks larger than real ones.
T2I-CompBench's prompts have about as many objects and noun phrases as the real ones.

Legend: B images, Q queries, C classes, P patches.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitflux_core.benchmark.rows import GB, attempt, release
from evaluators.base import Detection, Evaluator
from evaluators.blip_vqa import BlipQuestionAnswerer
from evaluators.clip import ClipColorClassifier, ClipModel
from evaluators.compbench.categories import CATEGORIES
from evaluators.compbench.evaluator import CompBenchEvaluator
from evaluators.compbench.objects import SCORE_THRESHOLD
from evaluators.depth import DptDepthEstimator
from evaluators.detectors import load_detector
from evaluators.geneval import THRESHOLD, GenEvalEvaluator
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.inference import exact_inference
from evaluators.language import language
from evaluators.mask2former import Mask2FormerDetector
from evaluators.open_vocabulary import OwlDetector
from evaluators.random_models import WRITERS, Sizes

IMAGES, CALLS = 16, 3  # images a call, and calls of which the median counts
BATCH_SIZE = 8  # evaluators/registry.py's
OBJECTS = 8  # found in an image
CALIBRATED = 4  # images that the detectors' last layers are shifted by
_SPREAD = 10.0  # standard deviation of a query's class logits: one class stands out
_OWL_SCALE = 10.0

GENEVAL, COMPBENCH, ALL = "geneval", "t2i-compbench", "all"
# Of a whole evaluation: 553 prompts of 4 images, eight categories of 300 prompts of 10 images.
GENEVAL_IMAGES, CATEGORY_IMAGES = 553 * 4, 300 * 10

_COLORS = ("a red apple and a green chair", "a brown dog and a white sofa", "a blue car, a yellow bus and a black road")
_SHAPES = ("a round clock and a square table", "an oval mirror, a tall vase and a cubic box")
_TEXTURES = ("a wooden bench and a leather bag", "a metallic lamp, a fluffy rug and a glass bowl")
_PLACES = ("a dog on the left of a chair", "a girl on the top of a horse", "a lamp next to a book", "a cat near a sofa")
_DEPTHS = ("a dog in front of a chair", "a car behind a tree", "a sheep in front of a wall", "a key hidden by a cup")
_SCENES = ("A woman is reading a book in the garden.", "A boy is throwing a ball to his dog on the beach.")
_NUMBERS: tuple[tuple[str, list[list[Any]]], ...] = (
    ("two dogs", [["dog", 2]]),
    ("three cars and one tree", [["car", 3], ["tree", 1]]),
    ("four birds, two apples and one cup", [["bird", 4], ["apple", 2], ["cup", 1]]),
    ("one chair, two lamps, three books and one cat", [["chair", 1], ["lamp", 2], ["book", 3], ["cat", 1]]),
)
# As often as among the 300 real ones: 212 of the first kind, 58, 30.
_COMPOSED = (
    *[("action", "The black phone is resting on the brown charger beside the white lamp.")] * 11,
    *[("spatial", "The fluffy cat is on the left of the soft pillow and the red book.")] * 3,
    *[("spatialaction", "The small dog is chasing the red ball near the old wooden bench.")] * 2,
)
_TEXTS: dict[str, Sequence[str]] = {
    "color": _COLORS,
    "shape": _SHAPES,
    "texture": _TEXTURES,
    "spatial": _PLACES,
    "3d_spatial": _DEPTHS,
    "non_spatial": _SCENES,
}


@dataclass(frozen=True)
class EvaluatorRow:
    """What one kind of image costs. GB are 1e9 bytes; None: not measured.

    Attributes:
        benchmark, category: what is scored; `all` is the mean over a whole evaluation.
        images: of it in a whole evaluation of one variant.
        image_ms: milliseconds an image.
        peak_gb: most that was allocated, the models of all evaluators included (CUDA only).
        objects: detections an image.
        drawing_share: of the time of drawing an image, where that was given.
        error: what went wrong, a line.
    """

    benchmark: str
    category: str
    images: int
    image_ms: float | None = None
    peak_gb: float | None = None
    objects: float | None = None
    drawing_share: float | None = None
    error: str | None = None


class _Absent:
    """Stands where a model should be that could not be had; asked for anything, it says why."""

    fingerprint = "absent"

    def __init__(self, error: str) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(self._error)


class _Counting:
    """A detector by names, and how many images it saw and objects it found."""

    def __init__(self, detector: OwlDetector) -> None:
        self.detector = detector
        self.fingerprint = detector.fingerprint
        self.images = self.objects = 0

    def detect_named(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        found = self.detector.detect_named(images, names)
        self.images += len(images)
        self.objects += sum(map(len, found))
        return found


def measure_evaluators(sizes: Sizes, device: torch.device, drawing_s: float | None = None) -> Iterator[EvaluatorRow]:
    """GenEval's row, T2I-CompBench's eight, and their mean over a whole evaluation; `drawing_s` is of one image."""
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (IMAGES, sizes.side, sizes.side, 3), dtype=np.uint8))
    rows = []
    with _one_thread():
        models = {role: _model(role, sizes, images, device) for role in WRITERS}
        compbench = CompBenchEvaluator(
            answerer=models["vqa"],
            detector=models["named_detector"],
            depth=models["depth"],
            clip=models["clip_score"],
            language=language(),
            mode="compatible",
        )
        release()
        row = attempt(EvaluatorRow(GENEVAL, ALL, GENEVAL_IMAGES), lambda: _geneval(models, images, device))
        rows.append(_with_share(row, drawing_s))
        yield rows[-1]
        for category in CATEGORIES:
            row = EvaluatorRow(COMPBENCH, category, CATEGORY_IMAGES)
            row = attempt(row, lambda name=category: _category(name, compbench, models, images, device))  # type: ignore[misc]
            rows.append(_with_share(row, drawing_s))
            yield rows[-1]
    yield _with_share(_mean(rows), drawing_s)


def metadata_of(category: str) -> list[dict[str, Any]]:
    """What T2I-CompBench's evaluator is told of each of `IMAGES` images of this category."""
    if category == "numeracy":
        about = [{"prompt": text, "objects": objects} for text, objects in _NUMBERS]
    elif category == "complex":
        about = [{"prompt": text, "kind": kind} for kind, text in _COMPOSED]
    else:
        about = [{"prompt": text} for text in _TEXTS[category]]
    return [{"category": category, **one} for one in islice(cycle(about), IMAGES)]


def questions_of(found: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """GenEval's metadata of images in which objects of these classes were found: its six tags in turn."""
    questions = []
    for labels, tag in zip(
        found, cycle(("single_object", "two_object", "counting", "colors", "position", "color_attr"))
    ):
        first, second = [*dict.fromkeys([*labels, *GENEVAL_CLASSES])][:2]
        one, other = {"class": first, "count": 1}, {"class": second, "count": 1}
        include = {
            "single_object": [one],
            "two_object": [one, other],
            "counting": [{**one, "count": 2}],
            "colors": [{**one, "color": "red"}],
            "position": [one, {**other, "position": ["left of", 0]}],
            "color_attr": [{**one, "color": "red"}, {**other, "color": "blue"}],
        }[tag]
        exclude = [{**one, "count": 3}] if tag == "counting" else []
        questions.append({"tag": tag, "include": include, "exclude": exclude})
    return questions


def _model(role: str, sizes: Sizes, images: Sequence[np.ndarray], device: torch.device) -> Any:
    """The product's model of a role over random weights, or what stands for it where it cannot be had."""
    torch.manual_seed(0)
    texts = [one["prompt"] for category in CATEGORIES for one in metadata_of(category)]
    words = sorted({word for text in texts for word in text.lower().replace(".", " ").replace(",", " ").split()})
    try:
        with tempfile.TemporaryDirectory(prefix=f"{role}-") as made:
            WRITERS[role](sizes, Path(made), words, device)
            release()
            return _load(role, Path(made), images[:CALIBRATED], device)
    except Exception as error:  # whatever a library raises: the other evaluators still count
        return _Absent(f"{role}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _load(role: str, folder: Path, images: Sequence[np.ndarray], device: torch.device) -> Any:
    """As evaluators/registry.py loads it; a detector then finds about as much as a trained one."""
    if role == "detector":
        detector = load_detector(folder, device, batch_size=BATCH_SIZE, labels=GENEVAL_CLASSES, min_score=THRESHOLD)
        assert isinstance(detector, Mask2FormerDetector)
        _shift_classes(detector, images)
        return detector
    if role == "clip":
        return ClipColorClassifier(ClipModel(folder, device))
    if role == "vqa":
        return BlipQuestionAnswerer(folder, device, batch_size=BATCH_SIZE)
    if role == "named_detector":
        owl = OwlDetector(folder, device, SCORE_THRESHOLD)
        _shift_names(owl, images)
        return _Counting(owl)
    if role == "depth":
        return DptDepthEstimator(folder, device, batch_size=BATCH_SIZE)
    return ClipModel(folder, device, batch_size=BATCH_SIZE)


@exact_inference()
def _shift_classes(detector: Mask2FormerDetector, images: Sequence[np.ndarray]) -> None:
    """Makes about `OBJECTS` queries of an image sure of a class, of another one each, and the others of "no object"."""
    head = detector.model.class_predictor
    logits_BQC = detector._logits(detector._pixels(images))[0]
    mean_C, scale = logits_BQC.mean((0, 1)), _SPREAD / logits_BQC.std((0, 1)).mean()
    best_BQ = ((logits_BQC - mean_C) * scale)[..., :-1].amax(-1)
    head.weight.mul_(scale)
    head.bias.copy_((head.bias - mean_C) * scale)
    head.weight[-1] = 0
    head.bias[-1] = _least(best_BQ) - 1  # clear of it: a mask's confidence still takes its share


@exact_inference()
def _shift_names(detector: OwlDetector, images: Sequence[np.ndarray]) -> None:
    """Makes about `OBJECTS` patches of an image score above the threshold for any of a few names."""
    head = detector.model.class_head
    for layer, bias in ((head.logit_shift, 0.0), (head.logit_scale, _OWL_SCALE - 1)):  # ELU + 1 gives _OWL_SCALE
        layer.weight.zero_()
        layer.bias.fill_(bias)
    features_BPD, _ = detector._patches(images)
    names = ("dog", "chair")
    best_BP = torch.stack([detector._logits(one_PD, names).amax(-1) for one_PD in features_BPD[: len(images)]])
    threshold = torch.logit(torch.tensor(SCORE_THRESHOLD)).item()
    head.logit_shift.bias.fill_((threshold - _least(best_BP)) / _OWL_SCALE)


def _least(score_BX: torch.Tensor) -> float:
    """What about `OBJECTS` of each image's scores exceed."""
    count = min(OBJECTS * len(score_BX), score_BX.numel() - 1)
    return float(score_BX.flatten().topk(count + 1).values[-1])


def _geneval(models: Mapping[str, Any], images: Sequence[np.ndarray], device: torch.device) -> dict[str, Any]:
    evaluator = GenEvalEvaluator(models["detector"], models["clip"])
    found = evaluator.detector.detect(images)
    questions = questions_of([[one.label for one in detections] for detections in found])
    objects = sum(map(len, found)) / len(images)
    return {**_timed(evaluator, images, questions, device), "objects": objects}


def _category(
    category: str,
    evaluator: CompBenchEvaluator,
    models: Mapping[str, Any],
    images: Sequence[np.ndarray],
    device: torch.device,
) -> dict[str, Any]:
    counting = models["named_detector"]
    if isinstance(counting, _Counting):
        counting.images = counting.objects = 0
    measured = _timed(evaluator, images, metadata_of(category), device)
    if isinstance(counting, _Counting) and counting.images:
        measured["objects"] = counting.objects / counting.images
    return measured


def _timed(
    evaluator: Evaluator, images: Sequence[np.ndarray], metadata: Sequence[Mapping[str, Any]], device: torch.device
) -> dict[str, Any]:
    """Milliseconds an image and the peak of memory. Raises RuntimeError where an image could not be scored."""
    seconds = []
    for call in range(1 + CALLS):  # the first one warms up: a run asks for the same names and colours again and again
        begun = time.perf_counter()
        scores = evaluator.score(images, metadata)  # which are plain numbers: nothing is left running on the device
        if call:
            seconds.append(time.perf_counter() - begun)
    if errors := [score.error for score in scores if score.error]:
        raise RuntimeError(errors[0])
    peak_gb = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None
    return {"image_ms": 1e3 * statistics.median(seconds) / len(images), "peak_gb": peak_gb}


def _mean(rows: Sequence[EvaluatorRow]) -> EvaluatorRow:
    """The mean over the images of a whole evaluation; an error where one of its parts has none."""
    whole = EvaluatorRow(ALL, ALL, sum(row.images for row in rows))
    if failed := [row for row in rows if row.image_ms is None]:
        return replace(whole, error=f"{failed[0].benchmark} {failed[0].category} was not measured")
    peaks = [row.peak_gb for row in rows if row.peak_gb is not None]
    mean = sum(row.images * (row.image_ms or 0.0) for row in rows) / whole.images
    return replace(whole, image_ms=mean, peak_gb=max(peaks, default=None))


def _with_share(row: EvaluatorRow, drawing_s: float | None) -> EvaluatorRow:
    if drawing_s is None or row.image_ms is None:
        return row
    return replace(row, drawing_share=row.image_ms / 1e3 / drawing_s)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
