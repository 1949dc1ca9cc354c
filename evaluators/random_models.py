"""The evaluators' models with random weights, written as the folders that they load: at full size, and tiny ones.

Full size is what manifests/profiles/flux-dev.yaml names. Vocabularies have the real sizes but for words in place of
word pieces; nothing is downloaded.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    BitConfig,
    BlipConfig,
    BlipForQuestionAnswering,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from evaluators.geneval_classes import GENEVAL_CLASSES

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's, and BLIP's
_DEPTH = {"is_hybrid": True, "readout_type": "project", "neck_ignore_stages": [0, 1], "use_auxiliary_head": False}
_BIT = {
    "global_padding": "same",
    "layer_type": "bottleneck",
    "embedding_dynamic_padding": True,
    "out_features": _STAGES[:3],
}
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Sizes:
    """Configurations by the libraries' own names; `words` are a text model's, `side` an image's pixels."""

    swin: dict[str, Any]
    mask2former: dict[str, Any]
    resized: bool  # Mask2Former's images, as the protocol resizes them
    clip: dict[str, Any]
    clip_score: dict[str, Any]
    blip_text: dict[str, Any]
    blip_vision: dict[str, Any]
    blip_words: int
    owl_text: dict[str, Any]
    owl_vision: dict[str, Any]
    owl_words: int
    bit: dict[str, Any]
    dpt: dict[str, Any]
    side: int = 1024


FULL = Sizes(
    # Swin-S, COCO instance segmentation; the rest of Mask2Former's defaults are its own.
    swin={"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    mask2former={},
    resized=True,
    clip=open_clip.get_model_config("ViT-L-14-quickgelu"),
    clip_score=open_clip.get_model_config("ViT-B-32-quickgelu"),
    # blip-vqa-capfilt-large: "large" is its captions; the image encoder is ViT-B/16.
    blip_text={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    blip_vision={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384},
    blip_words=30524,
    # owlv2-large-patch14-ensemble
    owl_text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    owl_vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1008,
        "patch_size": 14,
    },
    owl_words=49408,
    # dpt-hybrid-midas
    bit={"depths": [3, 4, 9]},
    dpt={"neck_hidden_sizes": [256, 512, 768, 768]},
)
_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY = Sizes(
    swin={"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 64},
    mask2former={
        "feature_size": 32,
        "mask_feature_size": 8,
        "hidden_dim": 32,
        "encoder_layers": 1,
        "encoder_feedforward_dim": 16,
        "decoder_layers": 2,
        "dim_feedforward": 16,
        "num_attention_heads": 2,
        "num_queries": 20,
    },
    resized=False,
    clip=_SMALL_CLIP,
    clip_score=_SMALL_CLIP,
    blip_text=_SMALL,
    blip_vision={**_SMALL, "image_size": 64, "patch_size": 16},
    blip_words=200,
    owl_text=_SMALL,
    owl_vision={**_SMALL, "image_size": 64, "patch_size": 16},
    owl_words=200,
    bit={"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "num_groups": 4},
    dpt={
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "backbone_out_indices": [0, 1, 2, 3],
        "backbone_featmap_shape": [1, 64, 4, 4],
        "neck_hidden_sizes": [16, 32, 32, 32],
        "fusion_hidden_size": 16,
    },
    side=64,
)


def _write_detector(sizes: Sizes, folder: Path, words: Sequence[str], device: torch.device) -> None:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**sizes.swin, out_features=_STAGES),
        id2label=dict(enumerate(GENEVAL_CLASSES)),
        **sizes.mask2former,
    )
    with device:
        model = Mask2FormerForUniversalSegmentation(config)
    model.save_pretrained(folder)
    preprocessing = {
        "do_resize": sizes.resized,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size_divisor": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def _write_clip(config: dict[str, Any], folder: Path, device: torch.device) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with device:
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, device=device)
    save_file(
        {name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


def _write_vqa(sizes: Sizes, folder: Path, words: Sequence[str], device: torch.device) -> None:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    # The model knows two more words than the tokenizer: [DEC], which begins an answer, and [ENC].
    tokenizer = _tokenizer((*_YES_NO, *words), sizes.blip_words - 2, ("[CLS]", "[SEP]"), 512, special)
    text = {
        **sizes.blip_text,
        "encoder_hidden_size": sizes.blip_vision["hidden_size"],
        "vocab_size": sizes.blip_words,
        "bos_token_id": sizes.blip_words - 2,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with device:
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=sizes.blip_vision))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": _MEAN, "image_std": _STD}))


def _write_named_detector(sizes: Sizes, folder: Path, words: Sequence[str], device: torch.device) -> None:
    special = {"pad_token": "!", "unk_token": "?", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = _tokenizer(words, sizes.owl_words, ("<s>", "</s>"), 16, special)
    text = {**sizes.owl_text, "vocab_size": sizes.owl_words, "max_position_embeddings": 16}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Owlv2Config(text_config=text, vision_config=sizes.owl_vision, projection_dim=sizes.owl_text["hidden_size"])
    with device:
        model = Owlv2ForObjectDetection(config)
    model.save_pretrained(folder)
    side = sizes.owl_vision["image_size"]
    Owlv2Processor(Owlv2ImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)


def _write_depth(sizes: Sizes, folder: Path, words: Sequence[str], device: torch.device) -> None:
    config = DPTConfig(backbone_config=BitConfig(**_BIT, **sizes.bit), **_DEPTH, **sizes.dpt)
    with device:
        model = DPTForDepthEstimation(config)
    model.save_pretrained(folder)


Writer = Callable[[Sizes, Path, Sequence[str], torch.device], None]

# How each role's folder is written: sizes, the folder, words that its texts have, where random numbers are made.
WRITERS: dict[str, Writer] = {
    "detector": _write_detector,
    "clip": lambda sizes, folder, _, device: _write_clip(sizes.clip, folder, device),
    "vqa": _write_vqa,
    "named_detector": _write_named_detector,
    "depth": _write_depth,
    "clip_score": lambda sizes, folder, _, device: _write_clip(sizes.clip_score, folder, device),
}


def _tokenizer(
    words: Sequence[str], size: int, ends: tuple[str, str], length: int, special: dict[str, str]
) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words: the special ones, `words`, and others to fill up; texts lie between the `ends`."""
    known = dict.fromkeys([*special.values(), *words])
    fillers = (f"word{number}" for number in range(size - len(known)))
    ids = {word: index for index, word in enumerate([*known, *fillers])}
    model = Tokenizer(tokenizer_models.WordLevel(ids, unk_token=special["unk_token"]))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(end, ids[end]) for end in ends]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=length, **special)
