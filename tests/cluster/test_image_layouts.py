"""Which file is which image in the official layouts, whatever order the files come in."""

import random
import unicodedata

import pytest

from bitflux_core.errors import UserError
from cluster.image_layouts import CompBenchLayout, GenEvalLayout
from cluster.workload import PromptRecord


def prompts(*pairs: tuple[str, str]) -> list[PromptRecord]:
    return [PromptRecord(index, tag, text, {"tag": tag}) for index, (tag, text) in enumerate(pairs)]


LIST = prompts(
    ("color", "a red car."),
    ("shape", "a round ball"),
    ("color", "ein grüner Apfel, 緑"),
    ("color", "a red car."),  # twice in its category
    ("shape", "a red car."),  # and in another one
)


def all_names(layout, counts: int) -> dict[tuple[int, int], str]:
    return {(p.index, image): layout.image_name(p, image) for p in LIST for image in range(counts)}


@pytest.mark.parametrize("layout", [GenEvalLayout(LIST), CompBenchLayout(LIST, [3])])
def test_names_read_back_in_any_order(layout):
    names = all_names(layout, 3)
    assert len(set(names.values())) == 15
    listing = [*names.values(), "results.jsonl", "00000/metadata.jsonl", "color/samples/.DS_Store", "grid.png"]
    random.Random(0).shuffle(listing)
    assert layout.find(listing) == names


def test_names_are_upstreams():
    assert GenEvalLayout(LIST).image_name(LIST[3], 2) == "00003/samples/00002.png"
    layout = CompBenchLayout(LIST, [10])
    # The third of its category, at ten images a prompt.
    assert layout.image_name(LIST[3], 2) == "color/samples/a red car._000022.png"
    assert layout.image_name(LIST[4], 9) == "shape/samples/a red car._000019.png"
    assert layout.image_name(LIST[2], 0).split("/")[-1].split("_")[0] == LIST[2].text


def test_geneval_takes_any_number_of_digits():
    assert GenEvalLayout(LIST).find(["0001/samples/0003.png", "2/samples/1.png", "00009/samples/00000.png"]) == {
        (1, 3): "0001/samples/0003.png",
        (2, 1): "2/samples/1.png",
    }


def test_a_missing_image_does_not_move_the_others():
    layout = CompBenchLayout(LIST, [3])
    names = all_names(layout, 3)
    del names[0, 1], names[3, 0]
    assert layout.find(names.values()) == names


def test_files_of_more_images_than_planned_keep_their_places():
    made = all_names(CompBenchLayout(LIST, [10]), 10)
    assert CompBenchLayout(LIST, [2, 10]).find(made.values()) == made


def test_other_numbering_counts_by_its_order():
    names = [f"color/samples/a red car._{number}.png" for number in (1007, 905, 901, 903)]
    assert CompBenchLayout(LIST, [2]).find(names) == {
        (0, 0): names[2],
        (0, 1): names[3],
        (3, 0): names[1],
        (3, 1): names[0],
    }


def test_accents_in_two_parts_are_the_same_letters():
    layout = CompBenchLayout(LIST, [1])
    name = unicodedata.normalize("NFD", layout.image_name(LIST[2], 0))
    assert name != layout.image_name(LIST[2], 0)
    assert layout.find([name]) == {(2, 0): name}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (GenEvalLayout(LIST), ["00001/samples/00000.png", "1/samples/0.png"]),
        (CompBenchLayout(LIST, [2]), ["shape/samples/a round ball_000000.png", "shape/samples/a round ball_0.png"]),
    ],
)
def test_two_files_of_one_image_are_both_named(layout, names):
    with pytest.raises(UserError) as error:
        layout.find(names)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("tag", "text", "named"),
    [
        ("color", "either/or", "'/'"),
        ("color", "snake_case", "'_'"),
        ("color", "緑" * 90, "too long"),
        ("a/b", "a cat", "category 'a/b'"),
        ("..", "a cat", "category '..'"),
    ],
)
def test_what_a_file_name_cannot_hold_is_refused(tag, text, named):
    (prompt,) = prompts((tag, text))
    with pytest.raises(ValueError, match=named):
        CompBenchLayout([prompt], [1]).image_name(prompt, 0)
    assert GenEvalLayout([prompt]).image_name(prompt, 0) == "00000/samples/00000.png"


def test_an_underscore_in_a_prompt_reads_back():
    (prompt,) = prompts(("color", "snake_case"))
    name = "color/samples/snake_case_000001.png"
    assert CompBenchLayout([prompt], [2]).find([name]) == {(0, 1): name}
