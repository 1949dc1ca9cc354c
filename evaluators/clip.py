"""CLIP through open_clip: unit-length features of images and texts, and GenEval's colour classifier on top of them.

Legend: N images or texts, D feature dimensions, L colours, T templates.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from evaluators.base import Detection
from evaluators.geneval import COLORS
from evaluators.inference import exact_inference, fingerprint, model_folder, pad_batch, unloadable

# "a" also before a vowel: the official wording.
COLOR_TEMPLATES = ("a photo of a {c} {label}", "a photo of a {c}-colored {label}", "a photo of a {c} object")
BACKGROUND = 0x99  # pixels outside the mask become #999


class ClipModel:
    """An open_clip model in open_clip's folder format: open_clip_config.json, the weights, the tokenizer's files.

    OpenAI's weights need `"quick_gelu": true` in that configuration (open_clip's ViT-L-14-quickgelu); without it
    they load without complaint and see badly.
    """

    def __init__(self, model_dir: str | Path, device: str | torch.device = "cpu", *, batch_size: int = 4) -> None:
        """Raises UserError where the folder is missing, incomplete or damaged."""
        folder = model_folder(model_dir, "CLIP", ("open_clip_config.json",))
        try:
            self.model, self.transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", device=device)
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as fault:
            raise unloadable(folder, "CLIP", fault) from fault
        self.model.eval()
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.fingerprint = fingerprint(folder, batch_size)

    @exact_inference()
    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB arrays, of any sizes, through the model's standard transform. Float32 [N, D] on the CPU."""
        rows = torch.stack([self.transform(Image.fromarray(image)) for image in images])
        return torch.cat([self._unit(self.model.encode_image, part) for part in rows.split(self.batch_size)])

    @exact_inference()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Float32 [N, D] on the CPU. The tokenizer cuts a text that is longer than the model's context."""
        tokens = self.tokenizer(list(texts))
        return torch.cat([self._unit(self.model.encode_text, part) for part in tokens.split(self.batch_size)])

    def _unit(self, encode: Callable[[Tensor], Tensor], part_BX: Tensor) -> Tensor:
        features_BD = encode(pad_batch(part_BX, self.batch_size).to(self.device))[: len(part_BX)]
        return F.normalize(features_BD.float(), dim=-1).cpu()


class ClipColorClassifier:
    """GenEval's zero-shot colour of an object: the nearest of ten colour embeddings, each a mean of three wordings."""

    def __init__(self, clip: ClipModel) -> None:
        self.clip = clip
        self.fingerprint = fingerprint(COLORS, COLOR_TEMPLATES, clip.fingerprint)
        self._by_label: dict[str, Tensor] = {}

    def classify(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str]:
        """The colour of each detection of this image."""
        if not detections:
            return []
        features_ND = self.clip.image_features([object_crop(image, detection) for detection in detections])
        # The protocol's factor of 100 on the cosines is left out: it does not move the maximum.
        return [
            COLORS[int((self._color_features(detection.label) @ feature_D).argmax())]
            for detection, feature_D in zip(detections, features_ND, strict=True)
        ]

    def _color_features(self, label: str) -> Tensor:
        """Unit embeddings of the colours of a class, float32 [L, D]; made once a class."""
        if label not in self._by_label:
            texts = [template.format(c=color, label=label) for color in COLORS for template in COLOR_TEMPLATES]
            mean_LD = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(COLOR_TEMPLATES))).mean(1)
            self._by_label[label] = F.normalize(mean_LD, dim=-1)
        return self._by_label[label]


def object_crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The object alone on #999, cut to its box: uint8 [h, w, 3]."""
    if detection.mask is None:
        raise ValueError(f"a detection of {detection.label} has no mask: its colour needs a detector that makes masks")
    alone = np.where(detection.mask[..., None], image, np.uint8(BACKGROUND))
    x1, y1, x2, y2 = (round(edge) for edge in detection.box)
    return np.ascontiguousarray(alone[y1:y2, x1:x2])
