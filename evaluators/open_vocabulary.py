"""Detectors that find what they are asked for by name: transformers' OWLv2 and Grounding DINO, or a detector of fixed
classes whose labels mean the names."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from bitflux_core.errors import UserError
from evaluators.base import Detection, Detector, PromptedDetector, image_fault
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, unloadable
from evaluators.mask2former import Mask2FormerDetector

ROLE = "named detector"
OWL, GROUNDING_DINO, MASK2FORMER = "owlv2", "grounding-dino", "mask2former"
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
    """What transformers' zero-shot detectors share. One image at a time: no result depends on its neighbours."""

    def __init__(self, model_dir: str | Path, device: str | torch.device, min_score: float) -> None:
        folder = model_folder(model_dir, ROLE, ("config.json",))
        self.model = load_pretrained(AutoModelForZeroShotObjectDetection, folder, ROLE, device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise unloadable(folder, ROLE, fault) from fault
        self.device = torch.device(device)
        self.min_score = min_score
        self.fingerprint = fingerprint(type(self).__name__, folder, min_score)

    def detect_named(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's detections of its own `names`, best first. Raises ValueError for what is not an image."""
        for index, image in enumerate(images):
            if fault := image_fault(image):
                raise ValueError(f"image {index}: {fault}")
        found = []
        for image, some in zip(images, names, strict=True):
            # In a fixed order: how a prompt spells its objects must not change what is found.
            detections = self._detect(image, sorted(set(some))) if some else []
            found.append(sorted(detections, key=lambda one: -one.score))
        return found

    def _detect(self, image: np.ndarray, names: list[str]) -> list[Detection]:
        raise NotImplementedError

    def _detections(self, result: dict[str, Any], labels: Sequence[str], image: np.ndarray) -> list[Detection]:
        """What the processor found, with boxes cut at the image's edges; those with nothing left are left out."""
        height, width = image.shape[:2]
        edges = torch.tensor([width, height, width, height])
        boxes = result["boxes"].float().cpu().clamp(min=0).minimum(edges).tolist()
        rows = zip(labels, result["scores"].tolist(), boxes, strict=True)
        return [
            Detection(label, score, (x1, y1, x2, y2))
            for label, score, (x1, y1, x2, y2) in rows
            if score > self.min_score and x2 > x1 and y2 > y1
        ]


class OwlDetector(_ZeroShotDetector):
    """OWLv2 (Minderer et al. 2023): each box gets the name that fits it best."""

    @exact_inference()
    def _detect(self, image: np.ndarray, names: list[str]) -> list[Detection]:
        texts = [[OWL_PROMPT.format(name=name) for name in names]]
        # A rare word can have more tokens than the model takes: it is asked for by those that fit.
        inputs = self.processor(text=texts, images=Image.fromarray(image), truncation=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        output = self.model(**inputs)
        [result] = self.processor.post_process_grounded_object_detection(
            output, threshold=self.min_score, target_sizes=[image.shape[:2]], text_labels=[names]
        )
        return self._detections(result, result["text_labels"], image)


class GroundingDetector(_ZeroShotDetector):
    """Grounding DINO (Liu et al. 2023), asked for one name at a time: the phrases of a longer text run together."""

    @exact_inference()
    def _detect(self, image: np.ndarray, names: list[str]) -> list[Detection]:
        found: list[Detection] = []
        for name in names:
            inputs = self.processor(images=Image.fromarray(image), text=f"{name.lower()}.", return_tensors="pt")
            inputs = inputs.to(self.device)
            output = self.model(**inputs)
            [result] = self.processor.post_process_grounded_object_detection(
                output,
                inputs["input_ids"],
                threshold=self.min_score,
                text_threshold=self.min_score,
                target_sizes=[image.shape[:2]],
            )
            found += self._detections(result, [name] * len(result["scores"]), image)
        return found


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

    def _classes(self, name: str) -> tuple[str, ...]:
        if name in self.detector.labels:
            return (name,)
        return tuple(label for label in self.detector.labels if name in label.split(", "))
