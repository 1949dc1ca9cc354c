"""Actors that hold no models: they take the time that they are told, and note when. For measuring the scheduler.

Imports are light, since there may be a hundred such processes on a small machine.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cluster.pieces import DrawBatch
    from cluster.plan import ShardKey
    from cluster.rows import ScoredImage

EDGE = 8  # pixels of a stub image's sides
POLL_S = 0.25


class Gate:
    """Lets a number of processes start together, once all have come; their start is not what is measured."""

    def __init__(self, folder: Path, processes: int) -> None:
        self._folder = folder
        self._processes = processes

    def pass_together(self) -> None:
        """Returns at the same moment in every process: soon after the last one came."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / str(os.getpid())).touch()
        while len(os.listdir(self._folder)) < self._processes:
            time.sleep(POLL_S)
        last = max(path.stat().st_mtime for path in self._folder.iterdir())
        time.sleep(max(0.0, last + 4 * POLL_S - time.time()))


class DrawLog:
    """When a process drew: begin and end of each call, in seconds of this machine's clock, and its images."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, begun: float, ended: float, images: int) -> None:
        with (self._folder / f"draws-{os.getpid()}.txt").open("a") as file:
            file.write(f"{begun} {ended} {images}\n")

    def read(self) -> list[list[tuple[float, float, int]]]:
        """All processes' calls, each process's in their order."""
        return [list(_calls(path)) for path in sorted(self._folder.glob("draws-*.txt"))]


class StubReplica:
    def __init__(self, seconds_a_sample: float, gate: Gate | None, log: DrawLog | None) -> None:
        self._seconds, self._gate, self._log = seconds_a_sample, gate, log

    def start(self, variant: str) -> None:
        import cluster.rows  # noqa: F401  a second, which would be the first call's

        if self._gate:
            self._gate.pass_together()

    def draw(self, variant: str, batches: "tuple[DrawBatch, ...]", *embeddings: Any) -> Any:
        from cluster.rows import DrawReport, ModelUse

        images = sum(len(batch.kept) for batch in batches)
        seconds, pixels = stub_draw(images, self._seconds, self._log)
        use = ModelUse(0, 0, "cpu-resident", "stub")
        return DrawReport((seconds / images,) * images, f"stub:{os.getpid()}", use), pixels


class StubEncoder:
    def start(self) -> None: ...

    def encode(self, prompts: list[str]) -> tuple[Any, ...]:
        return (None, *(stub_embedding(prompt) for prompt in prompts))


class StubEvaluator:
    def start(self) -> None: ...

    def score(self, key: "ShardKey", wanted: list[Any], images: np.ndarray) -> "list[ScoredImage]":
        from cluster.rows import ScoredImage

        return [ScoredImage(score, True, "", "[]", None, "", "", "stub") for score in stub_scores(images)]


def stub_draw(images: int, seconds_a_sample: float, log: DrawLog | None) -> tuple[float, np.ndarray]:
    """Waits as long as drawing would take: the seconds that were waited, and images uint8 [N, H, W, 3]."""
    begun = time.time()
    time.sleep(images * seconds_a_sample)
    pixels = np.zeros((images, EDGE, EDGE, 3), np.uint8)
    ended = time.time()
    if log:
        log.add(begun, ended, images)
    return ended - begun, pixels


def stub_embedding(prompt: str) -> np.ndarray:
    """A small array that depends on the prompt."""
    return np.full(16, len(prompt), np.float32)


def stub_scores(images: np.ndarray) -> list[float]:
    """A score for each image."""
    return [float(image.mean()) for image in images]


def _calls(path: Path) -> Iterator[tuple[float, float, int]]:
    for line in path.read_text().splitlines():
        begun, ended, images = line.split()
        yield float(begun), float(ended), int(images)
