"""Detectors that find what they are asked for by name: transformers' OWLv2 and Grounding DINO, or a detector of fixed
classes whose labels mean the names.

Legend: B images, h x w = P patches, D feature dimensions, N names; C, H, W the network's input.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.models.owlv2.modeling_owlv2 import Owlv2ObjectDetectionOutput

from bitflux_core.errors import UserError
from evaluators.base import Detection, Detector, PromptedDetector, image_fault
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, pad_batch, unloadable
from evaluators.mask2former import Mask2FormerDetector

ROLE = "named detector"
OWL, GROUNDING_DINO, MASK2FORMER = "owlv2", "grounding-dino", "mask2former"
BATCH_SIZE = 4  # images, or with Grounding DINO images and names
OWL_PROMPT = "a photo of a {name}"  # the wording that OWL's authors evaluate with


def load_named_detector(model_dir: str | Path, device: str | torch.device, min_score: float) -> PromptedDetector:
    """The detector in a folder, by the model type in its config.json; detections score more than `min_score`.

    Raises UserError for a folder that is missing, damaged, or holds a model of another type.
    """
    folder = model_folder(model_dir, ROLE, ("config.json",))
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as fault:
        raise unloadable(folder, ROLE, f"config.json: {fault}") from fault
    if kind == OWL:
        return OwlDetector(folder, device, min_score)
    if kind == GROUNDING_DINO:
        return GroundingDetector(folder, device, min_score)
    if kind == MASK2FORMER:
        return NamedClasses(Mask2FormerDetector(folder, device, min_score=min_score))
    raise UserError(
        f"{ROLE} folder {folder} holds a model of type {kind!r}: name one of {OWL}, {GROUNDING_DINO} or {MASK2FORMER}"
    )


class _ZeroShotDetector:
    """What transformers' zero-shot detectors share. An image's neighbours in a batch move its scores by no more than
    the rounding of a sum."""

    def __init__(
        self, model_dir: str | Path, device: str | torch.device, min_score: float, *, batch_size: int = BATCH_SIZE
    ) -> None:
        folder = model_folder(model_dir, ROLE, ("config.json",))
        self.model = load_pretrained(AutoModelForZeroShotObjectDetection, folder, ROLE, device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise unloadable(folder, ROLE, fault) from fault
        self.device = torch.device(device)
        self.min_score = min_score
        self.batch_size = batch_size
        self.fingerprint = fingerprint(type(self).__name__, folder, min_score, batch_size)

    def detect_named(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's detections of its own `names`, best first. Raises ValueError for what is not an image."""
        for index, image in enumerate(images):
            if fault := image_fault(image):
                raise ValueError(f"image {index}: {fault}")
        # In a fixed order: how a prompt spells its objects must not change what is found.
        wanted = {index: sorted(set(some)) for index, some in enumerate(names) if some}
        detected = self._detect([images[index] for index in wanted], list(wanted.values()), self.min_score)
        found: list[list[Detection]] = [[] for _ in images]
        for index, detections in zip(wanted, detected, strict=True):
            found[index] = sorted(detections, key=lambda one: -one.score)
        return found

    def detect_faint(self, image: np.ndarray, names: Sequence[str]) -> list[Detection]:
        """One image's candidates for these names, best first, however little they score."""
        [found] = self._detect([image], [sorted(set(names))], 0.0)
        return sorted(found, key=lambda one: -one.score)

    def _detect(
        self, images: Sequence[np.ndarray], names: Sequence[list[str]], min_score: float
    ) -> list[list[Detection]]:
        """Each image's detections of its names, of which there are some, in any order."""
        raise NotImplementedError

    def _detections(
        self, result: dict[str, Any], labels: Sequence[str], image: np.ndarray, min_score: float
    ) -> list[Detection]:
        """What the processor found, with boxes cut at the image's edges; those with nothing left are left out."""
        height, width = image.shape[:2]
        edges = torch.tensor([width, height, width, height])
        boxes = result["boxes"].float().cpu().clamp(min=0).minimum(edges).tolist()
        rows = zip(labels, result["scores"].tolist(), boxes, strict=True)
        return [
            Detection(label, score, (x1, y1, x2, y2))
            for label, score, (x1, y1, x2, y2) in rows
            if score > min_score and x2 > x1 and y2 > y1
        ]


class OwlDetector(_ZeroShotDetector):
    """OWLv2 (Minderer et al. 2023): each box gets the name that fits it best.

    The parts of the model are called one by one: images go through the network in batches of one fixed size, a name
    goes through it once, and each image's boxes are compared with its own names alone, however many those are.
    """

    def __init__(
        self, model_dir: str | Path, device: str | torch.device, min_score: float, *, batch_size: int = BATCH_SIZE
    ) -> None:
        super().__init__(model_dir, device, min_score, batch_size=batch_size)
        self._by_name: dict[str, Tensor] = {}

    @exact_inference()
    def _detect(
        self, images: Sequence[np.ndarray], names: Sequence[list[str]], min_score: float
    ) -> list[list[Detection]]:
        found = []
        for start in range(0, len(images), self.batch_size):
            shown = images[start : start + self.batch_size]
            features_BPD, boxes_BP4 = self._patches(shown)
            rows = zip(shown, names[start : start + self.batch_size], features_BPD, boxes_BP4, strict=False)
            for image, some, features_PD, boxes_P4 in rows:
                output = Owlv2ObjectDetectionOutput(
                    logits=self._logits(features_PD, some)[None], pred_boxes=boxes_P4[None]
                )
                [result] = self.processor.post_process_grounded_object_detection(
                    output, threshold=min_score, target_sizes=[image.shape[:2]], text_labels=[some]
                )
                found.append(self._detections(result, result["text_labels"], image, min_score))
        return found

    def _patches(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features [batch_size, P, D] and boxes [batch_size, P, 4] of the patches; what is over belongs to no image."""
        # The processor computes in float32 throughout, so on a GPU it gives the same pixels to the last bits.
        inputs = self.processor.image_processor(
            [Image.fromarray(image) for image in images], return_tensors="pt", device=self.device
        )
        pixels_BCHW = pad_batch(inputs["pixel_values"].to(self.device), self.batch_size)
        features_BhwD, _ = self.model.image_embedder(pixel_values=pixels_BCHW)
        features_BPD = features_BhwD.flatten(1, 2)
        return features_BPD, self.model.box_predictor(features_BPD, features_BhwD)

    def _logits(self, features_PD: Tensor, names: Sequence[str]) -> Tensor:
        """How well each name fits each patch of an image, [P, N]."""
        queries_ND = torch.stack([self._embedding(name) for name in names])
        return self.model.class_predictor(features_PD[None], queries_ND[None])[0][0]

    def _embedding(self, name: str) -> Tensor:
        """Unit embedding of a name, float32 [D]; made once."""
        if name not in self._by_name:
            # A rare word can have more tokens than the model takes: it is asked for by those that fit.
            tokens = self.processor(text=[[OWL_PROMPT.format(name=name)]], truncation=True, return_tensors="pt")
            pooled_1D = self.model.owlv2.text_model(**tokens.to(self.device)).pooler_output
            self._by_name[name] = F.normalize(self.model.owlv2.text_projection(pooled_1D)[0], dim=0)
        return self._by_name[name]


class GroundingDetector(_ZeroShotDetector):
    """Grounding DINO (Liu et al. 2023), asked for one name at a time: the phrases of a longer text run together."""

    @exact_inference()
    def _detect(
        self, images: Sequence[np.ndarray], names: Sequence[list[str]], min_score: float
    ) -> list[list[Detection]]:
        by_shape: dict[tuple[int, ...], list[tuple[int, str]]] = defaultdict(list)
        for index, (image, some) in enumerate(zip(images, names, strict=True)):
            by_shape[image.shape] += [(index, name) for name in some]  # of one size: none is padded to another's
        found: list[list[Detection]] = [[] for _ in images]
        for pairs in by_shape.values():
            for start in range(0, len(pairs), self.batch_size):
                asked = pairs[start : start + self.batch_size]
                results = self._ask([images[index] for index, _ in asked], [name for _, name in asked], min_score)
                for (index, name), result in zip(asked, results, strict=True):
                    labels = [name] * len(result["scores"])
                    found[index] += self._detections(result, labels, images[index], min_score)
        return found

    def _ask(self, images: Sequence[np.ndarray], names: Sequence[str], min_score: float) -> list[dict[str, Any]]:
        """What the processor makes of images of one size, each asked for one name. Shorter texts are padded, and
        masked."""
        inputs = self.processor(
            images=[Image.fromarray(image) for image in images],
            text=[f"{name.lower()}." for name in names],
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        return self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=min_score,
            text_threshold=min_score,
            target_sizes=[image.shape[:2] for image in images],
        )


class NamedClasses:
    """A detector of fixed classes, asked by name: a class of that very name, else one whose label holds the name."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.fingerprint = fingerprint("named classes", detector.fingerprint)

    def detect_named(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's detections of the classes that its `names` mean, labelled as asked, best first."""
        return [
            [
                Detection(name, one.score, one.box, one.mask)
                for one in detections
                for name in dict.fromkeys(some)
                if one.label in self._classes(name)
            ]
            for detections, some in zip(self.detector.detect(images), names, strict=True)
        ]

    def detect_faint(self, image: np.ndarray, names: Sequence[str]) -> list[Detection]:
        """One image's candidates of all classes, whatever the names: what is asked changes nothing in what is seen."""
        return self.detector.detect_faint(image)

    def _classes(self, name: str) -> tuple[str, ...]:
        if name in self.detector.labels:
            return (name,)
        return tuple(label for label in self.detector.labels if name in label.split(", "))
