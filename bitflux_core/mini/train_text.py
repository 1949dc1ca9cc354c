"""Teaches the mini T5 the grammar of the world's prompts, from text alone, before it meets an image.

Left to the flow alone, the encoder stays a bag of words for very long: the images' loss hardly tells "a red star and a
blue ring" from "a blue star and a red ring". FLUX's T5 came pretrained on language; this is the mini's share of that.
Every noun learns to carry what is said of it (colour, texture, form, number) and its side of a relation; every token
keeps its own word.

Legend: B prompts, T tokens, D width, P all prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.models import TOKENS
from bitflux_core.mini.world import (
    ANY,
    COLORS,
    FORMS,
    HANGING,
    IN_FRONT,
    MAX_OBJECTS,
    NEXT_TO,
    OPPOSITE,
    PLURALS,
    SHAPES,
    TEXTURES,
    PromptSpec,
)
from bitflux_core.training import Progress, RunningMean, warmup_then_cosine

LEARNING_RATE = 1e-3
NO_LABEL = -100  # cross_entropy skips it
# What a relation makes of object 1, and of object 0. Those of the plane are each other's opposites.
SIDES = (
    *((relation, OPPOSITE[relation]) for relation in range(NEXT_TO)),
    (NEXT_TO, NEXT_TO),
    *((relation, relation + HANGING) for relation in range(IN_FRONT, HANGING + 1)),
)
NO_SIDE = max(max(pair) for pair in SIDES) + 1
QUESTIONS = {
    "color": len(COLORS) + 1,
    "texture": len(TEXTURES),
    "form": len(FORMS),
    "number": MAX_OBJECTS,
    "side": NO_SIDE + 1,
    "place": NO_SIDE + 1,  # of the object that a third one's place is told by, and of the third
}


def noun_labels(spec: PromptSpec) -> dict[str, list[int]]:
    """Per token of the prompt, the answer to each of `QUESTIONS` at its nouns, `NO_LABEL` elsewhere."""
    labels = {question: [NO_LABEL] * TOKENS for question in QUESTIONS}
    places = [place for place, word in enumerate(spec.text.split()) if word in SHAPES or word in PLURALS]
    for place, index in zip(places, spec.nouns, strict=True):
        color = spec.colors[index]
        labels["color"][place] = len(COLORS) if color == ANY else color
        labels["texture"][place] = spec.textures[index] if spec.textures else 0
        labels["form"][place] = spec.forms[index] if spec.forms else 0
        labels["number"][place] = spec.shapes.count(spec.shapes[index]) - 1
        labels["side"][place] = _side(spec.relation, index)
        labels["place"][place] = _side(spec.third, {0: 0, 2: 1}.get(index, 2))
    return labels


def _side(relation: int, index: int) -> int:
    """What a relation makes of object 1, or of object 0; of others nothing."""
    return NO_SIDE if relation == ANY or index > 1 else SIDES[relation][1 - index]


def train_text(
    t5: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, *, steps: int, batch: int, device: torch.device, seed: int
) -> dict[str, float]:
    """Trains `t5` in place; returns the accuracy of each question over the last batch."""
    torch.manual_seed(seed)
    specs, weights = training_prompts()
    probability = torch.tensor(weights, device=device)
    texts = [spec.text for spec in specs]
    ids_PT = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids.to(device)
    answers = [noun_labels(spec) for spec in specs]
    labels = {question: torch.tensor([a[question] for a in answers], device=device) for question in QUESTIONS}
    labels["word"], sizes = ids_PT, {**QUESTIONS, "word": len(tokenizer)}
    t5.to(device).float().train()
    probes = nn.ModuleDict({question: nn.Linear(t5.config.d_model, size) for question, size in sizes.items()}).to(
        device
    )
    optimizer = torch.optim.AdamW([*t5.parameters(), *probes.parameters()], lr=0.0, betas=(0.9, 0.98))
    progress, loss_mean = Progress("text", steps), RunningMean(device)
    accuracy: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup_then_cosine(step, steps, warmup=20)
        chosen_B = torch.multinomial(probability, batch, replacement=True)
        hidden_BTD = t5(input_ids=ids_PT[chosen_B]).last_hidden_state
        losses = []
        for question, probe in probes.items():
            logits, target_BT = probe(hidden_BTD), labels[question][chosen_B]
            losses.append(F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), ignore_index=NO_LABEL))
            if step + 1 == steps:
                accuracy[question] = _accuracy(logits, target_BT)
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_mean.add(loss)
        progress.report(step, loss_mean.mean)
    t5.eval()
    return accuracy


def _accuracy(logits: Tensor, target: Tensor) -> float:
    asked = target != NO_LABEL
    return (logits.argmax(-1)[asked] == target[asked]).float().mean().item()
