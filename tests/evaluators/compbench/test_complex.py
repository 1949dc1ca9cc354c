"""3-in-1: which parts count, what of the prompt each sees, and the objects of a preposition."""

import numpy as np
import pytest

from evaluators.base import Word
from evaluators.compbench.complex import ComplexJudge, spatial_objects, without_adjectives
from evaluators.compbench.judgment import Judgment


def tagged(text):
    """Words from "cat/NOUN on/ADP"."""
    return [Word(*pair.split("/")) for pair in text.split()]


class Tagged:
    """A Language that is told the tags in the text itself."""

    name = fingerprint = "tagged"

    def words(self, text):
        return tagged(text)


class Judge:
    """Scores by the image, and remembers the texts."""

    def __init__(self, factor):
        self.factor = factor
        self.texts = []

    def judge(self, images, texts):
        self.texts += texts
        return [Judgment(self.factor * float(image[0, 0, 0]), [{"by": self.factor}]) for image in images]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("a/DET red/ADJ cat/NOUN on/ADP the/DET left/NOUN of/ADP a/DET dog/NOUN", ("cat", "on the left", "dog")),
        ("The/DET Cat/PROPN next/ADV to/ADP a/DET dog/NOUN", ("cat", "next to", "dog")),
        ("a/DET hat/NOUN on/ADP top/NOUN of/ADP a/DET rack/NOUN", ("hat", "on top of", "rack")),
        # Nearest before, first after.
        ("ant/NOUN cat/NOUN near/ADP dog/NOUN pig/NOUN", ("cat", "near", "dog")),
        # A noun after goes before proper nouns; of those the one that no other follows.
        ("cat/NOUN near/ADP Big/PROPN Ben/PROPN dog/NOUN", ("cat", "near", "dog")),
        ("cat/NOUN near/ADP Big/PROPN Ben/PROPN", ("cat", "near", "ben")),
        # The list's order, not the prompt's, decides which preposition.
        ("cat/NOUN near/ADP dog/NOUN next/ADV to/ADP pig/NOUN", ("dog", "next to", "pig")),
        ("near/ADP dog/NOUN", None),
        ("cat/NOUN near/ADP", None),
        ("cat/NOUN under/ADP dog/NOUN", None),
        ("nearly/ADV dog/NOUN", None),
    ],
)  # fmt: skip
def test_objects_of_a_preposition(words, found):
    assert spatial_objects(tagged(words)) == found


def test_adjectives_are_taken_out():
    text = "the/DET shiny/ADJ red/ADJ cat/NOUN ran/VERB ./PUNCT"
    assert without_adjectives(text, Tagged()) == "the cat ran ."


def test_each_kind_is_the_mean_of_its_parts():
    attributes, clip = Judge(1.0), Judge(0.1)
    triples = []

    def spatial(images, some):
        triples.extend(some)
        return [Judgment(0.5, [{"by": "spatial"}]) for _ in images]

    judge = ComplexJudge(attributes, spatial, clip, Tagged())
    prompts = ["cat/NOUN near/ADP dog/NOUN", "a/DET red/ADJ cat/NOUN ran/VERB", "cat/NOUN sat/VERB near/ADP pig/NOUN"]
    images = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3)]
    found = judge.judge(images, prompts, ["spatial", "action", "spatialaction"])
    assert [judgment.score for judgment in found] == [
        pytest.approx((0.5 + 1) / 2),
        pytest.approx((0.2 + 2) / 2),
        pytest.approx((3 + 0.5 + 0.3) / 3),
    ]
    assert attributes.texts == prompts
    assert clip.texts == ["a cat ran", "cat sat near pig"]
    assert triples == [("cat", "near", "dog"), ("cat", "near", "pig")]
    assert found[0].details == [{"spatial": 0.5, "attributes": 1.0}, {"by": "spatial"}, {"by": 1.0}]
