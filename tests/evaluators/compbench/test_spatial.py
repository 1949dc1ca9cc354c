"""2D-spatial and 3D-spatial on constructed boxes and depth maps, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from compbench_fakes import Found, at

from evaluators.compbench.spatial import (
    DepthJudge,
    SpatialJudge,
    depth_score,
    judge_depth,
    mean_depth,
    object_depth,
    position_score,
    relation_of,
    scanned,
)


def boxes(dx, dy, size=40):
    """Two boxes, the second one offset from the first."""
    return at("a", 200, 200, size).box, at("b", 200 + dx, 200 + dy, size).box


@pytest.mark.parametrize(
    ("prompt", "mode", "rule"),
    [
        ("a cat on side of a dog", "compatible", "near"),
        ("a cat next to a dog", "compatible", "near"),
        ("a cat near a dog", "compatible", "near"),
        ("a cat on the left of a dog", "compatible", "left"),
        ("a cat on the right of a dog", "compatible", "right"),
        ("a cat on the bottom of a dog", "compatible", "bottom"),
        ("a cat on the top of a dog", "compatible", "top"),
        ("a cat on top of a dog", "compatible", None),
        ("a cat on top of a dog", "corrected", "top"),
        # The first of the list counts, not the first in the prompt.
        ("a cat on the left of a dog next to a pig", "compatible", "near"),
        ("a cat under a dog", "compatible", None),
    ],
)
def test_the_first_known_relation_is_the_rule(prompt, mode, rule):
    assert relation_of(prompt, mode) == rule


@pytest.mark.parametrize(
    ("offset", "rule", "score"),
    [
        ((100, 0), "left", 1.0),
        ((100, 0), "right", 0.0),
        ((-100, 0), "right", 1.0),
        ((0, 100), "top", 1.0),
        ((0, 100), "bottom", 0.0),
        ((0, -100), "bottom", 1.0),
        ((100, 120), "left", 0.0),  # rather above
        ((100, 100), "left", 0.0),  # neither
        ((100, 0), None, 0.0),
        ((149, 400), "near", 1.0),  # one axis is enough
        ((200, 300), "near", 0.5),
        ((150, 150), "near", 1.0),  # 150 / 150
    ],
)
def test_positions(offset, rule, score):
    assert position_score(*boxes(*offset), rule) == pytest.approx(score)


def test_a_direction_counts_less_where_the_boxes_overlap():
    # 20 of 40 pixels shared: IoU 1/3, so 0.1 / (1/3). 4 of 40: IoU 1/19, under 0.1.
    assert position_score(*boxes(20, 0), "left") == pytest.approx(0.3)
    assert position_score(*boxes(36, 0), "left") == 1.0


def judged(image, words, prompt, *detections, mode="compatible"):
    [judgment] = SpatialJudge(Found(*detections), words("cat", "dog", "girl"), mode).judge([image], [prompt])
    return judgment


def test_both_objects_in_place(image, words):
    judgment = judged(image, words, "a cat on the left of a dog", at("cat", 100, 200, score=0.9), at("dog", 300, 200))
    assert judgment.score == pytest.approx(0.25 * (0.9 + 0.8) + 0.5)
    assert [detail.get("label") for detail in judgment.details[:2]] == ["cat", "dog"]


def test_less_than_a_half_is_nothing(image, words):
    """Both found in the wrong place: 0.25 (0.9 + 0.8) = 0.425; one found: 0.225; both certain: 0.5 stays."""
    there = at("cat", 300, 200, score=0.9)
    assert judged(image, words, "a cat on the left of a dog", there, at("dog", 100, 200)).score == 0
    assert judged(image, words, "a cat on the left of a dog", there).score == 0
    assert judged(image, words, "a cat on the left of a dog").score == 0
    certain = (at("cat", 300, 200, score=1.0), at("dog", 100, 200, score=1.0))
    assert judged(image, words, "a cat on the left of a dog", *certain).score == 0.5


def test_the_best_detection_of_a_label_counts(image, words):
    wrong_but_better = at("cat", 400, 200, score=0.95)
    found = (at("cat", 100, 200, score=0.9), wrong_but_better, at("dog", 300, 200, score=1.0))
    assert judged(image, words, "a cat on the left of a dog", *found).score == 0


def test_labels_must_be_the_very_name(image, words):
    detector = Found(at("cat, kitten", 100, 200), at("dog", 300, 200))
    detector.detect_named = lambda images, names: [detector.detections]
    [judgment] = SpatialJudge(detector, words("cat", "dog")).judge([image], ["a cat next to a dog"])
    assert judgment.details[0] == {"object": "first", "name": "cat"}


def test_people_are_asked_for_as_persons(image, words):
    detector = Found(at("person", 100, 200), at("dog", 300, 200))
    [judgment] = SpatialJudge(detector, words("girl", "dog")).judge([image], ["a girl on the left of a dog"])
    assert detector.asked == [("person", "dog")]
    assert judgment.score == pytest.approx(0.9)


def test_images_without_a_noun_score_nothing_and_cost_no_detection(image, words):
    detector = Found(at("cat", 100, 200), at("dog", 300, 200))
    prompts = ["überall nichts", "a cat on the left of a dog", ""]
    judgments = SpatialJudge(detector, words("cat", "dog")).judge([image] * 3, prompts)
    assert [judgment.score for judgment in judgments] == [0, pytest.approx(0.9), 0]
    assert len(detector.asked) == 1


@pytest.mark.parametrize(("mode", "score"), [("compatible", 0.0), ("corrected", 0.9)])
def test_on_top_of_has_a_rule_only_where_it_is_corrected(image, words, mode, score):
    detector = Found(at("cat", 200, 100), at("dog", 200, 300))
    [judgment, none] = SpatialJudge(detector, words(), mode).score_relations(
        [image] * 2, [("cat", "on top of", "dog"), None]
    )
    assert (judgment.score, none.score) == (pytest.approx(score), 0.0)


def test_a_complex_prompt_is_judged_by_its_own_prepositions(image, words):
    judge = SpatialJudge(Found(at("person", 100, 200), at("dog", 300, 200)), words())
    triples = [("girl", "on the left", "dog"), ("girl", "on the right", "dog"), ("girl", "near", "dog")]
    scores = [judgment.score for judgment in judge.score_relations([image] * 3, triples)]
    assert scores == [pytest.approx(0.9), 0, pytest.approx(0.9)]


# Depth.

FRAME = (479, 479)  # an image that is its own frame


def half_near(near_first=True, side=480):
    """A depth map whose left half is near."""
    depth = np.zeros((side, side), np.uint8)
    depth[:, : side // 2] = 200
    return depth if near_first else depth[:, ::-1]


@pytest.mark.parametrize(("shared", "score"), [(0.0, 0.0), (0.25, 0.5), (0.49, 0.98), (0.51, 1.0), (1.0, 1.0)])
def test_depth_needs_an_overlap(shared, score):
    # Boxes of one size that share s of the union: the second is shifted by (1 - s) / (1 + s) of its width.
    shift = 100 * (1 - shared) / (1 + shared)
    first, second = (0.0, 0.0, 100.0, 100.0), (shift, 0.0, 100.0 + shift, 100.0)
    assert depth_score(first, second, 1.0) == pytest.approx(score, abs=1e-6)
    assert depth_score(first, second, 0.0) == depth_score(first, second, -1.0) == 0


def test_an_overlap_of_exactly_a_half_is_nothing():
    """A quirk: the rule names more than a half, and less."""
    assert depth_score((0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 50.0), 1.0) == 0


def test_the_depth_map_is_read_with_x_and_y_swapped_unless_corrected():
    depth = np.zeros((480, 480), np.uint8)
    depth[100:200, 300:400] = 255  # y, x
    box = (300.0, 100.0, 400.0, 200.0)
    assert (mean_depth(depth, box, "corrected", FRAME), mean_depth(depth, box, "compatible", FRAME)) == (255, 0)
    assert (mean_depth(depth, (100.0, 300.0, 200.0, 400.0), "compatible", FRAME)) == 255


def test_a_smaller_depth_map_is_read_at_its_own_scale():
    box = (0.0, 0.0, 240.0, 240.0)
    assert mean_depth(half_near(side=120), box, "corrected", FRAME) == 200
    assert mean_depth(half_near(), (5.0, 5.0, 5.4, 5.4), "corrected", FRAME) == 0  # no pixel


def test_boxes_of_an_oblong_image_are_read_where_the_square_depth_map_shows_them():
    # 200 x 400 pixels have a frame of 240 x 480; the lower right quarter of it is that of the square map.
    depth = np.zeros((480, 480), np.uint8)
    depth[240:, 240:] = 200
    box = (240.0, 120.0, 480.0, 240.0)
    assert mean_depth(depth, box, "corrected", (200, 400)) == 200
    assert mean_depth(depth, box, "compatible", (200, 400)) == 0  # rows 240 to 480, columns 120 to 240
    assert mean_depth(depth, (120.0, 240.0, 240.0, 480.0), "corrected", (400, 200)) == 200


def test_where_there_is_a_mask_it_says_which_pixels_are_the_objects():
    """A ring's box is as deep as the ring and what lies inside it; only `corrected` asks the mask."""
    depth = np.zeros((480, 480), np.uint8)
    depth[:, 120:240] = 200  # x from 120 to 240, and in an image of 96 x 192 columns 48 to 96
    mask = np.zeros((96, 192), bool)
    mask[:, 48:96] = True
    ring = replace(at("ring", 120, 120, 240), box=(0.0, 0.0, 240.0, 240.0), mask=mask)
    assert object_depth(depth, ring, "corrected", (96, 192)) == 200
    assert object_depth(depth, ring, "compatible", FRAME) == mean_depth(depth, ring.box, "compatible", FRAME) == 100
    for missing in (None, np.zeros((96, 192), bool)):
        boxed = replace(ring, mask=missing)
        assert object_depth(depth, boxed, "corrected", FRAME) == mean_depth(depth, ring.box, "corrected", FRAME) == 100


def test_masks_decide_which_object_is_nearer():
    boxed = overlapping()  # by boxes the first is nearer
    far = np.arange(480) >= 240
    masks = [np.tile(columns, (480, 1)) for columns in (far, ~far)]
    masked = [replace(one, mask=mask) for one, mask in zip(boxed, masks, strict=True)]
    prompt = "a cat in front of a dog"
    scores = [judge_depth(found, half_near(), ("cat", "dog"), prompt, "corrected", FRAME) for found in (boxed, masked)]
    assert [judgment.score for judgment in scores] == pytest.approx([0.4 + 0.5 * 2 / 3, 0.4])


def overlapping():
    """Two boxes with an IoU of 1/3, the first one on the near side."""
    return at("cat", 200, 200, 100), at("dog", 250, 200, 100)


@pytest.mark.parametrize(
    ("prompt", "near_first", "score"),
    [
        ("a cat in front of a dog", True, 0.4 + 0.5 * 2 / 3),
        ("a cat in front of a dog", False, 0.4),
        ("a cat behind a dog", True, 0.4),
        ("a cat behind a dog", False, 0.4 + 0.5 * 2 / 3),
        ("a cat hidden by a dog", False, 0.4 + 0.5 * 2 / 3),
        ("a cat and a dog", True, 0.4),
    ],
)
def test_depth_and_overlap_make_the_score(prompt, near_first, score):
    """No cut at a half here: two objects found alone keep their quarter each."""
    depth = half_near(near_first)
    judgment = judge_depth(list(overlapping()), depth, ("cat", "dog"), prompt, "corrected", FRAME)
    assert judgment.score == pytest.approx(score)


def test_equal_depths_hold_for_neither():
    flat = np.full((480, 480), 7, np.uint8)
    for prompt in ("a cat in front of a dog", "a cat behind a dog"):
        assert judge_depth(
            list(overlapping()), flat, ("cat", "dog"), prompt, "corrected", FRAME
        ).score == pytest.approx(0.4)


def test_the_scan_overwrites_until_both_are_found():
    """A quirk: the second-best cat counts, as it comes before the first dog; the third does not."""
    cats = [at("cat", 50, 50, score=score) for score in (0.9, 0.8, 0.6)]
    dog = at("dog", 50, 50, score=0.7)
    first, second = scanned([cats[0], cats[1], dog, cats[2]], "cat", "dog")
    assert (first.score, second.score) == (0.8, 0.7)
    assert scanned([at("cattle, cow", 0, 0)], "cow", "dog")[0].label == "cattle, cow"
    assert scanned([], "cat", "dog") == (None, None)


def test_depth_is_judged_image_by_image(image, words):
    class Depths:
        fingerprint = "depths"

        def depth(self, images):
            return [half_near(), half_near(near_first=False)][: len(images)]

    judge = DepthJudge(Found(*overlapping()), Depths(), words("cat", "dog"), "corrected")
    prompts = ["a cat in front of a dog", "a cat in front of a dog", "nothing"]
    scores = [judgment.score for judgment in judge.judge([image] * 3, prompts)]
    assert scores == [pytest.approx(0.4 + 1 / 3), pytest.approx(0.4), 0]
