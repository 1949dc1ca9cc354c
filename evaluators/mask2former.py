"""Mask2Former as GenEval runs it: the protocol's own pre- and post-processing, over transformers' network or another.

transformers' post-processing resizes masks to 384x384 and merges overlapping ones; the protocol does neither.

Legend: B images, Q queries, C classes, K candidates, U queries with a candidate; H, W the image; h, w the mask logits.
"""

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from bitflux_core.errors import UserError
from evaluators.base import Box, Detection, image_fault
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, pad_batch, unloadable

LONG_SIDE, SHORT_SIDE = 1333, 800  # keep-ratio resize to (1333, 800), for a model whose folder asks for a resize
TOP_CANDIDATES = 100  # the best of queries x classes


@dataclass(frozen=True)
class Preprocessing:
    """What the protocol takes from the folder's preprocessor_config.json. Mean and std are for RGB in [0, 1]."""

    resize: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: int

    @classmethod
    def read(cls, path: Path) -> "Preprocessing":
        """Raises ValueError or KeyError where the file is not such a configuration."""
        config = json.loads(path.read_text())
        divisor = config.get("size_divisor", 32)
        return cls(bool(config["do_resize"]), tuple(config["image_mean"]), tuple(config["image_std"]), divisor)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the image as the network sees it, padding left out."""
        if not self.resize:
            return height, width
        scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def pixels(self, images: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Images of one size as the network's input: float32 [B, 3, H', W'], zero-padded after the normalisation."""
        pixels_BCHW = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float()
        height, width = self.network_size(*pixels_BCHW.shape[-2:])
        if (height, width) != tuple(pixels_BCHW.shape[-2:]):
            # Bilinear without antialiasing, rounded to 8 bits: the resize under which the COCO weights were measured.
            pixels_BCHW = F.interpolate(pixels_BCHW, (height, width), mode="bilinear", align_corners=False).round()
        mean_C = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        std_C = torch.tensor(self.std, device=device).view(-1, 1, 1)
        return F.pad((pixels_BCHW / 255 - mean_C) / std_C, (0, -width % self.divisor, 0, -height % self.divisor))


class Mask2Former(ABC):
    """Instance segmentation by the protocol. Batches have one fixed size, so no result depends on its neighbours."""

    def __init__(
        self,
        device: str | torch.device,
        preprocessing: Preprocessing,
        labels: Sequence[str],
        batch_size: int,
        min_score: float,
        fingerprint: str,
    ) -> None:
        """`labels` are the network's classes in order; detections that score `min_score` or less are left out."""
        self.device = torch.device(device)
        self.preprocessing = preprocessing
        self.labels = tuple(labels)
        self.batch_size = batch_size
        self.min_score = min_score
        self.fingerprint = fingerprint

    @abstractmethod
    def _logits(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, C + 1], "no object" last, and mask logits [B, Q, h, w]."""

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """The network's input for images of one size, float32 [B, 3, H', W']."""
        return self.preprocessing.pixels(images, self.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Each image's detections, best first. Raises ValueError for what is not an image."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            if fault := image_fault(image):
                raise ValueError(f"image {index}: {fault}")
            by_shape[image.shape].append(index)
        found: list[list[Detection]] = [[] for _ in images]
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                chunk = indices[start : start + self.batch_size]
                batch = self._detect_batch([images[i] for i in chunk], self.min_score)
                for index, detections in zip(chunk, batch, strict=True):
                    found[index] = detections
        return found

    def detect_faint(self, image: np.ndarray) -> list[Detection]:
        """One image's candidates, best first, however little they score."""
        return self._detect_batch([image], 0.0)[0]

    @exact_inference()
    def _detect_batch(self, images: Sequence[np.ndarray], min_score: float) -> list[list[Detection]]:
        pixels_BCHW = pad_batch(self._pixels(images), self.batch_size)
        logits_BQC, masks_BQhw = self._logits(pixels_BCHW)
        padded_size, image_size = pixels_BCHW.shape[-2:], images[0].shape[:2]
        network_size = self.preprocessing.network_size(*image_size)
        found: list[list[Detection]] = []
        for index in range(len(images)):
            label_K, score_K, query_K = candidates(logits_BQC[index], min_score)
            if len(query_K) == 0:
                found.append([])
                continue
            query_U, place_K = query_K.unique(return_inverse=True)
            masks_UHW = full_size_masks(masks_BQhw[index][query_U], padded_size, network_size, image_size)
            score_K = score_K * mask_confidence(masks_UHW)[place_K]
            found.append(self._build(label_K, score_K, (masks_UHW > 0)[place_K], min_score))
        return found

    def _build(self, label_K: Tensor, score_K: Tensor, mask_KHW: Tensor, min_score: float) -> list[Detection]:
        """Detections of the candidates that score more than `min_score` and have a mask, best first."""
        order_K = score_K.argsort(descending=True, stable=True)
        order_K = order_K[(score_K[order_K] > min_score) & mask_KHW[order_K].flatten(1).any(1)]
        masks = mask_KHW[order_K].cpu().numpy()
        rows = zip(label_K[order_K].tolist(), score_K[order_K].tolist(), masks, strict=True)
        return [Detection(self.labels[label], score, mask_extent(mask), mask) for label, score, mask in rows]


class Mask2FormerDetector(Mask2Former):
    """transformers' Mask2Former, from a folder in its format."""

    def __init__(
        self,
        model_dir: str | Path,
        device: str | torch.device = "cpu",
        *,
        batch_size: int = 8,
        labels: Sequence[str] | None = None,
        min_score: float = 0.0,
    ) -> None:
        """`labels` renames the model's classes in order; detections that score `min_score` or less are left out.

        Raises UserError where the folder is missing, incomplete, damaged, or has another number of classes.
        """
        folder = model_folder(model_dir, "detector", ("config.json", "preprocessor_config.json"))
        self.model = load_pretrained(Mask2FormerForUniversalSegmentation, folder, "detector", device)
        try:
            preprocessing = Preprocessing.read(folder / "preprocessor_config.json")
        except (KeyError, ValueError) as fault:
            raise unloadable(folder, "detector", f"preprocessor_config.json: {fault}") from fault
        own_labels: Any = self.model.config.id2label
        labels = tuple(labels or (own_labels[index] for index in range(len(own_labels))))
        check_classes(folder, len(own_labels), labels)
        identity = fingerprint(folder, labels, min_score, batch_size)
        super().__init__(device, preprocessing, labels, batch_size, min_score, identity)

    def _logits(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=pixels_BCHW)
        return output.class_queries_logits, output.masks_queries_logits


def check_classes(folder: Path, classes: int, labels: Sequence[str]) -> None:
    """UserError where the model in `folder` has another number of classes than there are labels."""
    if len(labels) != classes:
        raise UserError(
            f"detector folder {folder} knows {classes} classes, not {len(labels)}: "
            "name a detector that was trained on this benchmark's classes"
        )


def candidates(logits_QC: Tensor, min_score: float) -> tuple[Tensor, Tensor, Tensor]:
    """Class, class probability and query of the top 100 over queries x classes (the last logit is "no object").

    The final score is this probability times a mean of at most 1, so what is not above `min_score` here never will be.
    """
    score_QC = logits_QC.float().softmax(-1)[:, :-1]
    score_K, index_K = score_QC.flatten().topk(min(TOP_CANDIDATES, score_QC.numel()))
    keep_K = score_K > min_score
    classes = score_QC.shape[-1]
    return index_K[keep_K] % classes, score_K[keep_K], index_K[keep_K] // classes


def full_size_masks(
    masks_Uhw: Tensor, padded_size: Sequence[int], network_size: Sequence[int], image_size: Sequence[int]
) -> Tensor:
    """Mask logits at the image's size, [U, H, W]: up to the padded input, the padding cut off, then to the image."""
    masks_1UHW = F.interpolate(masks_Uhw[None].float(), tuple(padded_size), mode="bilinear", align_corners=False)
    masks_1UHW = masks_1UHW[..., : network_size[0], : network_size[1]]
    if tuple(network_size) != tuple(image_size):
        masks_1UHW = F.interpolate(masks_1UHW, tuple(image_size), mode="bilinear", align_corners=False)
    return masks_1UHW[0]


def mask_confidence(masks_UHW: Tensor) -> Tensor:
    """Mean sigmoid of the logits inside each mask (logit > 0); 0 for an empty mask. Float [U]."""
    inside_UHW = masks_UHW > 0
    total_U = (masks_UHW.sigmoid() * inside_UHW).flatten(1).sum(1)
    return total_U / (inside_UHW.flatten(1).sum(1) + 1e-6)


def mask_extent(mask_HW: np.ndarray) -> Box:
    """The smallest box around a mask that is not empty."""
    columns = np.flatnonzero(mask_HW.any(axis=0))
    rows = np.flatnonzero(mask_HW.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
