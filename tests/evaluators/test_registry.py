"""From model folders to scores, with the tiny random models."""

import json

import numpy as np
import pytest

from bitflux_core.errors import UserError
from bitflux_core.mini.world import SHAPES, benchmark_prompts
from evaluators.clip import ClipColorClassifier, ClipModel
from evaluators.geneval import COLORS, Question
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.mask2former import Mask2FormerDetector
from evaluators.registry import build_evaluator


def test_mini_geneval_scores_images(detector_dir, clip_dir):
    evaluator = build_evaluator("mini-geneval", {"detector": detector_dir, "clip": clip_dir}, batch_size=2)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    metadata = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a red star"}
    scores = evaluator.score([*images, None], [metadata] * 4)
    assert [score.error is None for score in scores] == [True, True, True, False]
    assert all(score.score in (0.0, 1.0) for score in scores[:3])
    json.dumps([score.detections for score in scores])
    again = build_evaluator("mini-geneval", {"detector": detector_dir, "clip": clip_dir}, batch_size=2)
    assert again.fingerprint == evaluator.fingerprint


def test_a_found_object_is_given_a_color(detector_dir, clip_dir):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (found,) = Mask2FormerDetector(detector_dir).detect([image])
    colors = ClipColorClassifier(ClipModel(clip_dir)).classify(image, found)
    assert len(colors) == len(found) > 0
    assert set(colors) <= set(COLORS)


def test_geneval_needs_a_detector_of_the_coco_classes(detector_dir, clip_dir):
    with pytest.raises(UserError, match="knows 3 classes, not 80"):
        build_evaluator("geneval", {"detector": detector_dir, "clip": clip_dir})


def test_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'parti'.*geneval, mini-geneval"):
        build_evaluator("parti", {})


def test_the_coco_classes_are_genevals():
    assert len(set(GENEVAL_CLASSES)) == 80
    assert GENEVAL_CLASSES[0] == "person"
    assert GENEVAL_CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert GENEVAL_CLASSES[-1] == "toothbrush"


def test_every_mini_prompt_can_be_judged():
    questions = [Question.parse(prompt.metadata(), SHAPES) for prompt in benchmark_prompts()]
    assert len(questions) == 553
    assert all(question.exclude for question in questions if question.tag == "counting")
