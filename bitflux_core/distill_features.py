"""What the loss compares: the velocity, and what some blocks give on the way to it.

Legend: B states.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn


class BlockOutputs:
    """What some blocks give while `kept` is open: image and text tokens, one after the other."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.outputs: list[Tensor] = []
        self._open = False
        for name in names:
            model.get_submodule(name).register_forward_hook(self._keep)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        self._open = True  # blocks that are computed again in the backward pass do not count
        try:
            yield
        finally:
            self._open = False

    def drop(self) -> None:
        self.outputs.clear()

    def _keep(self, _module: nn.Module, _arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
        if self._open:
            self.outputs.extend(output)


def spread_names(blocks: Sequence[str], count: int) -> list[str]:
    """`count` of the blocks, evenly, without the last, whose output the velocity shows."""
    count = min(count, len(blocks) - 1)
    return [blocks[(index + 1) * len(blocks) // (count + 1) - 1] for index in range(count)]


def state_errors(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared error over the target's mean square, [B]: each state counts alike, whoever shares its batch."""
    theirs = theirs.detach().float().flatten(1)
    return (mine.float().flatten(1) - theirs).square().mean(1) / theirs.square().mean(1).clamp(min=1e-8)
