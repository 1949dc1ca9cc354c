"""Trains the mini VQA model on rendered scenes: is there such an object in the picture?

Questions are the noun phrases of the prompts ("a striped heart?"), asked so that about half are true, and that what is
false is nearly true: another object's colour, a colour that is not there, a shape that is not there.

Legend: B scenes, O object slots, Q questions, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipForQuestionAnswering, PreTrainedTokenizerFast

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.render import NO_SHAPE, PromptTable, Scenes, render, sample_scenes
from bitflux_core.mini.train_detector import wear
from bitflux_core.mini.vqa import IMAGE_MEAN, IMAGE_STD, NO, YES, answer_logits, question_tokens
from bitflux_core.mini.world import ANY, COLORS, FORMS, MAX_OBJECTS, SHAPES, TEXTURES, article
from bitflux_core.training import RunningMean, fit

LEARNING_RATE = 1e-3
AVERAGE_DECAY = 0.998
DETERMINERS = ("a", "the")
# What a phrase says besides the shape, by attribute; the order of the words is the phrase's.
KINDS = ((), ("color",), ("texture",), ("form",), ("color", "texture"), ("texture", "color"))
WORDS = {"color": COLORS, "texture": TEXTURES, "form": FORMS}
OWN, OTHERS, ANYTHING = 0.5, 0.3, 0.2  # whose attribute a question names


@dataclass
class Phrases:
    """Every question as tokens: ids_QT, mask_QT; `place` finds one by determiner, kind, shape and attributes."""

    ids_QT: Tensor
    mask_QT: Tensor

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> "Phrases":
        ids, mask = question_tokens(tokenizer, [f"{phrase}?" for phrase in all_phrases()])
        return cls(ids.to(device), mask.to(device))


def all_phrases() -> list[str]:
    """Phrases in the order of `place`: determiner, kind, shape, then the first and the second attribute."""
    phrases = []
    for determiner in DETERMINERS:
        for kind in KINDS:
            for shape in SHAPES:
                for place in range(_WIDEST * _WIDEST):
                    first, second = divmod(place, _WIDEST)
                    words = [WORDS[name][n % len(WORDS[name])] for name, n in zip(kind, (first, second), strict=False)]
                    phrase = " ".join((*words, shape))
                    phrases.append(article(phrase) if determiner == "a" else f"the {phrase}")
    return phrases


_WIDEST = max(map(len, WORDS.values()))


def place(determiner_B: Tensor, kind_B: Tensor, shape_B: Tensor, first_B: Tensor, second_B: Tensor) -> Tensor:
    """The number of a phrase in `all_phrases`."""
    phrase_B = (determiner_B * len(KINDS) + kind_B) * len(SHAPES) + shape_B
    return (phrase_B * _WIDEST + first_B) * _WIDEST + second_B


def ask(scenes: Scenes, named_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A question about each scene, by its number, and whether it is true. `named_B`: the prompt gives every form."""
    device, batch = scenes.x_BO.device, scenes.x_BO.shape[0]

    def pick(weights: list[float]) -> Tensor:
        return torch.multinomial(torch.tensor(weights, device=device), batch, replacement=True, generator=generator)

    def upto(limit: int) -> Tensor:
        return torch.randint(limit, (batch,), device=device, generator=generator)

    present_BO = scenes.shapes_BO != NO_SHAPE
    count_B = present_BO.sum(1)
    own_B = upto(MAX_OBJECTS) % count_B
    other_B = (own_B + 1 + upto(MAX_OBJECTS) % (count_B - 1).clamp(min=1)) % count_B

    def of(values_BO: Tensor, slot_B: Tensor) -> Tensor:
        return values_BO.gather(1, slot_B[:, None])[:, 0]

    kind_B = pick([0.15, 0.25, 0.25, 0.15, 0.1, 0.1])
    form_B = named_B & (pick([0.3, 0.7]) == 1)
    kind_B = torch.where((kind_B == KINDS.index(("form",))) & ~named_B, KINDS.index(("texture",)), kind_B)
    kind_B = torch.where(form_B, KINDS.index(("form",)), kind_B)
    # Textures are asked about mostly where there are any, else their names would nearly always be wrong.
    smooth_B = (scenes.textures_BO == 0).all(1) & (pick([0.2, 0.8]) == 1)
    textured_B = (kind_B == KINDS.index(("texture",))) | (kind_B >= KINDS.index(("color", "texture")))
    kind_B = torch.where(smooth_B & textured_B, KINDS.index(("color",)), kind_B)
    stranger_B = pick([0.8, 0.2]) == 1
    # A bare shape is true too often unless it is often another one.
    stranger_B |= (kind_B == 0) & (pick([0.5, 0.5]) == 1)
    shape_B = torch.where(stranger_B, upto(len(SHAPES)), of(scenes.shapes_BO, own_B))

    values = {"color": scenes.colors_BO, "texture": scenes.textures_BO, "form": scenes.forms_BO}
    asked: dict[str, Tensor] = {}
    for name, values_BO in values.items():
        whose_B = pick([OWN, OTHERS, ANYTHING])
        if name != "form":  # in a phrase of two attributes both are the object's own half of the time
            whose_B = torch.where((kind_B >= 4) & (pick([0.4, 0.6]) == 1), 0, whose_B)
        mine_B, theirs_B = of(values_BO, own_B), of(values_BO, other_B)
        random_B = 1 + upto(len(FORMS) - 1) if name == "form" else upto(len(WORDS[name]))
        asked[name] = torch.stack([mine_B, theirs_B, random_B]).gather(0, whose_B[None])[0]

    matches_BO = present_BO & (scenes.shapes_BO == shape_B[:, None])
    first_B, second_B = torch.zeros_like(shape_B), torch.zeros_like(shape_B)
    for number, kind in enumerate(KINDS):
        chosen_B = kind_B == number
        for attribute, name in enumerate(kind):
            same_BO = values[name] == asked[name][:, None]
            matches_BO = torch.where(chosen_B[:, None], matches_BO & same_BO, matches_BO)
            if attribute == 0:
                first_B = torch.where(chosen_B, asked[name], first_B)
            else:
                second_B = torch.where(chosen_B, asked[name], second_B)
    return place(upto(len(DETERMINERS)), kind_B, shape_B, first_B, second_B), matches_BO.any(1)


def normalise(images_BCHW: Tensor) -> Tensor:
    """[0, 1] RGB to the model's input."""
    mean = images_BCHW.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    return (images_BCHW - mean) / images_BCHW.new_tensor(IMAGE_STD).view(1, 3, 1, 1)


def train_vqa(
    model: BlipForQuestionAnswering,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
) -> float:
    """Trains `model` in place; returns its accuracy over the last hundred steps or so."""
    specs, weights = training_prompts()
    # A prompt that names an attribute is worth more here than one that does not.
    weights = [
        weight * (1 + 3 * bool(spec.textures or spec.forms or any(color != ANY for color in spec.colors)))
        for spec, weight in zip(specs, weights, strict=True)
    ]
    table, probability = PromptTable.build(specs, device), torch.tensor(weights, device=device)
    named_P = torch.tensor([bool(spec.forms) for spec in specs], device=device)
    phrases = Phrases.build(tokenizer, device)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([NO, YES]), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    right = RunningMean(device)

    def step_loss() -> Tensor:
        index = torch.multinomial(probability, batch, replacement=True, generator=generator)
        scenes = sample_scenes(table, index, generator)
        image = wear(render(scenes, generator)[0], generator)
        question, truth = ask(scenes, named_P[index], generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = answer_logits(model, normalise(image), phrases.ids_QT[question], phrases.mask_QT[question])
        yes = logits[:, answers[1]] > logits[:, answers[0]]
        right.add((yes == truth).float().mean())
        return F.cross_entropy(logits.float(), answers[truth.long()])

    fit(
        "vqa",
        model,
        step_loss,
        steps=steps,
        device=device,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        average_decay=AVERAGE_DECAY,
    )
    return right.mean.item()
