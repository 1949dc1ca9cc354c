"""What the mini VQA model is asked, and what counts as true."""

import pytest
import torch

from bitflux_core.mini.compositions import benchmark_prompts, training_prompts
from bitflux_core.mini.render import NO_SHAPE, PromptTable, sample_scenes
from bitflux_core.mini.train_vqa import all_phrases, ask, train_vqa
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
    numbers, truth = ask(scenes, forms_named, generator)
    return scenes, forms_named.tolist(), [phrases[number] for number in numbers], truth.tolist()


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


def test_a_little_training_moves_the_answers_to_yes_and_no():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_vqa(tokenizer)
    train_vqa(model, tokenizer, steps=6, batch=4, device=torch.device("cpu"), seed=0)
    ids, mask = question_tokens(tokenizer, ["a star?"])
    logits = answer_logits(model, torch.zeros(1, 3, 128, 128), ids, mask)
    assert logits.shape == (1, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens(logits.topk(8).indices[0].tolist())
