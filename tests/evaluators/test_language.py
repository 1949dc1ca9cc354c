"""Words and noun chunks: by rules on the benchmarks' own prompts, and what is said where spaCy is missing."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitflux_core.errors import UserError
from evaluators import language as module
from evaluators.language import RuleLanguage, SpacyLanguage, language

UPSTREAM = Path(__file__).parents[3] / "shared" / "benchmarks" / "t2i-compbench"
RULES = RuleLanguage()


@pytest.fixture
def upstream() -> Path:
    if not UPSTREAM.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{UPSTREAM} is missing")
        pytest.skip(f"{UPSTREAM} is absent")
    return UPSTREAM


def prompts(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def tags(text: str) -> str:
    return " ".join(f"{word.text}/{word.tag}" for word in RULES.words(text))


# --- the benchmarks' prompts -----------------------------------------------------------------------------------------

# "a X and a Y" where X and Y hold no further phrase: the two are the chunks, whatever tool finds them.
PAIR = re.compile(r"(an? .+?) and (an? .+?)\.?")
LONGER = re.compile(r"\b(?:of|with|on|in|is|are|sits|that|at)\b|,")


def chunk_accuracy(lines: list[str]) -> tuple[int, int]:
    pairs = [(line, match) for line in lines if (match := PAIR.fullmatch(line)) and not LONGER.search(line)]
    return sum(RULES.noun_chunks(line) == list(match.groups()) for line, match in pairs), len(pairs)


@pytest.mark.parametrize(
    ("file", "right", "pairs"),
    [
        ("color_val.txt", 237, 237),
        ("shape_val.txt", 219, 219),
        ("texture_val.txt", 197, 197),
        ("color_train.txt", 559, 561),  # "a white bathroom a sink and a brown mirror" is three phrases
        ("shape_train.txt", 520, 520),
        ("texture_train.txt", 474, 474),
    ],
)
def test_two_attributed_objects_are_two_chunks(upstream, file, right, pairs):
    assert chunk_accuracy(prompts(upstream / file)) == (right, pairs)


@pytest.mark.parametrize("category", ["spatial", "3d_spatial"])
def test_the_first_and_last_nouns_are_the_two_objects(upstream, category):
    pattern = re.compile(r"an? (\w+) (?:on|next to|near|in front of|behind|hidden by)\b.*?\ban? (\w+)")
    right = 0
    lines = prompts(upstream / f"{category}_val.txt")
    for line in lines:
        nouns = [word.text for word in RULES.words(line) if word.tag == "NOUN"]
        match = pattern.fullmatch(line)
        right += match is not None and [nouns[0], nouns[-1]] == list(match.groups())
    assert (right, len(lines)) == (300, 300)


def test_complex_prompts_of_two_objects_lose_their_adjectives(upstream):
    """The [properties] X was on top of the [properties] Y": what is left holds no property of either."""
    lines = prompts(upstream / "complex_val_spatial.txt")
    pattern = re.compile(
        r"The (?:\w+ ){0,3}\w+ (?:was|is|were) (?:on top of|on the left of|on the right of|next to) the .*\."
    )
    assert all(pattern.fullmatch(line) for line in lines)
    properties = (
        "red black white blue green round square oval wooden striped fluffy soft hard silver yellow brown tiled"
    )
    for line in lines:
        kept = {word.text for word in RULES.words(line) if word.tag != "ADJ"}
        assert not kept & set(properties.split()), line


# --- single cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a photo of a red circle left of a striped blue square", "a photo|a red circle|a striped blue square"),
        ("a photo of two hearts and one star", "a photo|two hearts|one star"),
        ("a photo of a dotted ring touching a green moon", "a photo|a dotted ring|a green moon"),
        ("a photo of a black cross on the right of a star", "a photo|a black cross|the right|a star"),
        ("a green bench and a blue bowl", "a green bench|a blue bowl"),
        ("a red orange and a brown sheep", "a red orange|a brown sheep"),
        ("an orange cup", "an orange cup"),
        ("a square hidden by a heart", "a square|a heart"),
        ("a square painted box", "a square painted box"),
        ("a red apple on top of the table", "a red apple|top|the table"),
        ("The white and yellow clock with a red roof reads 11:44.", "The white and yellow clock|a red roof"),
        (
            "two white sheep, a black goat and a white goat in a field",
            "two white sheep|a black goat|a white goat|a field",
        ),
        ("A long, narrow yellow kitchen", "A long, narrow yellow kitchen"),
        ("a cubic Rubik's cube and a pentagonal game box", "a cubic Rubik's cube|a pentagonal game box"),
        ("a cubic book and a cylindrical can of soup", "a cubic book|a cylindrical can|soup"),
        (
            "The glass vase and metallic frame display the wooden flowers",
            "The glass vase|metallic frame|the wooden flowers",
        ),
        (
            "The leather couch and fluffy pillow provide comfort on the wooden floor",
            "The leather couch|fluffy pillow|comfort|the wooden floor",
        ),
        ("The round rug was the only thing left in it.", "The round rug|the only thing|it"),
        ("The smooth stone lay near their sheer, towering cliffs", "The smooth stone|their sheer, towering cliffs"),
        ("a café crème and a naïve 日本 vase", "a café crème|a naïve 日本 vase"),
        (
            "an e\u0301clair and a nai\u0308ve vase",
            "an \u00e9clair|a na\u00efve vase",
        ),  # marks that follow their letters
        ("running quickly", ""),
        ("", ""),
        (" \n", ""),
        ("?! 🎉", ""),
    ],
)
def test_chunks(text, chunks):
    assert RULES.noun_chunks(text) == [chunk for chunk in chunks.split("|") if chunk]


@pytest.mark.parametrize(
    ("text", "tagged"),
    [
        (
            "The sleek sports car drove past the bulky grey SUV.",
            "The/DET sleek/ADJ sports/NOUN car/NOUN drove/VERB past/ADP the/DET bulky/ADJ grey/ADJ SUV/PROPN ./PUNCT",
        ),
        ("A dog is wagging its tail", "A/DET dog/NOUN is/AUX wagging/VERB its/PRON tail/NOUN"),
        ("the circle is red", "the/DET circle/NOUN is/AUX red/ADJ"),
        ("3 cups gently rest on it", "3/NUM cups/NOUN gently/ADV rest/VERB on/ADP it/PRON"),
        ("a red-colored diamond-shaped kite", "a/DET red-colored/ADJ diamond-shaped/ADJ kite/NOUN"),
        ("", ""),
    ],
)
def test_tags(text, tagged):
    assert tags(text) == tagged


def test_an_accent_is_part_of_its_word_however_it_is_encoded():
    assert (
        tags("a cre\u0300me e\u0301clair")
        == tags("a cr\u00e8me \u00e9clair")
        == "a/DET cr\u00e8me/NOUN \u00e9clair/NOUN"
    )


def test_words_lose_nothing_but_spaces():
    text = "A chef's hat — 11:44, «naïve» mid-air!"
    assert "".join(word.text for word in RULES.words(text)) == text.replace(" ", "")


# --- which tool ------------------------------------------------------------------------------------------------------


def test_auto_is_the_rules_where_spacy_is_missing(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert language("auto").name == language("rules").name == "rules"
    assert language().fingerprint == RuleLanguage.fingerprint


def test_spacy_without_itself_or_its_model_says_how_to_install_both(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"uv pip install spacy.*spacy download en_core_web_sm"):
        language("spacy")

    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'.\nIt doesn't seem to be a package.")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load, __version__="3.8"))
    with pytest.raises(UserError, match="Can't find model") as caught:
        language("spacy")
    assert "\n" not in str(caught.value)


def test_another_name_is_an_error():
    with pytest.raises(UserError, match="'nltk': choose one of auto, spacy, rules"):
        language("nltk")


def test_spacy_is_asked_once_a_text_and_named_with_its_versions(monkeypatch):
    asked = []

    class Doc(list):
        noun_chunks = (SimpleNamespace(text="a café"),)

    def pipeline(text):
        asked.append(text)
        return Doc(
            [
                SimpleNamespace(text="a", pos_="DET", is_space=False),
                SimpleNamespace(text=" ", pos_="SPACE", is_space=True),
            ]
        )

    pipeline.meta = {"version": "3.8.0"}
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: pipeline, __version__="3.8.18"))
    tool = SpacyLanguage()
    assert [(word.text, word.tag) for word in tool.words("a café")] == [("a", "DET")]
    assert tool.noun_chunks("a café") == ["a café"]
    assert asked == ["a café"]
    before = tool.fingerprint
    pipeline.meta = {"version": "3.7.1"}
    assert SpacyLanguage().fingerprint != before
