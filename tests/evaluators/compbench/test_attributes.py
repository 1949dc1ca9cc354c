"""Colour, shape, texture: what is asked, and what the answers make."""

import numpy as np
import pytest

from evaluators.compbench.attributes import AttributeJudge, product, questions_of
from evaluators.language import RuleLanguage


class Chunks:
    """A Language of given noun chunks."""

    name = fingerprint = "chunks"

    def noun_chunks(self, text):
        return text.split("|") if text else []


class Answers:
    """Answers by the question, and remembers what it was asked about which image."""

    fingerprint = "answers"

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def probability_of_yes(self, images, questions):
        self.asked += [(int(image[0, 0, 0]), question) for image, question in zip(images, questions, strict=True)]
        return [self.answers.get(question, 0.5) for question in questions]


def image(value):
    return np.full((8, 8, 3), value, np.uint8)


def test_places_are_not_asked_about_and_eight_is_the_most():
    assert questions_of("a cat|the left|top|the side|the right|the top", Chunks()) == ["a cat?", "the top?"]
    assert len(questions_of("|".join(f"cat {i}" for i in range(10)), Chunks())) == 8
    # A dropped phrase does not use up one of the eight.
    assert questions_of("top|" + "|".join("abcdefgh"), Chunks())[-1] == "h?"


def test_corrected_asks_about_no_place_at_all():
    prompt = "side|the bottom|the top|a cat|left|right|the side table"
    assert questions_of(prompt, Chunks(), "corrected") == ["a cat?", "the side table?"]
    answers = Answers({"a cat?": 0.9, "side?": 0.0})
    (judgment,) = AttributeJudge(answers, Chunks(), "corrected").judge([image(1)], ["a cat|side"])
    assert judgment.score == 0.9


def test_a_real_prompt_is_asked_about_by_its_noun_phrases():
    assert questions_of("a green bench and a blue bowl", RuleLanguage()) == ["a green bench?", "a blue bowl?"]


def test_the_product_is_of_rounded_answers_and_rounded():
    assert product([0.33336, 0.5]) == 0.1667  # 0.3334 * 0.5
    assert product([0.9]) == 0.9
    assert product([]) == 1


def test_each_image_is_asked_its_own_prompts_questions():
    answers = Answers({"a red cat?": 0.9, "a dog?": 0.5, "a pig?": 0.1})
    judgments = AttributeJudge(answers, Chunks()).judge(
        [image(1), image(2), image(3)], ["a red cat|a dog", "", "a pig"]
    )
    assert [judgment.score for judgment in judgments] == [pytest.approx(0.45), 1.0, 0.1]
    assert answers.asked == [(1, "a red cat?"), (1, "a dog?"), (3, "a pig?")]
    assert judgments[0].details == [{"question": "a red cat?", "answer": 0.9}, {"question": "a dog?", "answer": 0.5}]
    assert judgments[1].details == []
