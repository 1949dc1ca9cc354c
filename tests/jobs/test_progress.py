"""Progress: a bar in a terminal, a line now and then elsewhere, with the pace of the last minutes."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from jobs import _progress
from jobs._progress import SECONDS_BETWEEN_LINES, Pace, ProgressReport


@dataclass
class Event:
    done: int
    resumed: int = 100
    total: int = 1000
    failed: int = 0
    stage: str = "drawing"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(_progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_pace_and_time_left_are_those_of_the_images_drawn_now():
    pace = Pace()
    assert pace.words(Event(done=100), now=60.0) == []
    assert pace.words(Event(done=200), now=150.0) == []  # 90 s of mostly starting up say nothing
    assert pace.words(Event(done=300), now=160.0) == ["10 images/s", "ETA 0:01:10"]
    assert pace.words(Event(done=1000), now=200.0) == []


def test_the_pace_follows_a_pool_that_grows():
    pace = Pace()
    for minute in range(60):
        pace.words(Event(done=101 + minute), now=60.0 * minute)
    for minute in range(60, 80):
        words = pace.words(Event(done=160 + 30 * (minute - 59)), now=60.0 * minute)
    assert words == ["0.5 images/s", "ETA 0:08:00"]


def test_elsewhere_than_in_a_terminal_a_line_comes_now_and_then(clock):
    stream = io.StringIO()
    with ProgressReport(Console(file=stream, width=120)) as report:
        report(Event(done=100, stage="starting"))
        for done in range(101, 1001):
            clock.now += 0.125
            report(Event(done=done, failed=int(done > 500)))
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == ["starting:", "100/1000", "images"]
    assert lines[1].split() == ["drawing:", "180/1000", "images", "8", "images/s", "ETA", "0:01:42"]
    assert lines[-2].split() == ["drawing:", "980/1000", "images", "1", "failed", "8", "images/s", "ETA", "0:00:02"]
    assert lines[-1].split() == ["drawing:", "1000/1000", "images", "1", "failed"]
    assert len(lines) == 2 + 900 * 0.125 // SECONDS_BETWEEN_LINES


def test_in_a_terminal_a_bar_moves_and_goes_away(clock):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressReport(console) as report:
        for done in (100, 200, 300):
            clock.now += 10.0
            report(Event(done=done))
        report._bar.refresh()
        shown = stream.getvalue()
    assert "300/1000" in shown
    assert "10 images/s  ETA 0:01:10" in shown
    assert "drawing: " not in shown  # no lines besides
    assert stream.getvalue().endswith("\x1b[1A\x1b[2K") or stream.getvalue().endswith("\x1b[2K")
