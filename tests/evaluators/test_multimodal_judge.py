"""The multimodal judge: what it is asked, which grades count, and a tiny model that really answers."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bitflux_core.errors import UserError
from evaluators import multimodal_judge
from evaluators.compbench.categories import CATEGORIES
from evaluators.language import RuleLanguage
from evaluators.multimodal_judge import (
    FOCUS,
    OBJECT_VALUES,
    VALUES,
    JudgeEvaluator,
    MultimodalModel,
    UnreadableAnswer,
    read_grade,
)


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)


class Model:
    """Describes, then answers from a list; remembers what it was asked."""

    fingerprint = "model"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.conversations = []
        self.seeds = []

    def answer(self, messages, seed):
        self.seeds.append(seed)
        self.conversations.append(list(messages))
        texts = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
        self.asked.append((len(messages), *texts))
        return "a picture" if len(messages) == 1 else self.answers.pop(0)


def judged(model, category, prompt, **more):
    about = {"category": category, "prompt": prompt, **more}
    [score] = JudgeEvaluator(model, RuleLanguage()).score([image()], [about])
    return score


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"score": 5, "explanation": "all of it"}', 1.0),
        ('Sure! ```json\n{"score": "3", "explanation": "half"}\n```', 0.6),
        ('{"explanation": "none", "score": 1.0}', 0.2),
        ('{"grade": 2} {"score": 2}', 0.4),
        ('{"score": 4, "explanation": "a {red} cat, and a } too"}', 0.8),
        ('{"explanation": {"score": 1}, "score": 4}', 0.8),
        ('{"score": 3} as I said: {"score": "3"}', 0.6),
        ('{cat} {"score": 2}', 0.4),
        ('{"score": "\u0663"}', 0.6),
    ],
)
def test_grades_are_read_from_the_json_in_an_answer(answer, value):
    assert read_grade(answer, VALUES) == value


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        "",
        '{"score": 6}',
        '{"score": 0}',
        '{"score": true}',
        '{"score": null}',
        '{"score": 2.5}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"score": [4]}',
        '{"score": {"score": 4}}',
        '{"score": "\u00b2"}',
        '{"score": "44"}',
        '{"score": "4 of 5"}',
        '{"score": ' + "4" * 5_000 + "}",
        '{"score": "' + "4" * 5_000 + '"}',
        '{"a":' * 2_000,
        "{oops}",
    ],
)
def test_what_holds_no_grade_is_not_guessed(answer):
    with pytest.raises(UnreadableAnswer, match="no grade of 1 to 5"):
        read_grade(answer, VALUES)


@pytest.mark.parametrize("answer", ['{"score": 2} or {"score": 3}', '{"score": 6} {"score": 2}'])
def test_of_two_grades_neither_is_taken(answer):
    with pytest.raises(UnreadableAnswer, match="more than one grade"):
        read_grade(answer, VALUES)


def test_a_whole_prompt_gets_one_grade_of_five():
    model = Model('{"score": 4}')
    score = judged(model, "spatial", "a cat on the left of a dog")
    assert (score.score, score.error, score.reason) == (0.8, None, "judge, rules")
    assert [turns for turns, *_ in model.asked] == [1, 3]
    assert "at most 50 words" in model.asked[0][1]
    assert FOCUS["spatial"] in model.asked[0][1]
    assert '"a cat on the left of a dog"' in model.asked[1][1]
    assert "from 1 to 5" in model.asked[1][1]


def test_grades_are_asked_for_after_the_image_and_its_description():
    model = Model('{"score": 4}', '{"score": 4}')
    judged(model, "color", "a red cat and a blue dog")
    [described, *graded] = model.conversations
    for turns in graded:
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
        assert turns[0] == described[0]
        assert turns[1]["content"] == [{"type": "text", "text": "a picture"}]
    assert [part["type"] for part in described[0]["content"]] == ["image", "text"]


def test_attributes_get_a_grade_of_four_for_each_noun_phrase():
    model = Model('{"score": 4}', '{"score": 2}')
    score = judged(model, "color", "a red cat and a blue dog")
    assert score.score == pytest.approx((1.0 + 0.2) / 2)
    assert ['"a red cat"' in model.asked[1][1], '"a blue dog"' in model.asked[2][1]] == [True, True]
    assert "from 1 to 4" in model.asked[1][1]
    assert [OBJECT_VALUES[grade] for grade in (1, 2, 3, 4)] == [0.1, 0.2, 0.75, 1.0]


def test_an_unreadable_answer_is_an_error():
    score = judged(Model("very good"), "complex", "a cat", kind="action")
    assert score.score is None
    assert "no grade" in score.error


def test_what_cannot_be_asked_about_is_an_error():
    assert "names no object" in judged(Model(), "shape", "").error
    assert "unknown category" in judged(Model(), "smell", "a cat").error
    [score] = JudgeEvaluator(Model(), RuleLanguage()).score([None], [{"category": "color", "prompt": "a cat"}])
    assert "numpy array" in score.error


def test_every_category_has_its_focus():
    assert set(FOCUS) == set(CATEGORIES)


def test_the_image_and_the_prompt_make_the_seed():
    seeds = []
    for some, prompt in ((image(0), "a cat"), (image(0), "a cat"), (image(1), "a cat"), (image(0), "a dog")):
        model = Model('{"score": 5}')
        JudgeEvaluator(model, RuleLanguage()).score([some], [{"category": "spatial", "prompt": prompt}])
        seeds.append(model.seeds[0])
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA of a few thousand parameters that knows some words."""
    folder = tmp_path_factory.mktemp("judge")
    words = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        "user",
        "assistant",
        "a",
        "cat",
        "score",
        "1",
        "5",
        "{",
        "}",
        ":",
    ]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**small, vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=1),
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=16),
        image_token_id=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}assistant "
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, fast, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_real_model_answers_and_repeats_itself(folder, monkeypatch):
    monkeypatch.setattr(multimodal_judge, "NEW_TOKENS", 8)
    model = MultimodalModel(folder)
    turns = multimodal_judge._conversation(image(), "color")
    first, again = (model.answer(turns, seed=1) for _ in range(2))
    assert first == again
    assert isinstance(first, str)
    score = JudgeEvaluator(model, RuleLanguage()).score([image()], [{"category": "spatial", "prompt": "a cat"}])[0]
    assert "no grade" in score.error  # it is no judge


def test_a_model_is_sampled_as_the_protocol_says(folder, monkeypatch):
    model, given = MultimodalModel(folder), {}
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **asked: given.update(asked) or generate(**asked))
    model.answer(multimodal_judge._conversation(image(), "color"), seed=1)
    settings = {"do_sample": True, "temperature": 0.2, "top_p": 0.7, "max_new_tokens": 512}
    assert {key: given[key] for key in settings} == settings


def test_a_folder_that_is_no_judge_is_named(tmp_path):
    with pytest.raises(UserError, match=r"judge folder .* has no config\.json"):
        MultimodalModel(tmp_path)
