"""What two records of a detector may differ in, and what the self-test asks a detector."""

import json
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest

from evaluators.base import Detection
from evaluators.compbench.evaluator import CompBenchEvaluator
from evaluators.detector_check import KEPT, SANITY_NAMES, DetectorRecord, SelfTesting, differences, sanity_image
from evaluators.geneval import GenEvalEvaluator
from evaluators.language import RuleLanguage
from evaluators.mask2former import Mask2FormerDetector
from evaluators.open_vocabulary import load_named_detector

BOX = (10.0, 10.0, 30.0, 30.0)


def record(*found: tuple, device: str = "A") -> DetectorRecord:
    """Of (label, score) or (label, score, box)."""
    return DetectorRecord.of("f", device, [Detection(one[0], one[1], one[2] if len(one) > 2 else BOX) for one in found])


BEFORE = record(("circle", 0.95), ("star", 0.60, (50.0, 50.0, 90.0, 90.0)), ("circle", 0.04), ("square", 0.035))


@pytest.mark.parametrize(
    "now",
    [
        record(("circle", 0.941), ("star", 0.609, (50.0, 52.0, 90.0, 88.5)), ("circle", 0.04), ("square", 0.035)),
        record(("circle", 0.95), ("star", 0.60, (50.0, 50.0, 90.0, 90.0)), ("square", 0.038), ("circle", 0.036)),
        record(
            ("circle", 0.95),
            ("star", 0.60, (50.0, 50.0, 90.0, 90.0)),
            ("circle", 0.04),
            ("square", 0.035),
            ("a", 0.009),
        ),
    ],
    ids=["within the tolerances", "two faint candidates changed places", "one more of next to no score"],
)
def test_alike(now):
    assert differences(BEFORE, BEFORE) == []
    assert differences(BEFORE, now) == []
    assert differences(now, BEFORE) == []


@pytest.mark.parametrize(
    ("now", "first"),
    [
        (
            record(("circle", 0.95), ("star", 0.55, (50.0, 50.0, 90.0, 90.0)), ("circle", 0.04), ("square", 0.015)),
            "star 0.600 became star 0.550",
        ),
        (
            record(("circle", 0.95), ("heart", 0.60, (50.0, 50.0, 90.0, 90.0)), ("circle", 0.04), ("square", 0.035)),
            "star 0.600 at [50, 50, 90, 90] is gone",
        ),
        (
            record(("circle", 0.95), ("star", 0.60, (50.0, 50.0, 93.0, 90.0)), ("circle", 0.04), ("square", 0.035)),
            "star 0.600 at [50, 50, 90, 90] is gone",
        ),
        (record(("circle", 0.95), ("star", 0.60, (50.0, 50.0, 90.0, 90.0))), "circle 0.040 became nothing 0.000"),
        (record(), "circle 0.950 became nothing 0.000"),
    ],
    ids=["score", "label", "box", "faint ones", "all"],
)
def test_different_and_the_largest_shift_comes_first(now, first):
    assert differences(BEFORE, now)[0] == first
    assert differences(now, BEFORE)


def test_two_like_objects_need_two_counterparts():
    two = record(("star", 0.9), ("star", 0.9))
    one = record(("star", 0.9), ("heart", 0.9))
    assert differences(two, two) == []
    assert differences(two, one) == ["star 0.900 at [10, 10, 30, 30] is gone", "heart 0.900 at [10, 10, 30, 30] is new"]


def test_a_record_survives_json_and_keeps_the_best():
    many = DetectorRecord.of("f", "GPU", [Detection("star", 1 - index / 100, BOX) for index in range(2 * KEPT)])
    assert len(many.seen) == KEPT
    assert many.seen[0].score == 1.0
    assert DetectorRecord.from_json(json.loads(json.dumps(many.as_json()))) == many


def test_the_sanity_image_is_always_the_same():
    image = sanity_image()
    assert image.shape == (128, 128, 3)
    assert image.dtype == np.uint8
    # Another image would make every record that users hold look wrong.
    assert sha256(image.tobytes()).hexdigest() == "f5ef6ceb1ea2496b1d699c57898b7bac6aeeb26bc1a1b8b02bf20ac2339ab488"


def test_the_mini_detector_sees_the_four_shapes():
    detector = Mask2FormerDetector("bitflux_core/mini/weights/detector", batch_size=1, min_score=0.3)
    confident = {"circle", "square", "triangle", "cross"}
    assert {found.label for found in detector.detect([sanity_image()])[0]} == confident
    seen = GenEvalEvaluator(detector, SimpleNamespace(fingerprint="colors")).self_test("cpu").seen
    assert {one.label for one in seen if one.score > 0.9} == confident
    assert len(seen) == KEPT  # faint ones as well, whatever the detector leaves out of its results


@pytest.mark.parametrize("min_score", [0.1, 0.9999])
def test_a_named_detector_is_tested_too(min_score):
    """The mini world's evaluator of T2I-CompBench, with a detector that leaves nothing out of its record."""
    detector = load_named_detector("bitflux_core/mini/weights/detector", "cpu", min_score)
    other = SimpleNamespace(fingerprint="other")
    evaluator = CompBenchEvaluator(
        answerer=other, detector=detector, depth=other, clip=other, language=RuleLanguage(), mode="compatible"
    )
    assert isinstance(evaluator, SelfTesting)
    record = evaluator.self_test("cpu")
    assert {one.label for one in record.seen if one.score > 0.9} == set(SANITY_NAMES)
    assert (record.fingerprint, len(record.seen)) == (detector.fingerprint, KEPT)


def test_a_named_detector_is_always_asked_for_the_same_things():
    asked = []

    def detect_faint(image, names):
        asked.append((image.tobytes(), tuple(names)))
        return [Detection("circle", 0.2, BOX)]

    detector, other = SimpleNamespace(fingerprint="named", detect_faint=detect_faint), SimpleNamespace(fingerprint="o")
    evaluator = CompBenchEvaluator(
        answerer=other, detector=detector, depth=other, clip=other, language=RuleLanguage(), mode="compatible"
    )
    assert evaluator.self_test("A") == DetectorRecord.of("named", "A", [Detection("circle", 0.2, BOX)])
    assert asked == [(sanity_image().tobytes(), ("circle", "square", "triangle", "cross"))]


def test_a_detector_that_is_sure_of_nothing_has_a_record(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=1, min_score=0.99)
    evaluator = GenEvalEvaluator(detector, SimpleNamespace(fingerprint="colors"))
    assert isinstance(evaluator, SelfTesting)
    seen = evaluator.self_test("cpu")
    assert detector.detect([sanity_image()]) == [[]]
    assert seen.seen
    assert (seen.fingerprint, seen.device) == (detector.fingerprint, "cpu")
    assert differences(seen, evaluator.self_test("cpu")) == []
