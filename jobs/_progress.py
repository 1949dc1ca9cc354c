"""Progress with an estimate of the time left, on standard error: a bar in a terminal, a line now and then elsewhere."""

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from cluster.run import Progress

SECONDS_BETWEEN_LINES = 10.0
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
        left = self._pace.time_left(event, now)
        if event.failed:
            left = f"{event.failed} failed  {left}"
        self._bar.update(self._task, completed=event.done, total=event.total, stage=event.stage, left=left)
        if self._bar.disable and (event.done == event.total or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            self._console.print(f"{event.stage}: {event.done}/{event.total} images  {left}")


class Pace:
    """Seconds an image. Counted from the first images drawn, since starting up takes long and says nothing of them."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def time_left(self, event: "Progress", now: float) -> str:
        """`ETA 1:02:03` at the time `now`; empty while it cannot be told, and at the end."""
        if event.done <= event.resumed or event.done >= event.total:
            return ""
        if self._first is None:
            self._first = (now, event.done)
        since, done = self._first
        if event.done == done:
            return ""
        seconds = round((now - since) * (event.total - event.done) / (event.done - done))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
