"""Numeracy: what a prompt asks for, and what of it is there."""

import os
from pathlib import Path

import numpy as np
import pytest
from compbench_fakes import Found, at

from evaluators.base import Detection
from evaluators.compbench.numeracy import (
    NUMBERS,
    NumeracyJudge,
    count,
    judge_numbers,
    parse_objects,
    without_doubles,
)

UPSTREAM = Path(__file__).parents[4] / "shared" / "benchmarks" / "t2i-compbench"
PLURALS = {
    "cups": "cup",
    "traffic lights": "traffic light",
    "lights": "light",
    "boys": "boy",
    "girls": "girl",
    "ships": "ship",
    "telivisions": "telivision",
}
BY_HAND = {
    "two boys": [("person", 2)],
    "seven women": [("person", 7)],
    "six people gathered for a picnic": [("person", 6)],  # no picnic in the list
    "four ships": [("boat", 4)],
    "three fish": [("fish", 3)],
    "four goldfish": [("fish", 4)],
    "five knives": [("knife", 5)],
    "six televisions": [("television", 6)],  # upstream's "telivision" renames nothing
    "three deer and four bowls": [("deer", 3), ("bowl", 4)],
    "three paintings and one knife": [("picture", 3), ("knife", 1)],
    "two plates and three mice": [("plate", 2), ("mouse", 3)],
    "two men and four deer": [("person", 2), ("deer", 4)],
    "one bottle, one girl, one desk and two bananas": [("bottle", 1), ("person", 1), ("desk", 1), ("banana", 2)],
}


@pytest.mark.parametrize(
    ("prompt", "objects"),
    [
        ("two cups", [("cup", 2)]),
        ("a cup and three traffic lights", [("cup", 1), ("traffic light", 3)]),
        ("Eight lights.", [("light", 8)]),
        ("four boys, five girls", [("person", 4), ("person", 5)]),
        ("an old ship", []),  # the word after the number is not in the list
        ("one ship", [("boat", 1)]),
        ("two telivisions", [("tv", 2)]),  # upstream's spelling
        ("nine cups", []),
        ("", []),
        ("zwei Bäume", []),
    ],
)
def test_number_words_and_the_objects_after_them(prompt, objects):
    assert parse_objects(prompt, PLURALS) == objects


def test_every_upstream_prompt_asks_for_something():
    if not UPSTREAM.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{UPSTREAM} is missing")
        pytest.skip("needs the benchmarks' prompt files")
    pairs = [line.split(" - ") for line in (UPSTREAM / "new_objects.txt").read_text().splitlines() if line]
    plurals = {plural: singular for singular, plural in pairs}
    prompts = [line for line in (UPSTREAM / "numeracy_val.txt").read_text().splitlines() if line]
    assert len(prompts) == 300
    found = [parse_objects(prompt, plurals) for prompt in prompts]
    assert all(found)
    for prompt, objects in BY_HAND.items():
        assert prompt in prompts
        assert parse_objects(prompt, plurals) == objects
    # As many objects as number words, but for a few whose object is not in the list.
    numbers = [sum(word in NUMBERS for word in prompt.lower().replace(",", "").split()) for prompt in prompts]
    assert sum(len(objects) == n for objects, n in zip(found, numbers, strict=True)) >= 0.95 * len(prompts)


def test_doubles_of_one_object_count_once():
    whole, same = at("cup", 100, 100, 40), at("cup", 100.5, 100, 40, 0.7)
    inside, other_label = at("cup", 100, 100, 10, 0.6), at("light", 100, 100, 40, 0.5)
    apart = at("cup", 130, 100, 40, 0.4)
    assert without_doubles([whole, same, inside, other_label, apart]) == [whole, other_label, apart]


@pytest.mark.parametrize(
    ("one", "other", "left"),
    [
        # Of 100 x 100 pixels with the one that is added, 91 and 89 columns are shared.
        ((0.0, 0.0, 99.0, 99.0), (9.0, 0.0, 108.0, 99.0), 1),
        ((0.0, 0.0, 99.0, 99.0), (11.0, 0.0, 110.0, 99.0), 2),
        # 9.95 of 11 columns with it, 8.95 of 10 without.
        ((0.0, 0.0, 10.0, 10.0), (1.05, 0.0, 11.05, 10.0), 1),
        # One inside the other, whichever is the better one.
        ((0.0, 0.0, 99.0, 99.0), (20.0, 20.0, 40.0, 40.0), 1),
        ((20.0, 20.0, 40.0, 40.0), (0.0, 0.0, 99.0, 99.0), 1),
    ],
)
def test_boxes_are_one_object_from_nine_tenths_with_a_pixel_added(one, other, left):
    assert len(without_doubles([Detection("cup", 0.9, one), Detection("cup", 0.8, other)])) == left


def test_labels_that_contain_the_name_count_where_none_is_the_name():
    compound = [at("cattle, cow", 50, 50), at("cattle, cow", 150, 50)]
    assert count(compound, "cow") == 2
    assert count([*compound, at("cow", 300, 50)], "cow") == 1


def test_half_for_presence_and_half_for_the_number():
    cups = [at("cup", 60 * i, 100) for i in range(1, 4)]
    assert judge_numbers(cups, [("cup", 3)]).score == 1
    assert judge_numbers(cups, [("cup", 2)]).score == 0.5
    assert judge_numbers(cups, [("cup", 3), ("light", 1)]).score == 0.5
    assert judge_numbers(cups, [("cup", 2), ("light", 1)]).score == 0.25
    assert judge_numbers(cups, []).score == 0
    assert judge_numbers(cups, [("cup", 3)]).details == [{"name": "cup", "wanted": 3, "found": 3}]


def test_each_image_is_judged_by_its_own_prompt():
    image = np.zeros((479, 479, 3), np.uint8)
    detector = Found(at("cup", 100, 100), at("light", 300, 100, score=0.05))
    judgments = NumeracyJudge(detector).judge([image] * 3, [[("cup", 1)], [("light", 1)], []])
    assert [judgment.score for judgment in judgments] == [1, 0, 0]
    assert detector.asked == [("cup",), ("light",), ()]
