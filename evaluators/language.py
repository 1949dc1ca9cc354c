"""Words and noun chunks of English prompts: by spaCy, as the protocols ask, or by rules where it is missing."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from bitflux_core.errors import UserError
from evaluators import english
from evaluators.base import Language, Word
from evaluators.inference import fingerprint

SPACY_MODEL = "en_core_web_sm"
INSTALL_SPACY = f"`uv pip install spacy`, then its model by `uv run python -m spacy download {SPACY_MODEL}`"
LANGUAGES = ("auto", "spacy", "rules")
RULES_VERSION = 2  # raised with every change of the rules or word lists that can change a tag or a chunk

_TOKEN = re.compile(r"['\u2019]s\b|\w+(?:[:.,]\d+)+|\w+(?:-\w+)*|[^\w\s]")


def language(name: str = "auto") -> Language:
    """The tool of this name; "auto" is spaCy where it and its model are installed, else the rules.

    Raises UserError for another name, or where spaCy is asked for by name and not installed.
    """
    if name not in LANGUAGES:
        raise UserError(f"there is no language tool {name!r}: choose one of {', '.join(LANGUAGES)}")
    if name == "auto":
        name = "spacy" if find_spec("spacy") and find_spec(SPACY_MODEL) else "rules"
    return SpacyLanguage() if name == "spacy" else RuleLanguage()


class SpacyLanguage:
    """spaCy with its small English model: what the published scores were taken with."""

    name = "spacy"

    def __init__(self) -> None:
        """Raises UserError where spaCy or its model is not installed."""
        try:
            import spacy

            self._pipeline: Any = spacy.load(SPACY_MODEL)
        except (ImportError, OSError) as fault:
            reason = str(fault).splitlines()[0]
            raise UserError(f"spaCy or its model {SPACY_MODEL} is missing ({reason}): {INSTALL_SPACY}") from fault
        self.fingerprint = fingerprint("spacy", spacy.__version__, SPACY_MODEL, self._pipeline.meta["version"])
        # The evaluators ask several things about each prompt, and a prompt has several images.
        self._parse: Callable[[str], Any] = lru_cache(maxsize=4096)(self._pipeline)

    def words(self, text: str) -> list[Word]:
        """The words and punctuation marks of a text, in order."""
        return [Word(token.text, token.pos_) for token in self._parse(text) if not token.is_space]

    def noun_chunks(self, text: str) -> list[str]:
        """spaCy's noun chunks, in order."""
        return [chunk.text for chunk in self._parse(text).noun_chunks]


@dataclass
class _Token:
    """A word where it stands in the text. `guess` is what it may be by itself, `tag` what it is in its place."""

    text: str
    start: int
    end: int
    guess: str
    tag: str = ""

    @property
    def lower(self) -> str:
        return self.text.lower()


class RuleLanguage:
    """Word lists, endings and a word's neighbours: enough for the benchmarks' plain English, no more.

    A word that no list or ending knows is a noun. Chunks follow spaCy's habits: determiners and all that stands before
    the noun belong to it, coordinated adjectives too ("a black and white cat"), and pronouns are chunks of their own.
    """

    name = "rules"
    fingerprint = fingerprint("rules", RULES_VERSION)

    def words(self, text: str) -> list[Word]:
        """The words and punctuation marks of a text, in order."""
        return [Word(token.text, token.tag) for token in _tagged(_composed(text))]

    def noun_chunks(self, text: str) -> list[str]:
        """Its noun phrases, in order, as they stand."""
        text = _composed(text)
        tokens = _tagged(text)
        chunks: list[str] = []
        start = 0
        while start < len(tokens):
            stop = _chunk_end(tokens, start)
            if stop is None:
                start += 1
                continue
            chunks.append(text[tokens[start].start : tokens[stop - 1].end])
            start = stop
        return chunks


def _composed(text: str) -> str:
    """The text with each accented letter as one character: a mark by itself belongs to no word."""
    return unicodedata.normalize("NFC", text)


def _tagged(text: str) -> list[_Token]:
    found = [(match.group(), match.start(), match.end()) for match in _TOKEN.finditer(text)]
    tokens = [_Token(word, start, end, _guess(word)) for word, start, end in found]
    for index, token in enumerate(tokens):
        token.tag = _tag(tokens, index)
    return tokens


# Guesses: a universal tag where a word can be only that; ADJ|NOUN, VERB|NOUN; ING and ED by their endings.


def _guess(word: str) -> str:
    lower = word.lower()
    for words, tag in _CLOSED:
        if lower in words:
            return tag
    if not lower[0].isalpha():
        return "NUM" if lower[0].isdigit() else "PUNCT"
    if lower in english.ADJECTIVES_OR_NOUNS:
        return "ADJ|NOUN"
    if lower in english.ADJECTIVES:
        return "ADJ"
    if lower in english.NOUNS_LIKE_PARTICIPLES:
        return "NOUN"
    if lower.endswith("ly") and len(lower) > 4 and lower not in english.NOT_ADVERBS:
        return "ADV"
    if lower.endswith(english.ADJECTIVE_ENDINGS) and len(lower) > 5 and lower not in english.NOT_ADJECTIVES:
        return "ADJ"
    if lower.endswith("ing") and len(lower) > 4:
        return "ING"
    if lower in english.PAST_FORMS or (lower.endswith("ed") and not lower.endswith("eed") and len(lower) > 3):
        return "ED"
    bases = _bases(lower)
    if not bases.isdisjoint(english.VERBS):
        return "VERB"
    return "NOUN" if bases.isdisjoint(english.VERBS_OR_NOUNS) else "VERB|NOUN"


_CLOSED = (
    (english.DETERMINERS, "DET"),
    (english.POSSESSIVES, "PRON"),
    (english.PRONOUNS, "PRON"),
    (english.PREPOSITIONS, "ADP"),
    (english.COORDINATORS, "CCONJ"),
    (english.SUBORDINATORS, "SCONJ"),
    (english.AUXILIARIES, "AUX"),
    (english.PARTICLES, "PART"),
    (english.NUMBERS, "NUM"),
    (english.ADVERBS, "ADV"),
)


def _bases(lower: str) -> set[str]:
    """The forms that a word may be the plain or the -s form of."""
    bases = {lower}
    if lower.endswith("s") and not lower.endswith("ss"):
        bases.add(lower[:-1])
        if lower.endswith("es"):
            bases.add(lower[:-2])
        if lower.endswith("ies"):
            bases.add(lower[:-3] + "y")
    return bases


_BEFORE_A_NOUN = ("DET", "ADJ", "NUM")
_NOMINAL_GUESSES = ("NOUN", "ADJ|NOUN", "VERB|NOUN", "ADJ")
_OPEN_GUESSES = (*_NOMINAL_GUESSES, "VERB", "ING", "ED")


def _tag(tokens: list[_Token], index: int) -> str:
    """The universal tag of a token whose predecessors have theirs."""
    token = tokens[index]
    after = tokens[index + 1].guess if index + 1 < len(tokens) else ""
    after_word = tokens[index + 1].lower if index + 1 < len(tokens) else ""
    inside = _inside_phrase(tokens, index)
    if token.lower in ("left", "right"):
        # "on the left", "the left shoe"; "a circle left of a square"; "the only pieces left"
        if inside:
            return "ADJ" if after in _NOMINAL_GUESSES else "NOUN"
        return "VERB" if token.lower == "left" and after_word != "of" else "ADV"
    if token.lower == "only" and inside:
        return "ADJ"
    if index and token.text[0].isupper() and tokens[index - 1].text not in ".!?" and token.guess in _OPEN_GUESSES:
        return "PROPN"
    match token.guess:
        case "ADJ|NOUN":
            return _adjective_or_noun(tokens, index, inside)
        case "ING" | "ED":
            if inside and after in _NOMINAL_GUESSES:
                return "ADJ"
            return "NOUN" if inside and token.guess == "ING" and _subject(tokens, index) is None else "VERB"
        case "AUX" if inside or (token.lower == "can" and after in ("", "PUNCT", "CCONJ", "ADP", "DET")):
            return "NOUN"  # "a can of soup"
        case "VERB":
            return "NOUN" if inside else "VERB"
        case "VERB|NOUN":
            return "VERB" if not inside and _is_verb(tokens, index, after, after_word) else "NOUN"
        case "NOUN":
            # Two noun phrases do not stand side by side: what is between them is the verb.
            is_verb = after == "DET" and not inside and _subject(tokens, index) and not _has_verb(tokens, index)
            return "VERB" if is_verb else "NOUN"
    return token.guess


def _inside_phrase(tokens: list[_Token], index: int) -> bool:
    """Whether the words before this one open a noun phrase that still lacks its noun."""
    if not index:
        return False
    before = tokens[index - 1]
    if before.tag == "ADV":
        return _inside_phrase(tokens, index - 1)
    if before.text == "," and index > 1 and tokens[index - 2].tag == "ADJ":
        return tokens[index].guess in ("ED", "ING") and _inside_phrase(tokens, index - 2)
    return before.tag in _BEFORE_A_NOUN or before.lower in english.POSSESSIVES or before.lower in english.GENITIVES


def _subject(tokens: list[_Token], index: int) -> _Token | None:
    """The noun or pronoun that ends right before this word, adverbs left out."""
    while index and tokens[index - 1].tag == "ADV":
        index -= 1
    before = tokens[index - 1] if index else None
    named = before and (before.tag in ("NOUN", "PROPN") or before.lower in english.PRONOUNS)
    return before if named else None


def _has_verb(tokens: list[_Token], index: int) -> bool:
    """Whether the clause that a word stands in already has its verb."""
    for token in reversed(tokens[:index]):
        if token.tag == "SCONJ" or token.text in ".;!?" or token.lower in ("which", "that", "who"):
            return False
        if token.tag in ("VERB", "AUX"):
            return True
    return False


def _verb_follows(tokens: list[_Token], index: int) -> bool:
    """Whether a word after this one can only be the clause's verb."""
    for before, token in zip(tokens[index:], tokens[index + 1 :], strict=False):
        if token.guess == "SCONJ" or token.text in ".;!?" or token.lower in ("which", "that", "who"):
            return False
        if token.guess == "AUX" or (token.guess in ("VERB", "ED") and "NOUN" in before.guess):
            return True
    return False


def _is_verb(tokens: list[_Token], index: int, after: str, after_word: str) -> bool:
    """Whether a word that can be verb or noun, and does not stand inside a phrase, is the verb."""
    before = tokens[index - 1] if index else None
    if before and (before.lower == "to" or (before.tag == "AUX" and before.lower not in ("is", "are", "was", "were"))):
        return True
    if _subject(tokens, index) is None or _has_verb(tokens, index) or _verb_follows(tokens, index):
        return False
    return after_word != "of" and after in ("DET", "PRON", "ADP", "ADJ", "ADJ|NOUN", "ADV", "NUM", "SCONJ")


def _adjective_or_noun(tokens: list[_Token], index: int, inside: bool) -> str:
    following = tokens[index + 1 : index + 5]
    if following and (following[0].guess == "CCONJ" or following[0].text == ","):
        # "a white and yellow clock", "a black, white and gold vase": every one belongs to the noun at the end
        while following and (following[0].guess in ("CCONJ", "ADJ", "ADJ|NOUN") or following[0].text == ","):
            closes = following[0].guess in ("ADJ", "ADJ|NOUN")
            following = following[1:]
            if closes and following and following[0].guess in ("NOUN", "VERB|NOUN", "ING", "ED"):
                return "ADJ"
    elif following and _could_be_named(tokens, index + 1, inside):
        return "ADJ"
    before = tokens[index - 1] if index else None
    return "ADJ" if before and before.tag in ("AUX", "VERB") else "NOUN"


def _could_be_named(tokens: list[_Token], index: int, inside: bool) -> bool:
    """Whether a word can be, or lead to, the noun that an adjective before it names a property of."""
    guess = tokens[index].guess
    if guess in _NOMINAL_GUESSES:
        return True
    # "a red painted chair", not "a square painted by a child"
    after = tokens[index + 1].guess if index + 1 < len(tokens) else None
    return inside and guess in ("VERB", "ING", "ED") and after not in (None, "ADP", "DET")


def _chunk_end(tokens: list[_Token], start: int) -> int | None:
    """One past the last word of the noun chunk that starts at `start`; None where none does."""
    first = tokens[start]
    if first.tag == "PRON" and first.lower not in english.POSSESSIVES:
        return start + 1
    end = None
    index = start
    while index < len(tokens):
        token = tokens[index]
        if token.tag in ("NOUN", "PROPN"):
            end = index + 1
        elif token.lower in english.GENITIVES and end == index:
            end = None
        elif _joins(tokens, index, start):
            pass
        elif (
            token.tag not in _BEFORE_A_NOUN
            and token.lower not in english.POSSESSIVES
            and not (token.tag == "ADV" and index + 1 < len(tokens) and tokens[index + 1].tag == "ADJ")
        ):
            break
        elif end == index and token.tag == "ADJ" and tokens[index + 1 : index + 2] and tokens[index + 1].tag == "NOUN":
            pass  # "a television remote control"
        elif end is not None or (token.tag == "DET" and index > start and tokens[index - 1].tag != "DET"):
            break  # these open the next chunk
        index += 1
    return end


def _joins(tokens: list[_Token], index: int, start: int) -> bool:
    """Whether "and" or a comma stands between two adjectives of one noun."""
    if tokens[index].tag != "CCONJ" and tokens[index].text not in (",", "-"):
        return False
    around = tokens[index - 1 : index] + tokens[index + 1 : index + 2]
    return index > start and len(around) == 2 and all(token.tag == "ADJ" for token in around)
