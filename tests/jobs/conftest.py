"""A profile over random mini models, so that whole jobs run for real in seconds and need no trained weights."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

from bitflux_core.mini import clip as mini_clip
from bitflux_core.mini import depth as mini_depth
from bitflux_core.mini import detector as mini_detector
from bitflux_core.mini import vqa as mini_vqa
from bitflux_core.mini.models import build_pipeline
from jobs import quantize

PROFILE = {
    "name": "random",
    "sampling": {"width": 64, "height": 64, "steps": 1, "guidance": 2.0, "max_sequence_length": 16},
    "batch_size": 4,
    "shard_seconds": 0.001,
    "dtype": "float32",
    "benchmarks": ["mini-geneval"],
    "variants": ["bf16", "ternary"],
    "limit": 1,
    "images_per_prompt": 2,
}
NAMES = {
    "pipeline": "flux",
    "ternary": "ternary",
    "detector": "detector",
    "clip": "clip",
    "vqa": "vqa",
    "named_detector": "detector",
    "depth": "depth",
    "clip_score": "clip",
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of flux, ternary, detector, clip, vqa and depth, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    build_pipeline(seed=0).save_pretrained(folder / "flux")
    mini_detector.save_detector(mini_detector.build_detector(), folder / "detector")
    mini_clip.write_config(folder / "clip")
    torch.manual_seed(0)
    mini_clip.save_weights(mini_clip.build_clip(folder / "clip"), folder / "clip")
    tokenizer = mini_vqa.build_tokenizer()
    mini_vqa.save_vqa(mini_vqa.build_vqa(tokenizer), tokenizer, folder / "vqa")
    mini_depth.save_depth(mini_depth.build_depth(), folder / "depth")
    arguments = ["--init", "least-squares", "--output", str(folder / "ternary")]
    assert quantize.main(["--profile", write_profile(folder, NAMES), *arguments]) == 0
    return folder


def write_profile(folder: Path, models: Mapping[str, str | None], **changes: object) -> str:
    path = folder / "random.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "models": models, **changes}))
    return str(path)


@pytest.fixture(scope="session")
def profile(models: Path) -> str:
    """The path of a profile over those models: six prompts, two images each, two variants."""
    return str(models / "random.yaml")


@pytest.fixture
def make_profile(models: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes that profile with other models (by role) or other values for some keys, and returns its path."""

    def make(others: dict[str, str | None] | None = None, **changes: object) -> str:
        there = {role: str(models / name) for role, name in NAMES.items()}
        return write_profile(tmp_path, {**there, **(others or {})}, **changes)

    return make
