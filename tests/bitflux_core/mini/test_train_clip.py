"""What the mini CLIP is shown side by side."""

import torch

from bitflux_core.mini.compositions import near_misses, training_prompts
from bitflux_core.mini.train_clip import CONTACTS, Siblings
from bitflux_core.mini.world import ANY, HANGING, INSIDE, TOUCHING, PromptSpec


def test_siblings_are_other_prompts_of_the_tag_about_the_same_shapes():
    specs = [spec for spec in training_prompts()[0] if spec.relation not in CONTACTS][::7]
    siblings = Siblings(specs, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(specs), (2000,), generator=generator)
    found = siblings.of(index, generator)
    alone = 0
    for one, other in zip(index.tolist(), found.tolist(), strict=True):
        assert specs[one].tag == specs[other].tag
        assert set(specs[one].shapes) == set(specs[other].shapes)
        alone += one == other
    assert alone < 100  # those that have no sibling
    again = siblings.of(index, generator)
    assert (again != found).float().mean() > 0.5


def test_siblings_of_a_contact_differ_in_nothing_else():
    specs = [spec for spec in training_prompts()[0] if spec.tag == "non_spatial"]
    siblings = Siblings(specs, torch.device("cpu"))
    found = siblings.of(torch.arange(len(specs)), torch.Generator().manual_seed(0))
    for one, other in zip(specs, found.tolist(), strict=True):
        assert specs[other].shapes == one.shapes
        assert specs[other].relation != one.relation


def test_near_misses_of_a_complex_prompt_change_the_contact_or_exchange_the_adjectives():
    text = "the red striped star is touching the dotted ring"
    spec = PromptSpec("complex", text, (6, 3), (ANY, 0), TOUCHING, textures=(2, 1))
    *others, exchanged = near_misses(spec)
    assert [one.text for one in others] == [
        f"the red striped star is {words} the dotted ring" for words in ("inside", "standing on", "hanging below")
    ]
    assert all((one.shapes, one.colors, one.textures) == ((6, 3), (ANY, 0), (2, 1)) for one in others)
    assert [one.relation for one in others] == [contact for contact in CONTACTS if contact != TOUCHING]
    assert exchanged.text == "the dotted star is touching the red striped ring"
    assert (exchanged.colors, exchanged.textures, exchanged.relation) == ((0, ANY), (1, 2), TOUCHING)


def test_near_misses_of_three_objects_leave_the_third():
    text = "the red star inside the blue ring is next to the moon"
    spec = PromptSpec("complex", text, (6, 3, 7), (4, 0, ANY), INSIDE, third=4, textures=(0, 0, 0))
    contact, exchanged = near_misses(spec)
    assert (contact.text, contact.relation) == ("the red star touching the blue ring is next to the moon", TOUCHING)
    assert exchanged.text == "the blue star inside the red ring is next to the moon"
    assert (exchanged.colors, exchanged.third) == ((0, 4, ANY), 4)


def test_same_adjectives_are_not_exchanged():
    text = "the red star is hanging below the red ring"
    spec = PromptSpec("complex", text, (6, 3), (0, 0), HANGING, textures=(0, 0))
    assert all(one.relation != HANGING for one in near_misses(spec))
