"""Colour, shape and texture: BLIP-VQA, one question for each noun phrase of the prompt."""

import math
from collections.abc import Sequence

import numpy as np

from evaluators.base import Language, QuestionAnswerer
from evaluators.compbench.judgment import Judgment
from evaluators.modes import Mode

NO_QUESTION = ("top", "the side", "the left", "the right")  # noun phrases that are places: upstream's list ...
# ... and what `corrected` adds: of "on side of" and "on the bottom of" upstream asks whether the image shows that.
PLACES = tuple(article + place for place in ("top", "bottom", "side", "left", "right") for article in ("", "the "))
MOST_QUESTIONS = 8
DECIMALS = 4


def questions_of(prompt: str, language: Language, mode: Mode = "compatible") -> list[str]:
    """What is asked about an image of this prompt."""
    left_out = PLACES if mode == "corrected" else NO_QUESTION
    chunks = [chunk for chunk in language.noun_chunks(prompt) if chunk not in left_out]
    return [f"{chunk}?" for chunk in chunks[:MOST_QUESTIONS]]


def product(answers: Sequence[float]) -> float:
    """Product of an image's answers, each rounded first. Without a question it is 1, the protocol's value."""
    return round(math.prod(round(answer, DECIMALS) for answer in answers), DECIMALS)


class AttributeJudge:
    """Asks for each noun phrase of a prompt whether the image shows it."""

    def __init__(self, answerer: QuestionAnswerer, language: Language, mode: Mode = "compatible") -> None:
        self.answerer = answerer
        self.language = language
        self.mode: Mode = mode

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        """One judgment for each image; its details are the questions with the probability of a yes."""
        asked = [questions_of(prompt, self.language, self.mode) for prompt in prompts]
        shown = [image for image, questions in zip(images, asked, strict=True) for _ in questions]
        answers = iter(self.answerer.probability_of_yes(shown, [one for questions in asked for one in questions]))
        judgments = []
        for questions in asked:
            found = [(question, next(answers)) for question in questions]
            details = [{"question": question, "answer": round(answer, DECIMALS)} for question, answer in found]
            judgments.append(Judgment(product([answer for _, answer in found]), details))
        return judgments
