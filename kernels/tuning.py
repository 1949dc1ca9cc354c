"""Which block sizes a ternary product runs with: measured ones for the GPUs at hand, safe ones for any other.

`configs/*.json`, a file a GPU model: {"gpu": the model's name, "products": [{"kind", "out_features", "in_features",
"tokens", "config": the fields of a GemmConfig}]}. `jobs/bench.py tune` writes such a file.
"""

import functools
import json
from pathlib import Path

import torch

from kernels._gemm_config import SMALL_M, GemmConfig, Kind, config_from_dict, default_config

CONFIGS = Path(__file__).parent / "configs"
_REACH = 4  # a config holds for token counts within this factor of the one it was measured at


@functools.cache
def tuned_config(
    kind: Kind, tokens: int, out_features: int, in_features: int, device: torch.device
) -> GemmConfig | None:
    """The config measured on this GPU model for this weight at the nearest number of tokens, or None."""
    near = []
    for entry in _products(torch.cuda.get_device_name(device)):
        same = (entry["kind"], entry["out_features"], entry["in_features"]) == (kind, out_features, in_features)
        factor = max(entry["tokens"], tokens) / min(entry["tokens"], tokens)
        if same and factor <= _REACH and (entry["tokens"] <= SMALL_M) == (tokens <= SMALL_M):
            near.append((factor, entry["config"]))
    return config_from_dict(min(near, key=lambda pair: pair[0])[1]) if near else None


@functools.cache
def choose_config(kind: Kind, tokens: int, out_features: int, in_features: int, device: torch.device) -> GemmConfig:
    """The tuned config, or where there is none the safe one of the device's compute capability."""
    major, minor = torch.cuda.get_device_capability(device)
    tuned = tuned_config(kind, tokens, out_features, in_features, device)
    return tuned or default_config(kind, tokens, out_features, in_features, 10 * major + minor)


@functools.cache
def _products(gpu: str) -> list[dict]:
    for file in sorted(CONFIGS.glob("*.json")):
        table = json.loads(file.read_text())
        if table["gpu"] == gpu:
            return table["products"]
    return []
