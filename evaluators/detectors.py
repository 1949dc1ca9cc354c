"""Which detector a folder holds."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bitflux_core.errors import UserError
from evaluators.base import Detector
from evaluators.mask2former import Mask2FormerDetector
from evaluators.mmdet_detector import CHECKPOINT, MmdetDetector


def load_detector(
    folder: str | Path,
    device: str | torch.device = "cpu",
    *,
    batch_size: int,
    labels: Sequence[str] | None,
    min_score: float,
) -> Detector:
    """transformers' Mask2Former where `folder` has a config.json, mmdet's where it has a .pth checkpoint instead.

    `labels` renames the classes in order; detections that score `min_score` or less are left out. Raises UserError for
    a folder that is neither, and what the detectors raise.
    """
    kind: type[Mask2FormerDetector] | type[MmdetDetector]
    if (Path(folder) / "config.json").is_file():
        kind = Mask2FormerDetector
    elif any(Path(folder).glob(CHECKPOINT)):
        kind = MmdetDetector
    else:
        raise UserError(
            f"detector folder {folder} has neither a config.json (transformers) nor a .pth checkpoint (mmdet): "
            "name a folder that holds a complete detector"
        )
    return kind(folder, device, batch_size=batch_size, labels=labels, min_score=min_score)
