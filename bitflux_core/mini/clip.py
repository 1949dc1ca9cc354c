"""The mini CLIP: open_clip at small dimensions with a word-level tokenizer, in open_clip's own folder format."""

import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file

from bitflux_core.mini.models import TOKENS, build_tokenizer

WEIGHTS = "open_clip_model.safetensors"
IMAGE_SIZE = 64
MEAN = STD = (0.5, 0.5, 0.5)


def write_config(directory: Path) -> None:
    """Writes what open_clip's `local-dir:` scheme reads beside the weights: configuration and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(start=True)
    tokenizer.save_pretrained(directory)
    config = {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 3, "width": 96, "head_width": 24, "patch_size": 8},
            "text_cfg": {
                "context_length": TOKENS,
                "vocab_size": len(tokenizer),
                "width": 64,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": ".",  # any name: under `local-dir:` the tokenizer is read from this folder
                "tokenizer_kwargs": {"clean": "whitespace"},
                "eos_id": tokenizer.eos_token_id,
                "pool_type": "eos",
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_clip(directory: Path) -> open_clip.CLIP:
    """After the configuration in `directory`, with the weights there, if there are any, or random ones."""
    return open_clip.create_model(f"local-dir:{directory}", load_weights=(directory / WEIGHTS).is_file())


def save_weights(model: open_clip.CLIP, directory: Path) -> None:
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS)
