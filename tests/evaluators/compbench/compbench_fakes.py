"""Detections, words and depths as tests want them."""

import re

from evaluators.base import Detection, Word


class Found:
    """A PromptedDetector that has found these things in every image, whatever it is asked for."""

    fingerprint = "found"

    def __init__(self, *detections):
        self.detections = list(detections)
        self.asked = []

    def detect_named(self, images, names):
        self.asked += [tuple(some) for some in names]
        return [[one for one in self.detections if one.label in some] for some in names]


class Words:
    """A Language that knows these nouns."""

    name = fingerprint = "words"

    def __init__(self, *nouns):
        self.nouns = nouns

    def words(self, text):
        return [Word(w, "NOUN" if w.lower() in self.nouns else "X") for w in re.findall(r"\w+", text)]


def at(label, x, y, size=40.0, score=0.8):
    """A square detection around a point of the frame."""
    half = size / 2
    return Detection(label, score, (x - half, y - half, x + half, y + half))
