"""Each image goes to its category's judge; what cannot be judged becomes an error, and spoils no other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitflux_core.mini.compositions import benchmark_prompts, metadata
from bitflux_core.mini.models import WEIGHTS
from evaluators.base import Detection
from evaluators.clip import ClipModel
from evaluators.compbench.categories import CATEGORIES
from evaluators.compbench.evaluator import CompBenchEvaluator, check_metadata
from evaluators.compbench.non_spatial import ClipScoreJudge
from evaluators.language import RuleLanguage


class Detector:
    fingerprint = "detector"

    def detect_named(self, images, names):
        return [[Detection(name, 0.9, (10 + 40 * i, 10, 40 + 40 * i, 40)) for i, name in enumerate(n)] for n in names]


class Depth:
    fingerprint = "depth"

    def depth(self, images):
        return [np.zeros((480, 480), np.uint8) for _ in images]


class Answerer:
    fingerprint = "answerer"

    def probability_of_yes(self, images, questions):
        return [0.5] * len(questions)


@pytest.fixture(scope="module")
def clip():
    return ClipModel(WEIGHTS / "clip")


@pytest.fixture
def evaluator(clip):
    return evaluator_of(clip, "compatible")


def evaluator_of(clip, mode):
    models = {"answerer": Answerer(), "detector": Detector(), "depth": Depth(), "clip": clip}
    return CompBenchEvaluator(**models, language=RuleLanguage(), mode=mode)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 255, (128, 128, 3), dtype=np.uint8)


def test_every_prompt_of_the_mini_benchmark_is_scored(evaluator):
    specs = benchmark_prompts()[::7]
    scores = evaluator.score([noise(i) for i in range(len(specs))], [metadata(spec) for spec in specs])
    assert {spec.tag for spec in specs} == set(CATEGORIES)
    assert [score.error for score in scores] == [None] * len(specs)
    for spec, score in zip(specs, scores, strict=True):
        assert score.correct is None
        assert score.reason == "compatible, rules"
        if spec.tag in ("color", "shape", "texture"):
            assert score.score == 0.25, spec.text  # two questions of one half
            assert len(score.detections) == 2
        if spec.tag in ("spatial", "3d_spatial"):
            assert {detail.get("label") for detail in score.detections[:2]} <= {*spec.text.split()}


def test_what_cannot_be_judged_is_an_error_and_spoils_no_other(evaluator):
    good = {"category": "color", "prompt": "a red cat"}
    about = [good, {"category": "smell", "prompt": "x"}, good, {"category": "complex", "prompt": "x"}, {}]
    images = [noise(0), noise(1), np.zeros((3, 3)), noise(2), noise(3)]
    scores = evaluator.score(images, about)
    assert scores[0].score == 0.5
    assert [bool(score.error) for score in scores] == [False, True, True, True, True]
    assert "uint8" in scores[2].error
    assert "kind" in scores[3].error


@pytest.mark.parametrize(
    ("about", "fault"),
    [
        ({"category": "color"}, "must have the prompt"),
        ({"category": "numeracy", "prompt": "x"}, "numeracy needs objects"),
        ({"category": "numeracy", "prompt": "x", "objects": [["cup"]]}, "numeracy needs objects"),
        ({"prompt": "x"}, "unknown category None"),
    ],
)
def test_metadata_without_what_its_category_needs_are_refused(about, fault):
    with pytest.raises(ValueError, match=fault):
        check_metadata(about)


def test_prompts_of_any_letters_and_of_none_get_a_score(evaluator):
    about = [
        {"category": tag, "prompt": text} for tag in ("color", "spatial", "non_spatial") for text in ("ein Café ☕", "")
    ]
    scores = evaluator.score([noise(i) for i in range(len(about))], about)
    assert [score.error for score in scores] == [None] * len(about)
    assert (scores[1].score, scores[3].score) == (1.0, 0.0)  # the protocol's values for a prompt without a noun


def test_the_mode_is_part_of_the_fingerprint(clip):
    assert evaluator_of(clip, "compatible").fingerprint != evaluator_of(clip, "corrected").fingerprint


def test_clip_score_is_the_bare_cosine(clip):
    images = [noise(0), noise(1)]
    texts = ["a photo of a red star", "a photo of a blue ring"]
    found = [judgment.score for judgment in ClipScoreJudge(clip).judge(images, texts)]
    expected = (clip.image_features(images) * clip.text_features(texts)).sum(-1)
    assert torch.allclose(torch.tensor(found), expected)
    assert ClipScoreJudge(clip).judge([], []) == []


def test_clip_score_may_be_below_nothing():
    opposite = SimpleNamespace(
        image_features=lambda images: torch.tensor([[-1.0, 0.0]] * len(images)),
        text_features=lambda texts: torch.tensor([[0.6, 0.8]] * len(texts)),
    )
    [judgment] = ClipScoreJudge(opposite).judge([noise(0)], ["a star"])
    assert judgment.score == pytest.approx(-0.6)
