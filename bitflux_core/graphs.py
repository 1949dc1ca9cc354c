"""CUDA graphs of a function: its kernels follow each other without Python, which takes longer than some of them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Arguments = tuple[Tensor | None, ...]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    arguments: Arguments  # where a replay reads
    result: Tensor  # where it writes


class Graphs:
    """`function` of tensors on one GPU as CUDA graphs, one for each shape of its arguments, the last few of them kept.

    The first call of a shape runs as it is, which also compiles and allocates what must not be in a graph; the second
    one captures. The graphs share their memory, so the function's result is all that outlives a call. Not for autograd.
    """

    def __init__(self, function: Callable[..., Tensor], most: int = 4) -> None:
        self._function = function
        self._most = most
        self._graphs: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()  # None: seen once

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        """function(*arguments)."""
        shape = tuple(None if a is None else (a.shape, a.dtype, a.device) for a in arguments)
        known = shape in self._graphs
        graph = self._graphs.pop(shape, None)
        if known and graph is None:
            graph = self._captured(arguments)
        self._graphs[shape] = graph  # the last one used comes last
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        if graph is None:
            return self._function(*arguments)
        for kept, given in zip(graph.arguments, arguments, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        graph.graph.replay()
        return graph.result.clone()

    def _captured(self, arguments: Arguments) -> _Graph:
        kept = tuple(None if argument is None else argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._graphs.values() if other), None)
        # Other threads, such as those that fetch results, may go on calling CUDA.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = self._function(*kept)
        return _Graph(graph, kept, result)
