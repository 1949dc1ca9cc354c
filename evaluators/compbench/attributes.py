"""Colour, shape and texture: BLIP-VQA, one question for each noun phrase of the prompt."""

import math
from collections.abc import Sequence

import numpy as np

from evaluators.base import Language, QuestionAnswerer
from evaluators.compbench.judgment import Judgment

NO_QUESTION = ("top", "the side", "the left", "the right")  # noun phrases that are places
MOST_QUESTIONS = 8
DECIMALS = 4


def questions_of(prompt: str, language: Language) -> list[str]:
    """What is asked about an image of this prompt."""
    chunks = [chunk for chunk in language.noun_chunks(prompt) if chunk not in NO_QUESTION]
    return [f"{chunk}?" for chunk in chunks[:MOST_QUESTIONS]]


def product(answers: Sequence[float]) -> float:
    """Product of an image's answers, each rounded first. Without a question it is 1, the protocol's value."""
    return round(math.prod(round(answer, DECIMALS) for answer in answers), DECIMALS)


class AttributeJudge:
    """Asks for each noun phrase of a prompt whether the image shows it."""

    def __init__(self, answerer: QuestionAnswerer, language: Language) -> None:
        self.answerer = answerer
        self.language = language

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Judgment]:
        """One judgment for each image; its details are the questions with the probability of a yes."""
        asked = [questions_of(prompt, self.language) for prompt in prompts]
        shown = [image for image, questions in zip(images, asked, strict=True) for _ in questions]
        answers = iter(self.answerer.probability_of_yes(shown, [one for questions in asked for one in questions]))
        judgments = []
        for questions in asked:
            found = [(question, next(answers)) for question in questions]
            details = [{"question": question, "answer": round(answer, DECIMALS)} for question, answer in found]
            judgments.append(Judgment(product([answer for _, answer in found]), details))
        return judgments
