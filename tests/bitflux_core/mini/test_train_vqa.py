"""What the mini VQA model is asked, and what counts as true."""

import pytest
import torch

from bitflux_core.mini.compositions import benchmark_prompts, training_prompts
from bitflux_core.mini.render import NO_SHAPE, PromptTable, Scenes, render, sample_scenes
from bitflux_core.mini.train_vqa import NO_LABEL, all_phrases, ask, look_loss, patch_labels, patch_shares, train_vqa
from bitflux_core.mini.vqa import ENCODE, answer_logits, build_tokenizer, build_vqa, question_tokens
from bitflux_core.mini.world import COLORS, FORMS, SHAPES, TEXTURES


@pytest.fixture(scope="module")
def asked():
    """2,000 scenes, each with a question about it and whether it is true."""
    specs, weights = training_prompts()
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(torch.tensor(weights), 2000, replacement=True, generator=generator)
    scenes = sample_scenes(PromptTable.build(specs, "cpu"), index, generator)
    forms_named = torch.tensor([bool(specs[i].forms) for i in index])
    phrases = all_phrases()
    questions = ask(scenes, forms_named, generator)
    return scenes, forms_named.tolist(), [phrases[n] for n in questions.number_B], questions.true_B.tolist()


def test_an_answer_is_what_the_scene_shows(asked):
    """Read word by word, without the tables by which the questions were made."""
    scenes, _, phrases, truth = asked
    for row, (phrase, answer) in enumerate(zip(phrases, truth, strict=True)):
        *adjectives, noun = phrase.split()[1:]
        objects = [
            {
                SHAPES[shape],
                COLORS[scenes.colors_BO[row, slot]],
                TEXTURES[scenes.textures_BO[row, slot]],
                FORMS[scenes.forms_BO[row, slot]],
            }
            for slot, shape in enumerate(scenes.shapes_BO[row].tolist())
            if shape != NO_SHAPE
        ]
        assert answer == any({noun, *adjectives} <= seen for seen in objects), (phrase, objects)


def test_both_answers_are_common_for_every_kind_of_question(asked):
    _, _, phrases, truth = asked
    for words in (COLORS, TEXTURES[1:], FORMS[1:]):
        answers = [answer for phrase, answer in zip(phrases, truth, strict=True) if set(phrase.split()) & set(words)]
        assert len(answers) > 100
        assert 0.3 < sum(answers) / len(answers) < 0.7


def test_forms_are_asked_only_where_the_prompt_names_them(asked):
    _, named, phrases, _ = asked
    assert all(named[row] for row, phrase in enumerate(phrases) if set(phrase.split()) & set(FORMS))
    assert not any(FORMS[0] in phrase for phrase in phrases)


def test_every_question_is_known_word_by_word():
    tokenizer = build_tokenizer()
    ids, mask = question_tokens(tokenizer, [f"{phrase}?" for phrase in all_phrases() if FORMS[0] not in phrase])
    assert (ids != tokenizer.unk_token_id).all()
    assert (ids[:, 0] == tokenizer.convert_tokens_to_ids(ENCODE)).all()
    assert (ids[mask.bool()] != tokenizer.pad_token_id).all()
    asked_of_the_benchmark = {spec.text for spec in benchmark_prompts() if spec.tag in ("color", "shape", "texture")}
    chunks = {chunk for text in asked_of_the_benchmark for chunk in text.split(" and ")}
    assert chunks <= set(all_phrases())


@pytest.mark.slow
def test_a_little_training_moves_the_answers_to_yes_and_no():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_vqa(tokenizer)
    train_vqa(model, tokenizer, steps=6, batch=4, device=torch.device("cpu"), seed=0)
    ids, mask = question_tokens(tokenizer, ["a star?"])
    logits = answer_logits(model, torch.zeros(1, 3, 128, 128), ids, mask)
    assert logits.shape == (1, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens(logits.topk(8).indices[0].tolist())


def test_patches_are_labelled_by_the_object_that_fills_most_of_them():
    def row(*values):
        return torch.tensor([values])

    circle, heart, none = SHAPES.index("circle"), SHAPES.index("heart"), NO_SHAPE
    scenes = Scenes(
        shapes_BO=row(circle, heart, none, none),
        colors_BO=row(3, 5, 0, 0),
        textures_BO=row(0, 2, 0, 0),
        forms_BO=row(0, 4, 0, 0),
        x_BO=row(40.0, 100.0, 0.0, 0.0),
        y_BO=row(40.0, 100.0, 0.0, 0.0),
        radius_BO=row(24.0, 20.0, 1.0, 1.0),
        covers_B=torch.tensor([False]),
    )
    _, masks = render(scenes, torch.Generator())
    shares = patch_shares(masks)
    inside, outside, on_heart = 2 * 8 + 2, 7, 6 * 8 + 6
    labels = patch_labels(scenes, shares, torch.tensor([False]))
    assert [labels["shape"][0, place].item() for place in (inside, outside, on_heart)] == [circle, none, heart]
    assert [labels["color"][0, place].item() for place in (inside, outside, on_heart)] == [3, NO_LABEL, 5]
    assert labels["texture"][0, on_heart] == 2
    assert (labels["form"] == NO_LABEL).all()
    assert patch_labels(scenes, shares, torch.tensor([True]))["form"][0, on_heart] == 4

    attention = torch.zeros(2, 1, 3, 65)
    attention[0, :, :, 1 + on_heart] = 1.0  # one question looks at the heart, the other at the corner
    attention[1, :, :, 1 + outside] = 1.0
    mask, shares = torch.ones(2, 3), shares.repeat(2, 1, 1)
    heart_only, nothing = row(False, True, False, False), row(False, False, False, False)
    assert look_loss(attention[:1], mask[:1], shares[:1], heart_only) == pytest.approx(0.0, abs=1e-5)
    assert look_loss(attention[1:], mask[1:], shares[1:], heart_only) > 10
    assert look_loss(attention, mask, shares, torch.cat([heart_only, nothing])) == pytest.approx(0.0, abs=1e-5)


def test_words_look_at_what_they_describe_and_hold_where_the_scene_says_so():
    specs, weights = training_prompts()
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(torch.tensor(weights), 500, replacement=True, generator=generator)
    scenes = sample_scenes(PromptTable.build(specs, "cpu"), index, generator)
    phrases = all_phrases()
    asked = ask(scenes, torch.tensor([bool(specs[i].forms) for i in index]), generator)
    for row, number in enumerate(asked.number_B):
        shapes = scenes.shapes_BO[row].tolist()
        *adjectives, noun = phrases[number].split()[1:]
        of_the_shape = {slot for slot, shape in enumerate(shapes) if shape == SHAPES.index(noun)}
        looked_at = set(asked.looked_at_BO[row].nonzero().flatten().tolist())
        assert looked_at if asked.true_B[row] else looked_at == of_the_shape
        assert looked_at <= of_the_shape
        seen = [
            {COLORS[scenes.colors_BO[row, s]], TEXTURES[scenes.textures_BO[row, s]], FORMS[scenes.forms_BO[row, s]]}
            for s in looked_at
        ]
        held = [int(any(word in one for one in seen)) if of_the_shape else NO_LABEL for word in adjectives]
        wanted = [NO_LABEL, NO_LABEL, *held, int(bool(of_the_shape))]
        wanted += [NO_LABEL] * (asked.holds_BT.shape[1] - len(wanted))
        assert asked.holds_BT[row].tolist() == wanted, phrases[number]
