"""How long work takes on a device, for benchmarks: medians in milliseconds."""

import statistics
import time
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]

_FLUSH_BYTES = 1 << 28  # more than any GPU's level-2 cache
_WARM_UP_CALLS = 3
_BUDGET_MS = 60.0  # of one measurement
_FEWEST, _MOST = 10, 100


def timer(device: torch.device) -> Timer:
    """What measures on `device`."""
    return graph_milliseconds if device.type == "cuda" else clock_milliseconds


def graph_milliseconds(call: Callable[[], object]) -> float:
    """Median of a CUDA graph that holds one `call`, each time with a level-2 cache that holds nothing of it.

    Replaying a graph leaves out Python's and the launchers' time, which a real step hides behind earlier kernels. What
    stays is a constant of a few microseconds between the events (`launch_floor`).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    first = _replays(graph, flush, 3)
    repeats = int(min(max(_BUDGET_MS / max(first, 1e-3), _FEWEST), _MOST))
    return _replays(graph, flush, repeats)


def clock_milliseconds(call: Callable[[], object]) -> float:
    """Median of five calls by the wall clock, after one that does not count; for work on the CPU."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def copy_bandwidth(device: torch.device, measure: Timer, n_bytes: int = 1 << 30) -> float:
    """GB (1e9 bytes) read and written a second by a plain kernel that reads `n_bytes` and writes as many.

    Not by Tensor.copy_: a CUDA graph hands that to the copy engine, which is a third slower than the multiprocessors.
    """
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / measure(lambda: torch.neg(source, out=target)) / 1e6


def launch_floor(device: torch.device, measure: Timer) -> float:
    """What the timer says of a kernel that does next to nothing, in milliseconds."""
    one = torch.ones(1, device=device)
    return measure(lambda: one.add_(1))


def _replays(graph: "torch.cuda.CUDAGraph", flush: torch.Tensor, repeats: int) -> float:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
