"""The frame, the thresholds and the overlaps that the rules share."""

import pytest
from compbench_fakes import at

from evaluators.base import Detection
from evaluators.compbench.objects import first_and_last_noun, frame_scale, framed, iou, overlap


@pytest.mark.parametrize(
    ("size", "frame"),
    [
        ((1024, 1024), (479, 479)),
        ((128, 128), (479, 479)),
        ((479, 480), (479, 480)),
        ((512, 1024), (240, 480)),
        ((1, 3000), (1, 480)),
    ],
)
def test_the_short_side_becomes_479_and_the_long_one_480_at_most(size, frame):
    height, width = size
    x_scale, y_scale = frame_scale(height, width)
    assert (round(height * y_scale), round(width * x_scale)) == frame


def test_boxes_are_scaled_into_the_frame():
    [one] = framed([Detection("cat", 0.5, (0.0, 512.0, 512.0, 1024.0))], 1024, 1024)
    assert one.box == (0.0, 239.5, 239.5, 479.0)


def test_only_what_is_above_a_tenth_counts_best_first():
    found = framed([at("a", 50, 50, score=0.1), at("a", 150, 50, score=0.11), at("b", 250, 50, score=0.9)], 479, 479)
    assert [one.score for one in found] == [0.9, 0.11]


def test_overlaps_are_removed_within_a_class_only():
    # 20 of 40 pixels shared: IoU 1/3 stays; 32 of 40: IoU 2/3 goes.
    apart, near = at("a", 120, 100, score=0.7), at("a", 108, 100, score=0.6)
    kept = framed([at("a", 100, 100, score=0.9), apart, near, at("b", 100, 100, score=0.5)], 479, 479)
    assert [(one.label, one.score) for one in kept] == [("a", 0.9), ("a", 0.7), ("b", 0.5)]


@pytest.mark.parametrize(("height", "left"), [(49.0, 2), (50.0, 2), (51.0, 1)])
def test_a_class_loses_what_overlaps_by_more_than_a_half(height, left):
    """The second box lies inside the first one, so its share of that is the IoU."""
    found = [Detection("a", 0.9, (0.0, 0.0, 100.0, 100.0)), Detection("a", 0.8, (0.0, 0.0, 100.0, height))]
    assert len(framed(found, 479, 479)) == left


def test_at_most_300_boxes():
    assert len(framed([at(str(i), 50, 50, score=0.5) for i in range(310)], 479, 479)) == 300


def test_overlap_by_hand():
    one, other = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)
    assert (overlap(one, other), iou(one, other)) == (50.0, pytest.approx(1 / 3))
    assert overlap(one, other, pixel=1.0) == 6 * 11
    assert iou(one, (20.0, 0.0, 30.0, 10.0)) == 0
    assert iou((5.0, 5.0, 5.0, 5.0), (5.0, 5.0, 5.0, 5.0)) == 0


def test_people_are_persons(words):
    assert first_and_last_noun("a Girl next to a desk", words("girl", "desk")) == ("person", "desk")
    assert first_and_last_noun("", words()) is None
