"""GenEval's rules against detections made by hand, quirks included."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from bitflux_core.mini.render import PromptTable, render, sample_scenes
from bitflux_core.mini.world import COLORS as WORLD_COLORS
from bitflux_core.mini.world import SHAPES, benchmark_prompts
from evaluators.base import Detection
from evaluators.geneval import (
    COUNTING_THRESHOLD,
    MAX_OBJECTS,
    THRESHOLD,
    GenEvalEvaluator,
    Question,
    confident_objects,
    judge,
    relations,
)
from evaluators.mask2former import mask_extent

IMAGE = np.zeros((100, 100, 3), dtype=np.uint8)
LABELS = ("circle", "square", "star")


class FixedDetector:
    """Finds what it was told to, image by image."""

    labels = LABELS
    fingerprint = "detector"

    def __init__(self, *found: list[Detection]) -> None:
        self.found = found

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        return list(self.found[: len(images)])


class FixedColors:
    """Answers with the colour that was given for a detection's box, and remembers what it was asked."""

    fingerprint = "colors"

    def __init__(self, colors: dict[tuple, str]) -> None:
        self.colors = colors
        self.asked: list[Detection] = []

    def classify(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str]:
        self.asked += detections
        return [self.colors[detection.box] for detection in detections]


def reasons(detections: list[Detection], colors: dict[tuple, str] | None = None, **metadata) -> list[str]:
    question = Question.parse({"tag": "two_object", **metadata}, LABELS)
    return judge(
        confident_objects(detections, question.tag),
        question,
        lambda found: FixedColors(colors or {}).classify(IMAGE, found),
    )


def want(label: str, count: int = 1, **more) -> dict:
    return {"class": label, "count": count, **more}


# --- filtering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tag", "threshold"), [("counting", COUNTING_THRESHOLD), ("position", THRESHOLD)])
def test_threshold_is_exclusive_and_higher_for_counting(make_detection, tag, threshold):
    at, above = make_detection("star", threshold), make_detection("star", threshold + 1e-6)
    assert confident_objects([at, above], tag) == {"star": [above]}


def test_thresholds_are_the_protocols():
    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS) == (0.3, 0.9, 16)


def test_at_most_sixteen_of_a_class_the_best_first(make_detection):
    stars = [make_detection("star", 0.4 + 0.01 * index) for index in range(20)]
    objects = confident_objects([*stars, make_detection("circle", 0.5)], "two_object")
    assert objects["star"] == stars[:3:-1]
    assert len(objects["circle"]) == 1


def test_more_than_sixteen_look_like_sixteen_to_exclude(make_detection):
    stars = [make_detection("star")] * 20
    assert not reasons(stars, include=[want("star", 16)], exclude=[want("star", 17)])


# --- include and exclude ---------------------------------------------------------------------------------------------


def test_include_asks_for_at_least_count(make_detection):
    star = make_detection("star")
    assert not reasons([star, star, star], include=[want("star", 2)])
    assert reasons([star], include=[want("star", 2)]) == ["expected star>=2, found 1"]
    assert reasons([], include=[want("star")]) == ["expected star>=1, found 0"]


def test_exclude_fails_at_count(make_detection):
    star = make_detection("star")
    counting = {"tag": "counting", "include": [want("star", 2)], "exclude": [want("star", 3)]}
    assert not reasons([star] * 2, **counting)
    assert reasons([star] * 3, **counting) == ["expected star<3, found 3"]


def test_counting_overlooks_a_doubtful_third_object(make_detection):
    found = [make_detection("star"), make_detection("star"), make_detection("star", 0.9)]
    assert not reasons(found, tag="counting", include=[want("star", 2)], exclude=[want("star", 3)])


# --- colour ----------------------------------------------------------------------------------------------------------


def test_color_is_asked_of_the_top_count_only(make_detection):
    best = make_detection("star", 0.9, (0.0, 0.0, 9.0, 9.0))
    second = make_detection("star", 0.8, (50.0, 0.0, 59.0, 9.0))
    colors = {best.box: "blue", second.box: "red"}
    assert reasons([best, second], colors, include=[want("star", color="red")]) == [
        "expected red star>=1, found 1 blue"
    ]
    assert not reasons([best, second], colors, include=[want("star", color="blue")])


def test_color_must_hold_for_count_objects(make_detection):
    one, two = make_detection("star", box=(0.0, 0.0, 9.0, 9.0)), make_detection("star", box=(50.0, 0.0, 59.0, 9.0))
    include = [want("star", 2, color="red")]
    assert not reasons([one, two], {one.box: "red", two.box: "red"}, include=include)
    assert reasons([one, two], {one.box: "red", two.box: "pink"}, include=include) == [
        "expected red star>=2, found 1 red, 1 pink"
    ]


# --- position --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-40, 0), {"left of"}),
        ((40, 0), {"right of"}),
        ((0, -40), {"above"}),
        ((0, 40), {"below"}),
        ((40, 40), {"right of", "below"}),  # revised 36 of 56.6 on both axes
        ((3, -3), set()),  # within 10 % of the summed sizes (4 pixels): no relation
        ((4, 4), set()),  # exactly at it
        ((0, 0), set()),  # the same place: no division by zero
        ((7, 0), set()),  # revised 3 of an un-revised norm of 7: 0.43
        ((9, 0), {"right of"}),  # revised 5 of 9: 0.56; the revised norm would have let (7, 0) pass as well
        ((8, 0), set()),  # revised 4 of 8 is exactly 0.5: not above it
        ((40, 20), {"right of"}),  # revised (36, 16) of 44.7: (0.80, 0.36)
    ],
)
def test_relations_use_the_unrevised_norm(make_detection, offset, expected):
    target = make_detection("star", box=(40.0, 40.0, 60.0, 60.0))
    x, y = 40.0 + offset[0], 40.0 + offset[1]
    assert relations(make_detection("circle", box=(x, y, x + 20, y + 20)), target) == expected


@pytest.mark.parametrize(
    ("offset", "expected"),
    [((9e-4, -9e-4), set()), ((1.1e-3, 0.0), {"right of"}), ((9e-4, 1.1e-3), {"right of", "below"})],
)
def test_under_a_thousandth_of_a_pixel_on_both_axes_there_is_no_relation(make_detection, offset, expected):
    """Boxes without an extent, so that the offset is the revised one."""
    assert (
        relations(make_detection("circle", box=(*offset, *offset)), make_detection("star", box=(0.0,) * 4)) == expected
    )


def test_sizes_widen_the_margin_of_their_own_axis(make_detection):
    wide = make_detection("circle", box=(0.0, 0.0, 80.0, 10.0))
    target = make_detection("star", box=(30.0, 15.0, 70.0, 25.0))
    # offset (-10, -15), margins (12, 2): revised (0, -13) of 18.03
    assert relations(wide, target) == {"above"}


POSITION = {"include": [want("circle"), want("star", position=["left of", 0])]}


def test_position_relates_the_group_to_its_target(make_detection):
    circle = make_detection("circle", box=(60.0, 10.0, 80.0, 30.0))
    star = make_detection("star", box=(10.0, 10.0, 30.0, 30.0))
    assert not reasons([circle, star], **POSITION)
    swapped = [make_detection("circle", box=star.box), make_detection("star", box=circle.box)]
    assert reasons(swapped, **POSITION) == ["expected star left of target, found right of target"]
    same = [circle, make_detection("star", box=circle.box)]
    assert reasons(same, **POSITION) == ["expected star left of target, found no relation to target"]


def test_a_missing_target_fails_what_is_relative_to_it(make_detection):
    assert reasons([make_detection("star")], **POSITION) == [
        "expected circle>=1, found 0",
        "no target for star to be left of",
    ]


def test_a_miscolored_target_counts_as_absent(make_detection):
    circle = make_detection("circle", box=(60.0, 10.0, 80.0, 30.0))
    star = make_detection("star", box=(10.0, 10.0, 30.0, 30.0))
    include = [want("circle", color="red"), want("star", position=["left of", 0])]
    assert not reasons([circle, star], {circle.box: "red"}, include=include)
    assert reasons([circle, star], {circle.box: "blue"}, include=include) == [
        "expected red circle>=1, found 1 blue",
        "no target for star to be left of",
    ]


def test_every_pair_of_found_and_target_must_satisfy_the_relation(make_detection):
    circles = [make_detection("circle", box=(x, 10.0, x + 10, 20.0)) for x in (40.0, 80.0)]
    star = make_detection("star", box=(60.0, 10.0, 70.0, 20.0))
    include = [want("circle", 2), want("star", position=["left of", 0])]
    assert reasons([*circles, star], include=include) == ["expected star left of target, found right of target"]
    assert not reasons([*circles, make_detection("star", box=(5.0, 10.0, 15.0, 20.0))], include=include)
    stars = [make_detection("star", box=(x, 10.0, x + 10, 20.0)) for x in (5.0, 85.0)]
    assert reasons([circles[0], *stars], include=[want("circle"), want("star", 2, position=["left of", 0])]) == [
        "expected star left of target, found right of target"
    ]


def test_a_misplaced_group_is_absent_for_the_next(make_detection):
    found = [
        make_detection("circle", box=(10.0, 10.0, 20.0, 20.0)),
        make_detection("star", box=(50.0, 10.0, 60.0, 20.0)),
        make_detection("square", box=(80.0, 10.0, 90.0, 20.0)),
    ]
    chain = [want("circle"), want("star", position=["left of", 0]), want("square", position=["right of", 1])]
    assert reasons(found, include=chain) == [
        "expected star left of target, found right of target",
        "no target for square to be right of",
    ]


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tag": "colors", "include": []}, "at least one class"),
        ({"include": [want("star")]}, "tag"),
        ({"tag": "t", "include": [want("zebra")]}, "'zebra'"),
        ({"tag": "t", "include": [want("star", 0)]}, "count"),
        ({"tag": "t", "include": [want("star", color="mauve")]}, "'mauve'"),
        ({"tag": "t", "include": [want("star", position=["left of", 0])]}, "earlier group"),
        ({"tag": "t", "include": [want("star"), want("circle", position=["near", 0])]}, "'near'"),
        ({"tag": "t", "include": [want("star")], "exclude": [want("zebra")]}, "'zebra'"),
    ],
)
def test_metadata_that_cannot_be_scored_is_an_error_of_its_image(metadata, named):
    (score,) = GenEvalEvaluator(FixedDetector([]), FixedColors({})).score([IMAGE], [metadata])
    assert score.score is None
    assert score.correct is None
    assert named in score.error


# --- the evaluator ---------------------------------------------------------------------------------------------------


def test_rows_hold_what_was_seen(make_detection):
    star = make_detection("star", 0.912345, (10.04, 10.0, 30.0, 30.0))
    doubtful = make_detection("circle", 0.5, (50.0, 50.0, 60.0, 60.0))
    unseen = make_detection("circle", 0.2)
    colors = FixedColors({star.box: "red"})
    metadata = {"tag": "colors", "include": [want("star", color="red")], "prompt": "a photo of a red star"}
    (score,) = GenEvalEvaluator(FixedDetector([doubtful, star, unseen]), colors).score([IMAGE], [metadata])
    assert (score.score, score.correct, score.reason, score.error) == (1.0, True, "", None)
    assert score.detections == [
        {"label": "star", "score": 0.9123, "box": [10.0, 10.0, 30.0, 30.0], "color": "red"},
        {"label": "circle", "score": 0.5, "box": [50.0, 50.0, 60.0, 60.0]},
    ]
    assert colors.asked == [star]
    json.dumps(score.detections)


def test_a_wrong_image_says_why(make_detection):
    metadata = {"tag": "two_object", "include": [want("star"), want("circle", 2)]}
    (score,) = GenEvalEvaluator(FixedDetector([]), FixedColors({})).score([IMAGE], [metadata])
    assert (score.score, score.correct) == (0.0, False)
    assert score.reason == "expected star>=1, found 0; expected circle>=2, found 0"


@pytest.mark.parametrize(
    "bad", [None, IMAGE.astype(np.float32), IMAGE[:, :, 0], IMAGE[:0], IMAGE[:, :, :2]], ids=lambda bad: type(bad)
)
def test_what_is_no_image_leaves_its_neighbours_alone(make_detection, bad):
    evaluator = GenEvalEvaluator(FixedDetector([make_detection("star")], []), FixedColors({}))
    metadata = {"tag": "single_object", "include": [want("star")]}
    first, broken, last = evaluator.score([IMAGE, bad, IMAGE], [metadata] * 3)
    assert (first.score, last.score) == (1.0, 0.0)
    assert broken.score is None
    assert "image must be" in broken.error


def test_fingerprint_follows_the_models():
    first, second = FixedDetector([]), FixedDetector([])
    second.fingerprint = "another"
    colors = FixedColors({})
    assert GenEvalEvaluator(first, colors).fingerprint == GenEvalEvaluator(first, colors).fingerprint
    assert GenEvalEvaluator(first, colors).fingerprint != GenEvalEvaluator(second, colors).fingerprint


def test_perfect_detections_of_rendered_prompts_are_all_right():
    """The mini benchmark's scenes satisfy the rules: with detections from the true masks every image is right."""
    prompts = benchmark_prompts()[::5]
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(PromptTable.build(prompts, "cpu"), torch.arange(len(prompts)), generator)
    _, masks_BOHW = render(scenes, generator)
    truth, color_of = [], {}
    for shapes_O, colors_O, masks_OHW in zip(scenes.shapes_BO, scenes.colors_BO, masks_BOHW.numpy(), strict=True):
        found = []
        for shape, color, mask in zip(shapes_O.tolist(), colors_O.tolist(), masks_OHW, strict=True):
            if shape < len(SHAPES):
                found.append(Detection(SHAPES[shape], 0.99, mask_extent(mask), mask))
                color_of[id(found[-1])] = WORLD_COLORS[color]
        truth.append(found)

    class TrueColors:
        fingerprint = "truth"

        def classify(self, image, detections):
            return [color_of[id(detection)] for detection in detections]

    detector = FixedDetector(*truth)
    detector.labels = SHAPES
    scores = GenEvalEvaluator(detector, TrueColors()).score(
        [IMAGE] * len(prompts), [prompt.metadata() for prompt in prompts]
    )
    assert [score.reason or score.error for score in scores if not score.correct] == []
