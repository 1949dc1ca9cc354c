"""How long a transformer takes from its files to the device, and how much of the host's memory meanwhile.

Each checkpoint is loaded in a process of its own, as a replica does, which has its imports and its CUDA context before
the clock starts: once from storage, the files' pages dropped from the page cache before, and then from that cache.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitflux_core.benchmark.models import DTYPE, Sizes, random_transformer
from bitflux_core.benchmark.rows import GB, attempt, release
from bitflux_core.benchmark.steps import synchronize
from bitflux_core.checkpoint import save_ternary
from bitflux_core.loading import load_transformer
from kernels.packing import Codes

CASES: tuple[tuple[str, Codes | None], ...] = (("bf16", None), ("ternary", "trits"), ("ternary", "planes"))
CACHED_LOADS = 3


@dataclass(frozen=True)
class LoadingRow:
    """One checkpoint. GB are 1e9 bytes; None: not measured.

    Attributes:
        mode: a name in bitflux_core/variants.py.
        codes: how the checkpoint stores ternary codes; None where it has none.
        stored_gb: its tensor files.
        from_storage_s: seconds until the transformer is on the device, no file in the page cache.
        from_cache_s: the same with all files there, the median of several loads.
        faster: the first row's from_cache_s over this one's.
        host_peak_gb: most memory that the process held in its first load beyond what it held before, mapped files
            included.
        error: what went wrong, a line.
    """

    mode: str
    codes: str | None
    stored_gb: float | None = None
    from_storage_s: float | None = None
    from_cache_s: float | None = None
    faster: float | None = None
    host_peak_gb: float | None = None
    error: str | None = None


def measure_loading(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[LoadingRow]:
    """A row for each of `CASES`; checkpoints are made in `folder` one after the other, and removed again.

    FLUX.1-dev's take 24 GB there.
    """
    first: LoadingRow | None = None
    for mode, codes in CASES:
        with tempfile.TemporaryDirectory(prefix="loading-", dir=folder) as made:
            measure = partial(_measure, mode, codes, sizes, device, Path(made))
            row = attempt(LoadingRow(mode, codes), measure)
        first = first or row
        if first.from_cache_s and row.from_cache_s:
            row = replace(row, faster=first.from_cache_s / row.from_cache_s)
        yield row


def _measure(mode: str, codes: Codes | None, sizes: Sizes, device: torch.device, made: Path) -> dict[str, Any]:
    folder = made / "transformer"
    transformer = random_transformer(mode, sizes, device)
    if codes is None:
        transformer.save_pretrained(folder)
    else:
        save_ternary(transformer, folder, {}, method="random", codes=codes)
    del transformer
    release()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _drop_from_cache(file)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        (from_storage_s, *cached_s), peak = pool.submit(_load, mode, made, folder, str(device)).result()
    return {
        "stored_gb": sum(file.stat().st_size for file in files) / GB,
        "from_storage_s": from_storage_s,
        "from_cache_s": statistics.median(cached_s),
        "host_peak_gb": peak / GB,
    }


def _drop_from_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages not yet written stay
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(mode: str, pipeline: Path, ternary: Path, device: str) -> tuple[list[float], int]:
    """Seconds of each load, and the peak bytes of the first."""
    place = torch.device(device)
    torch.zeros(1, device=place)  # the CUDA context
    synchronize(place)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports
    before = _status_bytes("VmRSS")
    seconds, peak = [], 0
    for _ in range(1 + CACHED_LOADS):
        start = time.perf_counter()
        loaded = load_transformer(mode, pipeline_dir=pipeline, ternary_dir=ternary, device=place, dtype=DTYPE)
        synchronize(place)
        seconds.append(time.perf_counter() - start)
        peak = peak or _status_bytes("VmHWM") - before
        del loaded
        release()
    return seconds, peak


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
