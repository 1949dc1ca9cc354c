"""Progress, images a second, time left, on standard error: a bar in a terminal, elsewhere a line now and then."""

import time
from collections import deque
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from cluster.run import Progress

SECONDS_BETWEEN_LINES = 10.0
WINDOW_S = 600.0  # the pace is that of the last minutes: a pool grows and shrinks
COLUMNS = ("{task.fields[stage]}", BarColumn(), MofNCompleteColumn(), "{task.fields[left]}")


class ProgressReport:
    """Shows every event of a run that it is called with. A context manager, so that the bar goes away at the end."""

    def __init__(self, console: Console):
        self._console = console
        self._pace = Pace()
        self._last_line = float("-inf")
        self._bar = Bar(*COLUMNS, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("images", total=None, stage="starting", left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: "Progress") -> None:
        now = time.monotonic()
        told = [f"{event.failed} failed"] if event.failed else []
        left = "  ".join(told + self._pace.words(event, now))
        self._bar.update(self._task, completed=event.done, total=event.total, stage=event.stage, left=left)
        if self._bar.disable and (event.done == event.total or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            self._console.print(f"{event.stage}: {event.done}/{event.total} images  {left}")


class Pace:
    """Images a second. Counted from the first images drawn, since starting up takes long and says nothing of them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # when so many images were done, the window's first event first

    def words(self, event: "Progress", now: float) -> list[str]:
        """`1.5 images/s` and `ETA 1:02:03` at the time `now`; empty while they cannot be told, and at the end."""
        if event.done <= event.resumed or event.done >= event.total:
            return []
        self._seen.append((now, event.done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()
        since, done = self._seen[0]
        if event.done == done or now <= since:
            return []
        pace = (event.done - done) / (now - since)
        seconds = round((event.total - event.done) / pace)
        return [f"{pace:.3g} images/s", f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"]
