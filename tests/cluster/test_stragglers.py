"""When a call is late, when it is given up, and what becomes of two draws of one piece."""

import asyncio

import pytest

from cluster.limits import Limits
from cluster.pace import Pace
from cluster.pieces import Piece
from cluster.stragglers import Assignments

LIMITS = Limits(call_factor=10, call_floor_s=5, call_ceiling_s=100, late_factor=3, late_floor_s=2)


def pace_of(seconds_a_slot, variant="bf16"):
    pace = Pace(LIMITS)
    pace.observe(variant, 4, 4 * seconds_a_slot)
    return pace


def test_nothing_is_expected_of_what_was_never_seen():
    pace = Pace(LIMITS)
    assert (pace.expected("bf16", 4), pace.late_after("bf16", 4), pace.timeout("bf16", 4)) == (None, None, 100)


@pytest.mark.parametrize(("seconds_a_slot", "late", "timeout"), [(0.01, 2, 5), (1.0, 12, 40), (5.0, 60, 100)])
def test_limits_follow_what_was_observed(seconds_a_slot, late, timeout):
    pace = pace_of(seconds_a_slot)
    assert (pace.late_after("bf16", 4), pace.timeout("bf16", 4)) == (late, timeout)


def test_one_slow_call_does_not_shift_the_pace():
    pace = Pace(LIMITS)
    for seconds in (4.0, 4.4, 400.0):
        pace.observe("bf16", 4, seconds)
    assert pace.expected("bf16", 8) == pytest.approx(8.8)


def in_hand(plan, act):
    """Runs `act(assignments, piece, at)` in a loop whose clock `at(seconds)` sets."""

    async def run():
        clock = [0.0]
        asyncio.get_running_loop().time = lambda: clock[0]

        def at(seconds):
            clock[0] = seconds

        act(Assignments(pace_of(1.0), look_again_s=0.5), Piece(plan.shards[0], tuple(range(8))), at)

    asyncio.run(run())


def test_a_piece_is_late_after_a_multiple_of_what_its_holder_needs(plan):
    def act(assignments, piece, at):
        slow = assignments.begin(piece, 4, "slow", speed=0.5)
        quick = assignments.begin(piece, 4, "quick", speed=1.0)
        behind = assignments.begin(piece, 4, "quick", speed=1.0)
        for each in (slow, quick, behind):
            assignments.sent(each)
        at(23.9)
        assert assignments.late("idle") is None
        assert assignments.next_late_s("idle") == pytest.approx(0.1)
        at(24.1)
        assert assignments.late("quick") is None  # its own
        assert assignments.late("idle") is quick
        assert assignments.late("idle") is None
        at(48.1)
        assert {assignments.late("idle"), assignments.late("idle")} == {slow, behind}
        assert assignments.late("another") is None  # two draws are enough

    in_hand(plan, act)


def test_a_piece_whose_prompts_are_not_encoded_is_not_late(plan):
    def act(assignments, piece, at):
        assignments.begin(piece, 4, "a", 1.0)
        at(1000)
        assert assignments.late("idle") is None
        assert assignments.next_late_s("idle") == 0.5

    in_hand(plan, act)


@pytest.mark.parametrize(
    ("ends", "decided"),
    [
        ([("a", True), ("b", True)], [True, False]),  # the second result is dropped
        ([("b", True), ("a", False)], [True, False]),  # so is a failure after it
        ([("a", False), ("b", True)], [False, True]),  # the other one goes on
        ([("a", False), ("b", False)], [False, True]),  # only the last failure fails the piece
    ],
)
def test_the_first_result_decides_else_the_last_failure(plan, ends, decided):
    def act(assignments, piece, at):
        assignment = assignments.begin(piece, 4, "a", 1.0)
        assignments.sent(assignment)
        at(100)
        assert assignments.late("b") is assignment
        assert [assignments.end(assignment, holder, drawn) for holder, drawn in ends] == decided
        assert assignments.late("c") is None

    in_hand(plan, act)
