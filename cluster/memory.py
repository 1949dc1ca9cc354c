"""Drawing a call's batches in the memory that there is: one that does not fit is halved, down to single images."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cluster.faults import is_out_of_memory
from cluster.pieces import DrawBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """The kept images uint8 [N, H, W, 3], each one's seconds (its batch's, divided by all slots, padding included), and
    the size of its batch where that was smaller than planned, else None."""

    images: np.ndarray
    seconds: tuple[float, ...]
    batch_sizes: tuple[int | None, ...]


def draw_batches(
    draw: Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray],
    batches: tuple[DrawBatch, ...],
    free_memory: Callable[[], None],
) -> Drawing:
    """Draws `batches`, none of them empty, by `draw(prompts, noise_seeds)`, which returns uint8 [B, H, W, 3].

    Once a batch had to be halved, those after it are drawn in that size too. Raises what `draw` raises, and its
    out-of-memory error where a single image does not fit.
    """
    images: np.ndarray | None = None  # one array, filled as it is drawn: no image is held twice
    seconds: list[float] = []
    sizes: list[int | None] = []
    planned = size = len(batches[0].noise_seeds)
    waiting = deque(batches)
    while waiting:
        first, *rest = _parts(waiting.popleft(), size)
        waiting.extendleft(reversed(rest))
        begun = time.perf_counter()
        drawn = _attempt(draw, first)
        if drawn is None:
            size = (len(first.noise_seeds) + 1) // 2
            waiting.appendleft(first)
            free_memory()
            continue
        elapsed = time.perf_counter() - begun
        if images is None:
            images = np.empty((sum(len(batch.kept) for batch in batches), *drawn.shape[1:]), np.uint8)
        images[len(seconds) : len(seconds) + len(first.kept)] = drawn[list(first.kept)]
        seconds += [elapsed / len(first.noise_seeds)] * len(first.kept)
        sizes += [None if size == planned else len(first.noise_seeds)] * len(first.kept)
    assert images is not None
    return Drawing(images, tuple(seconds), tuple(sizes))


def _attempt(draw: Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray], batch: DrawBatch) -> np.ndarray | None:
    """The images of `batch`, None where it does not fit in memory and can be halved."""
    try:
        return draw(batch.prompts, batch.noise_seeds)
    except Exception as error:
        if len(batch.noise_seeds) == 1 or not is_out_of_memory(error):
            raise
        log.warning("a batch of %d does not fit and is halved: %s", len(batch.noise_seeds), str(error).split("\n")[0])
    return None  # here the error is gone, and with it the tensors of the call that raised it


def _parts(batch: DrawBatch, size: int) -> Iterator[DrawBatch]:
    """`batch` cut into batches of at most `size` slots; those without an image to keep are left out."""
    for start in range(0, len(batch.noise_seeds), size):
        end = start + size
        kept = tuple(slot - start for slot in batch.kept if start <= slot < end)
        if kept:
            yield DrawBatch(batch.prompts[start:end], batch.noise_seeds[start:end], kept)
