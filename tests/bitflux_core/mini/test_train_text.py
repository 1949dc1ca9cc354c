"""What the text encoder is taught about a prompt's nouns."""

import pytest
import torch

from bitflux_core.mini.compositions import benchmark_prompts
from bitflux_core.mini.models import SPECIAL_TOKENS, build_text_encoders, build_tokenizer
from bitflux_core.mini.train_text import NO_LABEL, NO_SIDE, QUESTIONS, SIDES, noun_labels, train_text
from bitflux_core.mini.world import COLORS, FORMS, IN_FRONT, RELATIONS, TEXTURES, TOUCHING, PromptSpec


def labels_at_nouns(spec):
    return {name: [value for value in row if value != NO_LABEL] for name, row in noun_labels(spec).items()}


def test_both_nouns_of_a_relation_carry_their_sides():
    spec = PromptSpec("position", "a photo of a star above a ring", (6, 3), (-1, -1), RELATIONS.index("above"))
    labels = labels_at_nouns(spec)
    assert [RELATIONS[side] for side in labels["side"]] == ["above", "below"]
    assert labels["color"] == [len(COLORS)] * 2


def test_colors_belong_to_the_noun_they_stand_before():
    spec = PromptSpec("color_attr", "a photo of a red star and a blue ring", (3, 6), (0, 4))
    assert labels_at_nouns(spec)["color"] == [0, 4]


def test_texture_and_form_belong_to_the_noun_they_stand_before():
    specs = {spec.tag: spec for spec in benchmark_prompts()}
    for tag, question, words in (("texture", "texture", TEXTURES), ("shape", "form", FORMS)):
        named = [word for word in specs[tag].text.split() if word in words]
        assert [words[answer] for answer in labels_at_nouns(specs[tag])[question]] == named


def test_what_stands_behind_is_told_from_what_stands_in_front():
    specs = [spec for spec in benchmark_prompts() if spec.tag == "3d_spatial"]
    front, back = SIDES[IN_FRONT]
    for spec in specs:
        assert labels_at_nouns(spec)["side"] == ([front, back] if "in front of" in spec.text else [back, front])


def test_a_third_object_has_a_place_and_no_part_in_the_contact():
    text = "the red star touching the blue ring is on the left of the heart"
    spec = PromptSpec("complex", text, (6, 3, 4), (4, 0, -1), TOUCHING, third=RELATIONS.index("right of"))
    labels = labels_at_nouns(spec)
    assert labels["side"] == [*SIDES[TOUCHING], NO_SIDE]
    left, right = RELATIONS.index("left of"), RELATIONS.index("right of")
    assert labels["place"] == [NO_SIDE, left, right]


def test_every_answer_is_one_that_the_question_knows():
    for spec in benchmark_prompts():
        labels = labels_at_nouns(spec)
        assert all(0 <= value < QUESTIONS[name] for name, row in labels.items() for value in row)


def test_numbers_are_counted_by_noun():
    spec = PromptSpec("numeracy", "a photo of two stars and one ring", (3, 3, 6), (-1,) * 3)
    assert labels_at_nouns(spec)["number"] == [1, 0]


@pytest.mark.slow
def test_a_little_training_teaches_colors_better_than_chance():
    tokenizer = build_tokenizer(start=False)
    torch.manual_seed(0)
    _, t5 = build_text_encoders(len(tokenizer), SPECIAL_TOKENS.index("</s>"))
    accuracy = train_text(t5, tokenizer, steps=30, batch=32, device=torch.device("cpu"), seed=0)
    assert accuracy["color"] > 0.5
