"""What the text encoder is taught about a prompt's nouns."""

import torch

from bitflux_core.mini.models import SPECIAL_TOKENS, build_text_encoders, build_tokenizer
from bitflux_core.mini.train_text import NO_LABEL, noun_labels, train_text
from bitflux_core.mini.world import COLORS, RELATIONS, PromptSpec


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


def test_numbers_are_counted_by_noun():
    spec = PromptSpec("numeracy", "a photo of two stars and one ring", (3, 3, 6), (-1,) * 3)
    assert labels_at_nouns(spec)["number"] == [1, 0]


def test_a_little_training_teaches_colors_better_than_chance():
    tokenizer = build_tokenizer(start=False)
    torch.manual_seed(0)
    _, t5 = build_text_encoders(len(tokenizer), SPECIAL_TOKENS.index("</s>"))
    accuracy = train_text(t5, tokenizer, steps=30, batch=32, device=torch.device("cpu"), seed=0)
    assert accuracy["color"] > 0.5
