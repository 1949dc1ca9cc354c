"""GenEval's own detector: mmdet's Mask2Former Swin-S, through the optional extra `mmdet`.

mmdet gives the network; what comes before and after it is the protocol's (mask2former.py). Nothing of the extra is
imported before a detector is made.
"""

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitflux_core.errors import UserError
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.inference import fingerprint, model_folder, unloadable
from evaluators.mask2former import Mask2Former, Preprocessing, check_classes

CONFIG = "mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"  # in mmdet's wheel
CHECKPOINT = "*.pth"
INSTALL = "uv sync --extra mmdet"


class MmdetDetector(Mask2Former):
    """mmdet's Mask2Former from a folder: one .pth checkpoint of mmdet 3, and its configuration where it is another.

    Without a configuration (one .py file) in the folder it is the official Swin-S, from mmdet's wheel.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str | torch.device = "cpu",
        *,
        batch_size: int = 8,
        labels: Sequence[str] | None = None,
        min_score: float = 0.0,
    ) -> None:
        """`labels` names the classes in order, by default GenEval's 80; detections that score `min_score` or less are
        left out.

        Raises UserError where the extra is not installed, and where the folder is missing, incomplete, damaged, or has
        another number of classes.
        """
        folder = model_folder(model_dir, "detector", ())
        checkpoint = _only(folder, CHECKPOINT)
        if checkpoint is None:
            raise UserError(f"detector folder {folder} has no {CHECKPOINT}: copy mmdet's checkpoint of {CONFIG} there")
        labels = tuple(labels or GENEVAL_CLASSES)
        config = _configuration(folder)
        head, normalisation = config.model.panoptic_head, config.model.data_preprocessor
        check_classes(folder, head.num_things_classes + head.num_stuff_classes, labels)
        self.model = _build(config)
        _load_weights(self.model, checkpoint)
        self.model.to(device).eval()
        preprocessing = Preprocessing(
            resize=True,
            mean=tuple(mean / 255 for mean in normalisation.mean),
            std=tuple(std / 255 for std in normalisation.std),
            divisor=normalisation.pad_size_divisor,
        )
        identity = fingerprint(folder, config.pretty_text, labels, min_score, batch_size)
        super().__init__(device, preprocessing, labels, batch_size, min_score, identity)

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """Resized on 8 bits by OpenCV, as GenEval does; normalised and padded as every Mask2Former's."""
        import mmcv

        height, width = self.preprocessing.network_size(*images[0].shape[:2])
        return super()._pixels([mmcv.imresize(image, (width, height)) for image in images])

    def _logits(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        # One result a decoder layer, the last one counts. The second argument is for training.
        classes, masks = self.model.panoptic_head(self.model.extract_feat(pixels_BCHW), [])
        return classes[-1], masks[-1]


def _configuration(folder: Path) -> Any:
    """mmengine's Config of the model. UserError where the extra is missing or the file is no Mask2Former's."""
    try:
        import mmcv.ops.multi_scale_deform_attn
        import mmdet
        from mmengine.config import Config
    except ImportError as fault:
        raise UserError(
            f"detector folder {folder} is mmdet's, which is not installed ({fault}): run `{INSTALL}`"
        ) from fault
    # mmcv's own kernel exists only for the GPU that it was compiled for; PyTorch's operations run on every device.
    mmcv.ops.multi_scale_deform_attn.IS_CUDA_AVAILABLE = False
    path = _only(folder, "*.py") or Path(mmdet.__file__).parent / ".mim" / "configs" / CONFIG
    try:
        config = Config.fromfile(path)
        kind = config.model.type
    except Exception as fault:  # a configuration is a program
        raise unloadable(folder, "detector", f"{path.name}: {fault}") from fault
    if kind != "Mask2Former":
        raise UserError(f"detector folder {folder}: {path.name} describes a {kind}; GenEval's detector is Mask2Former")
    return config


def _build(config: Any) -> Any:
    """The network with random weights; the configuration's own address of a backbone's is not asked."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch functions that mmdet calls by their old names
        return MODELS.build(config.model)


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads all tensors of a checkpoint, without running what a pickle may hold. UserError where that fails."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        detail = f"{path.name} is damaged, or holds objects besides weights: save its state_dict alone"
        raise unloadable(path.parent, "detector", detail) from fault
    except (OSError, RuntimeError, EOFError, ValueError) as fault:
        raise unloadable(path.parent, "detector", f"{path.name}: {fault}") from fault
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        model.load_state_dict(weights)
    except RuntimeError as fault:
        raise unloadable(path.parent, "detector", f"{path.name} is not of this model: {_first_fault(fault)}") from fault


def _first_fault(fault: RuntimeError) -> str:
    """The first of torch's complaints about a state dict, which stands on its second line."""
    lines = [line.strip() for line in str(fault).splitlines()]
    return lines[min(1, len(lines) - 1)][:200]


def _only(folder: Path, pattern: str) -> Path | None:
    """The file of `folder` that matches; None without one, UserError with several."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"detector folder {folder} holds {len(found)} files {pattern} ({names}): leave one of them")
    return found[0] if found else None
