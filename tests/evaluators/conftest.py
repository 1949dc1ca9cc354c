"""Tiny random models in the folder formats of the real ones, and detections drawn by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from evaluators.base import Box, Detection
from evaluators.geneval import COLORS

LABELS = ("circle", "square", "star")
PREPROCESSOR = {
    "do_resize": False,
    "image_mean": [0.5, 0.25, 0.0],
    "image_std": [0.25, 0.5, 1.0],
    "size_divisor": 32,
}

MakeDetection = Callable[..., Detection]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As every CPU actor computes: sums split over threads differ in their last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def detector_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=8,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=5,
        id2label=dict(enumerate(LABELS)),
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "photo", "of", "object", *LABELS, *COLORS]
    words += [f"{color}-colored" for color in COLORS]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {
            "context_length": 10,
            "vocab_size": len(words),
            "width": 16,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": ".",
            "pool_type": "eos",
            "eos_id": ids["<eos>"],
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def make_detection() -> MakeDetection:
    """A detection whose mask fills its box, in an image of 100 x 100 pixels."""

    def make(label: str, score: float = 0.95, box: Box = (10.0, 10.0, 30.0, 30.0)) -> Detection:
        mask = np.zeros((100, 100), dtype=bool)
        x1, y1, x2, y2 = (int(edge) for edge in box)
        mask[y1:y2, x1:x2] = True
        return Detection(label, score, box, mask)

    return make
