"""T2I-CompBench++'s multimodal judge: a model that describes an image, then grades how well it matches the prompt.

Upstream asks ShareGPT4V-7B; any image-text-to-text model of transformers takes its place here, in two turns each.
The wording is ours; what it asks, the grades and their values are the protocol's.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluators.base import Language, Score, image_fault
from evaluators.compbench.attributes import questions_of
from evaluators.compbench.categories import ATTRIBUTES
from evaluators.compbench.evaluator import check_metadata
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, unloadable

ROLE = "judge"
TEMPERATURE, TOP_P, NEW_TOKENS = 0.2, 0.7, 512
FOCUS = {
    "color": "saying which objects there are and the color of each",
    "shape": "saying which objects there are and the shape of each",
    "texture": "saying which objects there are and the texture of each",
    "spatial": "saying which objects there are and where they lie to each other",
    "3d_spatial": "saying which objects there are and which of them are in front of or behind others",
    "numeracy": "saying which objects there are and how many of each",
    "non_spatial": "saying who or what there is, what they do and how they relate to each other",
    "complex": "saying which objects there are, their attributes, numbers and places, and what they do",
}
DESCRIBE = "Describe this image in at most 50 words, {focus}."
GRADE = (
    'Going by your description and the image, how well does the image match "{text}"? Grade it from 1 to 5: 5 if it '
    "matches perfectly, 4 if it matches but for a detail, 3 if about half of it matches, 2 if little of it does, 1 if "
    "nothing does. {form}"
)
GRADE_OBJECT = (
    'Going by your description and the image, how well does the image show "{text}"? Grade it from 1 to 4: 4 if the '
    "object is there with that attribute, 3 if it mostly has it, 2 if the object is there without the attribute, 1 if "
    "there is no such object. {form}"
)
FORM = 'Answer in JSON: {"score": <grade>, "explanation": "<at most 20 words>"}'
VALUES = {grade: grade / 5 for grade in range(1, 6)}
OBJECT_VALUES = {1: 0.10, 2: 0.20, 3: 0.75, 4: 1.00}

Message = dict[str, Any]


class UnreadableAnswer(ValueError):
    """The judge's answer holds no grade: counted as such, never guessed."""


class MultimodalModel:
    """An image-text-to-text model in transformers' folder format, with its processor and chat template."""

    def __init__(self, model_dir: str | Path, device: str | torch.device = "cpu") -> None:
        """Raises UserError where the folder is missing, incomplete or damaged."""
        folder = model_folder(model_dir, ROLE, ("config.json",))
        self.model = load_pretrained(AutoModelForImageTextToText, folder, ROLE, device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise unloadable(folder, ROLE, fault) from fault
        self.device = torch.device(device)
        self.fingerprint = fingerprint(folder, TEMPERATURE, TOP_P, NEW_TOKENS)

    @exact_inference()
    def answer(self, messages: Sequence[Message], seed: int) -> str:
        """The next turn of a conversation; the same `seed` gives the same one."""
        inputs = self.processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(
                **inputs, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=NEW_TOKENS
            )
        asked = inputs["input_ids"].shape[1]
        return self.processor.decode(tokens[0, asked:], skip_special_tokens=True).strip()


def read_grade(answer: str, values: Mapping[int, float]) -> float:
    """The value of the grade in an answer: the `score` of the JSON objects there. Raises UnreadableAnswer where there
    is none, one that was not offered, or two that differ."""
    grades = {_grade(one["score"]) for one in _json_objects(answer) if "score" in one}
    if len(grades) != 1 or not grades <= values.keys():
        said = "more than one grade" if len(grades) > 1 else "no grade"
        raise UnreadableAnswer(f"the judge gave {said} of {min(values)} to {max(values)}: {answer[:120]!r}")
    return values[grades.pop()]


def _grade(score: object) -> int:
    """A whole number, whichever way it is written; 0, which is never offered, for anything else."""
    if isinstance(score, str) and len(score) == 1 and score.isdecimal():
        return int(score)
    if isinstance(score, float) and score.is_integer():
        return int(score)
    return score if isinstance(score, int) and not isinstance(score, bool) else 0


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand in a text, but for those inside others."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # ValueError also for a number of thousands of digits
            end = start + 1
        else:
            yield found
        start = text.find("{", end)


class JudgeEvaluator:
    """T2I-CompBench's categories by a multimodal model. The score is the mean of its grades' values."""

    def __init__(self, model: MultimodalModel, language: Language) -> None:
        self.model = model
        self.language = language
        wording = (DESCRIBE, GRADE, GRADE_OBJECT, FORM, FOCUS)
        self.fingerprint = fingerprint("t2i-compbench judge", *wording, model.fingerprint, language.fingerprint)

    def score(self, images: Sequence[np.ndarray], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each image; an answer without a grade is an error."""
        return [self._score(image, about) for image, about in zip(images, metadata, strict=True)]

    def _score(self, image: np.ndarray, about: Mapping[str, Any]) -> Score:
        try:
            check_metadata(about)
        except ValueError as fault:
            return Score.failed(str(fault))
        if fault_of_image := image_fault(image):
            return Score.failed(fault_of_image)
        category, prompt = about["category"], about["prompt"]
        asked, wording, values = [prompt], GRADE, VALUES
        if category in ATTRIBUTES:
            wording, values = GRADE_OBJECT, OBJECT_VALUES
            asked = [question.removesuffix("?") for question in questions_of(prompt, self.language)]
        if not asked:
            return Score.failed("the prompt names no object that could be graded")
        # The image and the prompt make the seed: the same ones get the same answers in any run.
        seed = zlib.crc32(image.tobytes(), zlib.crc32(prompt.encode()))
        turns = _conversation(image, category)
        description = self.model.answer(turns, seed)
        turns.append(_turn("assistant", description))
        details: list[dict[str, Any]] = [{"description": description}]
        found = []
        try:
            for text in asked:
                answer = self.model.answer([*turns, _turn("user", wording.format(text=text, form=FORM))], seed)
                found.append(read_grade(answer, values))
                details.append({"asked": text, "answer": answer, "value": found[-1]})
        except UnreadableAnswer as error:
            return Score.failed(str(error))
        return Score(sum(found) / len(found), None, f"judge, {self.language.name}", details)


def _conversation(image: np.ndarray, category: str) -> list[Message]:
    text = DESCRIBE.format(focus=FOCUS[category])
    content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}
