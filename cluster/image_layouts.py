"""The official folder layouts of the benchmarks' images: which file is which image.

    geneval          <prompt index:05>/metadata.jsonl     the prompt's line of the benchmark's own list
                     <prompt index:05>/samples/<image index:05>.png
    t2i-compbench    <category>/samples/<prompt>_<number:06>.png

A T2I-CompBench number counts all images of a category: the prompt's place in the category x images a prompt + image.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from bitflux_core.errors import UserError
from cluster.workload import PromptRecord
from evaluators.compbench.categories import ATTRIBUTES

LONGEST_NAME = 255  # bytes of a file's name, on every common file system

GENEVAL_RESULTS = "results.jsonl"
# Where upstream's evaluators put each category's results.
ANNOTATIONS = {
    **dict.fromkeys(ATTRIBUTES, "annotation_blip"),
    "spatial": "labels/annotation_obj_detection_2d",
    "3d_spatial": "labels/annotation_obj_detection_3d",
    "numeracy": "annotation_num",
    "non_spatial": "annotation_clip",
    "complex": "annotation_3_in_1",
}
OTHER_ANNOTATION = "annotation"  # of a category that is not upstream's

Place = tuple[int, int]  # index of the prompt in its benchmark, of the image among the prompt's


class ImageLayout(Protocol):
    """How the images of one benchmark lie in a folder. Names are relative to it, with slashes."""

    def image_name(self, prompt: PromptRecord, image_index: int) -> str:
        """The file of one image. ValueError for a prompt that the layout cannot hold."""
        ...

    def find(self, names: Iterable[str]) -> dict[Place, str]:
        """Which of a folder's files is which image; other files are left out. UserError for two that are the same."""
        ...


class GenEvalLayout:
    """A folder a prompt, whatever the prompt's letters."""

    def __init__(self, prompts: Sequence[PromptRecord]) -> None:
        self._known = {prompt.index for prompt in prompts}

    def image_name(self, prompt: PromptRecord, image_index: int) -> str:
        return f"{prompt.index:05}/samples/{image_index:05}.png"

    def metadata_name(self, prompt: PromptRecord) -> str:
        """The file that says which prompt the folder's images are of."""
        return f"{prompt.index:05}/metadata.jsonl"

    def find(self, names: Iterable[str]) -> dict[Place, str]:
        found: dict[Place, str] = {}
        for name in sorted(names):
            if match := re.fullmatch(r"(\d+)/samples/(\d+)\.png", name, re.ASCII):
                place = int(match[1]), int(match[2])
                if place[0] in self._known:
                    _add(found, place, name)
        return found


class CompBenchLayout:
    """A folder a category, a file an image. `prompts` are the whole benchmark's, `images_per_prompt` the numbers of
    images a prompt that the files may be counted by: the first one names new files."""

    def __init__(self, prompts: Sequence[PromptRecord], images_per_prompt: Sequence[int]) -> None:
        self._counts = images_per_prompt
        self._rank: dict[int, int] = {}  # the place of each prompt in its category
        self._places: dict[tuple[str, str], list[int]] = defaultdict(list)  # a list may repeat a prompt
        sizes: dict[str, int] = defaultdict(int)
        for prompt in prompts:
            self._rank[prompt.index] = sizes[prompt.tag]
            sizes[prompt.tag] += 1
            self._places[_key(prompt.tag, prompt.text)].append(prompt.index)

    def number(self, prompt: PromptRecord, image_index: int) -> int:
        """The image's number in its category."""
        return self._rank[prompt.index] * self._counts[0] + image_index

    def image_name(self, prompt: PromptRecord, image_index: int) -> str:
        name = f"{prompt.text}_{self.number(prompt, image_index):06}.png"
        # Upstream takes what stands before the first underscore for the prompt.
        held = next((sign for sign in ("/", "\0", "_") if sign in prompt.text), None)
        if held:
            raise ValueError(f"prompt '{prompt.text}' holds {held!r}, which a file name of this layout cannot")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"prompt '{prompt.text}' is too long for a file name of {LONGEST_NAME} bytes")
        return f"{folder_name(prompt.tag)}/samples/{name}"

    def find(self, names: Iterable[str]) -> dict[Place, str]:
        """A prompt's files are told apart by their numbers. Where these are counted otherwise than upstream counts,
        the files are taken in the order of the numbers, as upstream takes them."""
        files: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
        for name in sorted(names):
            if match := re.fullmatch(r"([^/]+)/samples/([^/]+)_(\d+)\.png", name, re.ASCII | re.DOTALL):
                key = _key(match[1], match[2])
                if key in self._places:
                    files[key].append((int(match[3]), name))
        found: dict[Place, str] = {}
        for key, numbered in files.items():
            for place, name in self._placed(self._places[key], sorted(numbered)):
                _add(found, place, name)
        return found

    def _placed(self, indices: list[int], numbered: list[tuple[int, str]]) -> list[tuple[Place, str]]:
        """The images that the files of one prompt's text are; several `indices` where the list repeats it."""
        for count in self._counts:
            by_rank = {self._rank[index]: index for index in indices}
            if all(number // count in by_rank for number, _ in numbered):
                return [((by_rank[number // count], number % count), name) for number, name in numbered]
        share = -(-len(numbered) // len(indices))
        return [((indices[i // share], i % share), name) for i, (_, name) in enumerate(numbered)]


def compbench_results(image_name: str) -> str:
    """The result file that holds an image's score."""
    tag = image_name.split("/")[0]
    return f"{tag}/{ANNOTATIONS.get(tag, OTHER_ANNOTATION)}/vqa_result.json"


def folder_name(tag: str) -> str:
    """The tag, which is to be a folder's name. ValueError where it cannot be one."""
    if "/" in tag or "\0" in tag or tag in (".", ".."):
        raise ValueError(f"category '{tag}' cannot be a folder's name")
    return tag


def _key(tag: str, text: str) -> tuple[str, str]:
    # Some file systems give accented letters back in two parts.
    return unicodedata.normalize("NFC", tag), unicodedata.normalize("NFC", text).strip()


def _add(found: dict[Place, str], place: Place, name: str) -> None:
    if place in found:
        raise UserError(f"{found[place]} and {name} are the same image by their names; remove one of them")
    found[place] = name
