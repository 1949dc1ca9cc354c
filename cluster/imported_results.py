"""Scores that were given elsewhere: the result files of an official folder, and an actor that hands them out.

geneval          results.jsonl: filename, correct, reason, details, ...
t2i-compbench    <category>/<its annotation folder>/vqa_result.json: [{"question_id", "answer"}, ...]
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from bitflux_core.errors import UserError
from cluster.evaluator import EvaluatorActor, ImageToScore
from cluster.image_layouts import GENEVAL_RESULTS, Place, compbench_results
from cluster.imported_images import ImageFolder
from cluster.plan import ShardKey
from cluster.rows import ScoredImage
from cluster.store import ResultStore
from evaluators.base import NoImage, Score, image_fault

THEIR_SCORES = "their scores"  # the reason of a score that says none itself


@dataclass(frozen=True)
class RecordedScores:
    """An evaluator that looks at nothing: scores by prompt and image. `fingerprint` is of the result files' bytes."""

    scores: Mapping[Place, Score]
    fingerprint: str

    def score(self, images: Sequence[np.ndarray | NoImage], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """The score recorded for each image, or an error; `metadata` hold each one's `place`."""
        return [
            self.scores.get(about["place"])
            or Score.failed(image_fault(image) or "the result files have no score of it")
            for image, about in zip(images, metadata, strict=True)
        ]


class RecordedEvaluator(EvaluatorActor):
    """Has an evaluator's methods; its scores are those of one benchmark's result files."""

    def __init__(self, benchmark: str, recorded: RecordedScores, store: ResultStore) -> None:
        super().__init__({}, {}, store)
        self._evaluators = {benchmark: recorded}  # type: ignore[dict-item]

    def start(self) -> None:
        """Nothing to load."""

    def score(
        self, key: ShardKey, wanted: list[ImageToScore], images: Sequence[np.ndarray | NoImage]
    ) -> list[ScoredImage]:
        placed = [replace(image, metadata={"place": (image.prompt_index, image.image_index)}) for image in wanted]
        return super().score(key, placed, images)


def read_results(folder: ImageFolder, layout: str, found: Mapping[Place, str]) -> RecordedScores:
    """The scores of the images `found` in a folder. UserError where it has no result file, or one that is damaged."""
    files = [GENEVAL_RESULTS] if layout == "geneval" else sorted({compbench_results(name) for name in found.values()})
    contents = {name: folder.read(name) for name in files if name in folder.sizes}
    if not contents:
        raise UserError(f"folder {folder.uri}: no result file {files[0]} there; leave out --their-scores")
    by_name: dict[str, Score] = {}
    for name, content in contents.items():
        images = sorted(image for image in found.values() if layout == "geneval" or compbench_results(image) == name)
        try:
            by_name |= dict(_geneval(content) if layout == "geneval" else _compbench(content, images))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder.uri}/{name}: not a result file of {layout} ({error!r})") from error
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents.values()))
    scores = {place: by_name[image] for place, image in found.items() if image in by_name}
    return RecordedScores(scores, digest.hexdigest()[:16])


def _geneval(content: bytes) -> Iterator[tuple[str, Score]]:
    for line in content.decode().splitlines():
        result = json.loads(line)
        detections = [
            {"label": label, "score": score, "box": box}
            for label, objects in json.loads(result["details"]).items()
            for *box, score in objects
        ]
        detections.sort(key=lambda found: -found["score"])
        correct = bool(result["correct"])
        # Upstream's names begin with the folder as it was called where they were scored.
        name = "/".join(PurePosixPath(result["filename"]).parts[-3:])
        yield name, Score(float(correct), correct, result["reason"], detections)


def _compbench(content: bytes, images: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """Upstream numbers results by the files' own numbers in some categories, by their order in others."""
    answers: dict[int, float] = {}
    for result in json.loads(content):
        question, answer = int(result["question_id"]), float(result["answer"])
        if question in answers:
            raise ValueError(f"question_id {question} stands there twice")
        if not math.isfinite(answer):
            raise ValueError(f"the answer to question_id {question} is no number")
        answers[question] = answer
    numbers = {name: int(re.findall(r"\d+", name)[-1]) for name in images}
    in_order = sorted(images, key=lambda name: numbers[name])
    by_number = answers.keys() == set(numbers.values())
    if not by_number and answers.keys() == set(range(len(images))):
        numbers = {name: place for place, name in enumerate(in_order)}
    for name in in_order:
        if numbers[name] in answers:
            yield name, Score(answers[numbers[name]], None, THEIR_SCORES)
