"""Which config a product gets: the one measured near its number of tokens, else the safe one of the capability."""

import json

import pytest
import torch

from kernels import autotune, tuning
from kernels._gemm_config import default_config
from kernels.autotune import TunedRow
from kernels.gemm import GemmConfig, config_to_dict

SMALL = GemmConfig(64, 8, 64, warps=4, stages=3)
LARGE = GemmConfig(64, 64, 64, warps=4, stages=3)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU of capability 9.0 whose model has a file of configs."""
    tuning.choose_config.cache_clear(), tuning.tuned_config.cache_clear(), tuning._products.cache_clear()
    rows = [
        TunedRow("layer", "int8", 96, 64, tokens, json.dumps(config_to_dict(config)), 1.0)
        for tokens, config in ((2, SMALL), (512, LARGE))
    ]
    rows.append(TunedRow("layer", "int8", 96, 64, 4096, error="nothing ran"))
    autotune.write_configs(rows, tmp_path, "NVIDIA Test")
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    tuning.choose_config.cache_clear(), tuning.tuned_config.cache_clear(), tuning._products.cache_clear()


@pytest.mark.parametrize(("tokens", "expected"), [(1, SMALL), (8, SMALL), (512, LARGE), (200, LARGE), (2048, LARGE)])
def test_the_nearest_measured_config(gpu, tokens, expected):
    assert tuning.choose_config("int8", tokens, 96, 64, CUDA) == expected


@pytest.mark.parametrize(
    ("kind", "tokens", "features"),
    [
        ("int8", 17, 96),  # 16 and 17 tokens wait for different things
        ("int8", 16, 96),  # too far from 2
        ("int8", 4096, 96),  # too far from 512, and nothing ran at 4096
        ("16bit", 512, 96),
        ("int8", 512, 128),
    ],
)
def test_elsewhere_the_safe_config(gpu, kind, tokens, features):
    expected = default_config(kind, tokens, features, 64, 90)
    assert tuning.choose_config(kind, tokens, features, 64, CUDA) == expected


def test_an_unknown_gpu_gets_the_safe_config(gpu):
    gpu.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard-of")
    assert tuning.choose_config("int8", 512, 96, 64, CUDA) == default_config("int8", 512, 96, 64, 90)


def test_the_files_of_the_repository_are_complete():
    files = sorted((tuning.CONFIGS).glob("*.json"))
    assert files
    for file in files:
        table = json.loads(file.read_text())
        assert file.stem == table["gpu"].replace(" ", "_")
        for entry in table["products"]:
            GemmConfig(**entry.pop("config"))
            assert sorted(entry) == ["in_features", "kind", "out_features", "tokens"]
