"""Trains the mini VQA model on rendered scenes: is there such an object in the picture?

Questions are the noun phrases of the prompts ("a striped heart?"), asked so that about half are true, and that what is
false is nearly true: another object's colour, a colour that is not there, a shape that is not there. A yes or no
teaches the vision model so little that answers stay at chance for thousands of steps; each of its patches therefore
also learns to say what it shows, and each word of a question where to look and whether it holds there, by heads that
are thrown away.

Legend: B scenes, O object slots, Q questions, T tokens, S the class token and the patches, D width, P patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipForQuestionAnswering, PreTrainedTokenizerFast

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.render import NO_SHAPE, PromptTable, Scenes, render, sample_scenes
from bitflux_core.mini.train_detector import wear
from bitflux_core.mini.vqa import IMAGE_MEAN, IMAGE_STD, NO, PATCH, QUESTION_TOKENS, YES, question_tokens, read
from bitflux_core.mini.world import ANY, COLORS, FORMS, MAX_OBJECTS, SHAPES, TEXTURES, article
from bitflux_core.training import RunningMean, fit

LEARNING_RATE = 1e-3
AVERAGE_DECAY = 0.998
LOOKING = 0.3  # weight of where the words look
QUESTIONS = 8  # about each scene: the vision model is the dear part
SEEN, EMPTY = 0.1, 0.01  # share of a patch from which on it shows an object, and up to which it shows none
NO_LABEL = -100  # cross_entropy skips it
DETERMINERS = ("a", "the")
# What a phrase says besides the shape, by attribute; the order of the words is the phrase's.
FIRST_WORD = 2  # of a question's tokens, after [ENC] and the determiner
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


@dataclass(frozen=True)
class Questions:
    """One about each scene.

    Attributes:
        number_B: its place in `all_phrases`.
        true_B: whether the scene shows such an object.
        looked_at_BO: the objects that it describes or, where there is none, those of its shape.
        holds_BT: by word 1 where it holds of an object looked at and 0 where of none, `NO_LABEL` elsewhere.
    """

    number_B: Tensor
    true_B: Tensor
    looked_at_BO: Tensor
    holds_BT: Tensor


def ask(scenes: Scenes, named_B: Tensor, generator: torch.Generator) -> Questions:
    """`named_B`: the prompt gives every form."""
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

    has_BO = {name: values_BO == asked[name][:, None] for name, values_BO in values.items()}
    same_shape_BO = present_BO & (scenes.shapes_BO == shape_B[:, None])
    matches_BO = same_shape_BO
    first_B, second_B = torch.zeros_like(shape_B), torch.zeros_like(shape_B)
    for number, kind in enumerate(KINDS):
        chosen_B = kind_B == number
        for attribute, name in enumerate(kind):
            matches_BO = torch.where(chosen_B[:, None], matches_BO & has_BO[name], matches_BO)
            if attribute == 0:
                first_B = torch.where(chosen_B, asked[name], first_B)
            else:
                second_B = torch.where(chosen_B, asked[name], second_B)
    true_B, there_B = matches_BO.any(1), same_shape_BO.any(1)
    looked_at_BO = torch.where(true_B[:, None], matches_BO, same_shape_BO)
    holds_BT = torch.full((batch, QUESTION_TOKENS), NO_LABEL, device=device)
    for number, kind in enumerate(KINDS):
        chosen_B = kind_B == number
        for attribute, name in enumerate(kind):
            word = FIRST_WORD + attribute
            of_it_B = (looked_at_BO & has_BO[name]).any(1).long()
            holds_BT[:, word] = torch.where(chosen_B & there_B, of_it_B, holds_BT[:, word])
        noun = FIRST_WORD + len(kind)
        holds_BT[:, noun] = torch.where(chosen_B, there_B.long(), holds_BT[:, noun])
    number_B = place(upto(len(DETERMINERS)), kind_B, shape_B, first_B, second_B)
    return Questions(number_B, true_B, looked_at_BO, holds_BT)


def normalise(images_BCHW: Tensor) -> Tensor:
    """[0, 1] RGB to the model's input."""
    mean = images_BCHW.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    return (images_BCHW - mean) / images_BCHW.new_tensor(IMAGE_STD).view(1, 3, 1, 1)


class Heads(nn.Module):
    """What each patch shows, a shape or none, a colour, a texture, a form; and whether each word holds."""

    def __init__(self, width: int):
        super().__init__()
        sizes = {"shape": len(SHAPES) + 1, "color": len(COLORS), "texture": len(TEXTURES), "form": len(FORMS)}
        self.patches = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.words = nn.Linear(width, 2)

    def patch_loss(self, image_BSD: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean over the attributes; `labels` [B, P] by their names."""
        losses = [_labelled_loss(head(image_BSD[:, 1:]), labels[name]) for name, head in self.patches.items()]
        return torch.stack(losses).mean()

    def word_loss(self, words_QTD: Tensor, holds_QT: Tensor) -> Tensor:
        return _labelled_loss(self.words(words_QTD), holds_QT)


def _labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are given; 0 where none is."""
    total = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def patch_shares(masks_BOHW: Tensor) -> Tensor:
    """How much of each patch each object fills, [B, O, P]."""
    return F.avg_pool2d(masks_BOHW.float(), PATCH).flatten(2)


def patch_labels(scenes: Scenes, shares_BOP: Tensor, named_B: Tensor) -> dict[str, Tensor]:
    """Of the object that fills most of each patch, [B, P]; `NO_LABEL` where too little of it is there to tell."""
    most_BP, slot_BP = shares_BOP.max(dim=1)
    seen_BP = most_BP > SEEN
    shape_BP = scenes.shapes_BO.gather(1, slot_BP)
    labels = {"shape": torch.where(seen_BP, shape_BP, torch.where(most_BP < EMPTY, NO_SHAPE, NO_LABEL))}
    for name, values_BO in (("color", scenes.colors_BO), ("texture", scenes.textures_BO), ("form", scenes.forms_BO)):
        told_BP = seen_BP & named_B[:, None] if name == "form" else seen_BP  # else the form is any
        labels[name] = torch.where(told_BP, values_BO.gather(1, slot_BP), NO_LABEL)
    return labels


def look_loss(attention_QHTS: Tensor, mask_QT: Tensor, shares_QOP: Tensor, looked_at_QO: Tensor) -> Tensor:
    """How far a question's words look beside the objects that it is about: -log of the attention on their patches.

    Questions about what is not there do not count. `shares_QOP`: how much of each patch an object fills.
    """
    target_QP = ((shares_QOP > SEEN) & looked_at_QO[..., None]).any(1)
    on_target_QT = (attention_QHTS.float().mean(1)[..., 1:] * target_QP[:, None]).sum(-1)
    counted_QT = mask_QT.bool() & target_QP.any(1)[:, None]
    return -(on_target_QT.clamp(min=1e-6).log() * counted_QT).sum() / counted_QT.sum().clamp(min=1)


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
    specs, weights = training_prompts(every_pair=True)
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
    heads = Heads(model.config.vision_config.hidden_size)

    def step_loss() -> Tensor:
        index = torch.multinomial(probability, batch, replacement=True, generator=generator)
        scenes = sample_scenes(table, index, generator)
        image, masks = render(scenes, generator)
        each = Scenes(*(part.repeat_interleave(QUESTIONS, 0) for part in vars(scenes).values()))
        asked = ask(each, named_P[index].repeat_interleave(QUESTIONS), generator)
        ids_QT, mask_QT = phrases.ids_QT[asked.number_B], phrases.mask_QT[asked.number_B]
        shares_BOP = patch_shares(masks)
        with torch.autocast(device.type, torch.bfloat16):
            pixels = normalise(wear(image, generator))
            image_BSD = model.vision_model(pixel_values=pixels).last_hidden_state
            reading = read(model, image_BSD.repeat_interleave(QUESTIONS, 0), ids_QT, mask_QT)
            told = heads.patch_loss(image_BSD, patch_labels(scenes, shares_BOP, named_P[index]))
            told = told + heads.word_loss(reading.words_BTD, asked.holds_BT)
        shares_QOP = shares_BOP.repeat_interleave(QUESTIONS, 0)
        looking = look_loss(reading.attention[-1], mask_QT, shares_QOP, asked.looked_at_BO)
        yes = reading.logits_BV[:, answers[1]] > reading.logits_BV[:, answers[0]]
        right.add((yes == asked.true_B).float().mean())
        answered = F.cross_entropy(reading.logits_BV.float(), answers[asked.true_B.long()])
        return answered + told + LOOKING * looking

    fit(
        "vqa",
        nn.ModuleList([model, heads]),
        step_loss,
        steps=steps,
        device=device,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        average_decay=AVERAGE_DECAY,
    )
    return right.mean.item()
