"""Finds the fastest block sizes of the ternary products on the GPU at hand, for kernels/configs.

Legend: M tokens, N output features, K input features.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference
from kernels._gemm_config import SMALL_M, GemmConfig, Kind, config_to_dict, default_config
from kernels.benchmark import Layer, random_packed
from kernels.gemm import launch
from kernels.timing import Timer

TOKENS = (512, 4608)  # FLUX.1-dev's text, and all tokens of an image of 1024 x 1024; tuning.py reaches to others
# Up to four tokens in 16 bits run as four times as many rows of int8 (kernels/cuda.py).
SMALL_TOKENS: dict[Kind, tuple[int, ...]] = {"int8": (1, 4, 16), "16bit": (16,)}


def _hopper(n: int, m: int, j: int, warps: int, stages: int, residents: int, subtiles: int, group: int = 8):
    return GemmConfig(n, m, j, warps, stages, group, False, subtiles, "hopper", residents)


HOPPER: dict[tuple[Kind, bool], list[GemmConfig]] = {
    ("int8", False): [
        *(_hopper(128, 128, 64, 4, 2, 2, 4, group) for group in (4, 8, 16)),
        _hopper(256, 128, 64, 8, 4, 1, 4, 4),
        _hopper(128, 64, 64, 4, 3, 2, 2),
        _hopper(64, 64, 64, 4, 4, 3, 2),
    ],
    ("16bit", False): [
        *(_hopper(128, 128, 32, 4, 3, 2, 4, group) for group in (4, 8, 16, 36)),
        _hopper(128, 256, 32, 8, 3, 1, 4),
        _hopper(128, 64, 32, 4, 4, 2, 2),
        _hopper(64, 64, 32, 4, 5, 3, 2),
    ],
    ("int8", True): [
        _hopper(128, 8, 128, 4, 5, 2, 1),
        _hopper(64, 8, 128, 4, 5, 3, 1),
        _hopper(128, 16, 128, 4, 4, 2, 1),
        _hopper(128, 16, 64, 4, 4, 4, 1),
    ],
    ("16bit", True): [
        _hopper(128, 8, 64, 4, 4, 4, 1),
        _hopper(64, 8, 64, 4, 5, 6, 1),
        _hopper(256, 8, 64, 8, 4, 2, 1),
        _hopper(128, 16, 64, 4, 4, 3, 1),
    ],
}


@dataclass
class TunedRow:
    """The fastest config (as JSON) of one product, and its milliseconds; `error` says why no config ran."""

    layer: str
    kind: str
    out_features: int
    in_features: int
    tokens: int
    config: str | None = None
    milliseconds: float | None = None
    tried: int = 0
    error: str | None = None


def candidates(kind: Kind, tokens: int, capability: int) -> list[GemmConfig]:
    """Configs worth a trial; the safe one of the capability is always among them."""
    found = [default_config(kind, tokens, 4096, 4096, capability)]
    return found + (HOPPER[kind, tokens <= SMALL_M] if capability == 90 else [])


def tune(layers: tuple[Layer, ...], device: torch.device, measure: Timer) -> Iterator[TunedRow]:
    """A row for each kind of activations, layer and number of tokens, biases and all; residuals where N < K."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    cases: list[tuple[Kind, Layer, int]] = []
    kinds: tuple[Kind, ...] = ("int8", "16bit")
    for kind in kinds:
        for layer in layers:
            cases += [
                (kind, layer, tokens) for tokens in (TOKENS if max(layer.tokens) > SMALL_M else SMALL_TOKENS[kind])
            ]
    _compile(
        {
            (kind, config, tokens, layer.out_features < layer.in_features)
            for kind, layer, tokens in cases
            for config in candidates(kind, tokens, capability)
        }
    )
    for kind, layer, tokens in cases:
        row = TunedRow(layer.name, kind, layer.out_features, layer.in_features, tokens)
        operands = _Operands(kind, layer.out_features, layer.in_features, tokens, device)
        for config in candidates(kind, tokens, capability):
            try:
                milliseconds = measure(partial(operands.launch, config))
            except Exception as error:  # no memory for the tile, or no such instruction: the others still count
                row.error = row.error or f"{config}: {type(error).__name__}: {error}"
                continue
            row.tried += 1
            if row.milliseconds is None or milliseconds < row.milliseconds:
                row.config, row.milliseconds = json.dumps(config_to_dict(config)), milliseconds
        if row.config:
            row.error = None
        yield row


def write_configs(rows: list[TunedRow], folder: Path, gpu: str) -> Path:
    """The file that kernels/tuning.py reads for this GPU model."""
    products = [
        {
            "kind": row.kind,
            "out_features": row.out_features,
            "in_features": row.in_features,
            "tokens": row.tokens,
            "config": json.loads(row.config),
        }
        for row in rows
        if row.config
    ]
    file = folder / f"{gpu.replace(' ', '_')}.json"
    file.write_text(json.dumps({"gpu": gpu, "products": products}, indent=1) + "\n")
    return file


class _Operands:
    def __init__(self, kind: Kind, out_features: int, in_features: int, tokens: int, device: torch.device):
        x_MK = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=device)
        self.x: tuple[Tensor, Tensor | None, Tensor | None] = (x_MK, None, None)
        if kind == "int8":
            self.x = reference.quantize(x_MK)[:]
        self.packed_NJ = random_packed(out_features, in_features, device)
        self.scale_N = torch.rand(out_features, device=device)
        self.bias_N = torch.randn(out_features, dtype=torch.bfloat16, device=device)
        self.y_MN = torch.empty(tokens, out_features, dtype=torch.bfloat16, device=device)
        self.gate_BN = self.residual_MN = None
        if out_features < in_features:
            self.gate_BN, self.residual_MN = self.bias_N[None], torch.randn_like(self.y_MN)

    def launch(self, config: GemmConfig) -> None:
        weight = (self.packed_NJ, self.scale_N, self.bias_N)
        launch(self.y_MN, *self.x, *weight, self.gate_BN, self.residual_MN, config)


def _compile(jobs: set[tuple[Kind, GemmConfig, int, bool]]) -> None:
    """Compiles what will be measured, in processes side by side that share Triton's cache on disk."""
    workers = min(len(jobs), os.cpu_count() or 1, 12)  # each holds a CUDA context
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_compile_one, *job) for job in jobs]:
            future.exception()  # measuring meets it again


def _compile_one(kind: Kind, config: GemmConfig, tokens: int, residual: bool) -> None:
    shape = (3072, 6144) if residual else (6144, 3072)
    _Operands(kind, *shape, tokens, torch.device("cuda")).launch(config)
