"""Relative depth by transformers' DPT, as T2I-CompBench uses it: DPT-hybrid of MiDaS (Ranftl et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import DPTForDepthEstimation

from evaluators.base import image_fault
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, pad_batch

ROLE = "depth model"
PROTOCOL_SIDE = 480  # pixels: the protocol's frame for the hybrid model


class DptDepthEstimator:
    """A DPT model in transformers' folder format. Images are squeezed into a square, as the protocol does.

    The square's side is the protocol's 480 for a hybrid model, and a plain one's own otherwise. transformers resizes
    the hybrid's position embeddings to any size, as MiDaS does, but refuses the sizes that need it.
    """

    def __init__(self, model_dir: str | Path, device: str | torch.device = "cpu", *, batch_size: int = 4) -> None:
        """Raises UserError where the folder is missing, incomplete or damaged."""
        folder = model_folder(model_dir, ROLE, ("config.json",))
        self.model = load_pretrained(DPTForDepthEstimation, folder, ROLE, device)
        self.side = int(self.model.config.image_size)
        if self.model.config.is_hybrid:
            self.side = PROTOCOL_SIDE
            self.model.dpt.embeddings.image_size = (self.side, self.side)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.fingerprint = fingerprint(folder, self.side, batch_size)

    def depth(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [side, side] of each image, larger = nearer, stretched to 0 to 255; zeros where all is equally near.

        Raises ValueError for what is not an image.
        """
        for index, image in enumerate(images):
            if fault := image_fault(image):
                raise ValueError(f"image {index}: {fault}")
        if not images:
            return []
        pixels_BCHW = torch.stack([self._pixels(image) for image in images])
        parts = [self._predict(part) for part in pixels_BCHW.split(self.batch_size)]
        return [to_bytes(depth_HW) for depth_HW in torch.cat(parts)]

    def _pixels(self, image: np.ndarray) -> Tensor:
        """Bicubic, then mean and standard deviation 0.5: float32 [3, side, side] in [-1, 1]."""
        small = Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1

    @exact_inference()
    def _predict(self, part_BCHW: Tensor) -> Tensor:
        padded_BCHW = pad_batch(part_BCHW, self.batch_size).to(self.device)
        depth_BHW = self.model(pixel_values=padded_BCHW).predicted_depth[: len(part_BCHW)].float()
        size = (self.side, self.side)
        return F.interpolate(depth_BHW[:, None], size=size, mode="bicubic", align_corners=False)[:, 0].cpu()


def to_bytes(depth_HW: Tensor) -> np.ndarray:
    """A depth map stretched to 0 to 255, uint8; zeros where it is flat."""
    low, high = depth_HW.min(), depth_HW.max()
    if high <= low:
        return np.zeros(depth_HW.shape, np.uint8)
    return ((depth_HW - low) / (high - low) * 255).to(torch.uint8).numpy()
