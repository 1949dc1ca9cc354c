"""How near a variant's image is to its full-precision twin, drawn from the same noise.

Pixels (PSNR; SSIM: Wang et al. 2004), content (cosine of CLIP image features), perception (LPIPS: Zhang et al. 2018,
where its weights are present), and the error by spatial frequency: "1.58-bit FLUX" says that fine detail at high
resolution is what ternary weights lose.

Legend: N pairs of images, F frequency bands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from evaluators.base import image_fault
from evaluators.clip import ClipModel
from evaluators.inference import exact_inference
from evaluators.regression import psnr_db

# Octaves in cycles a pixel; the highest one also takes the corners of the spectrum, beyond half a cycle.
BAND_EDGES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
BANDS = (*(f"1/{round(1 / high)}" for high in BAND_EDGES[1:-1]), "1/2")  # by their upper edge
SMALLEST_SIDE = 16  # pixels: SSIM's window is 11
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, in torch.hub's folder


@dataclass(frozen=True)
class Fidelity:
    """One image against its twin.

    `psnr_db` is `gates.IDENTICAL_DB` for identical images. `clip_similarity` and `lpips` are None without their models.
    `band_error` and `band_signal` [F]: mean square of the error's and of the twin's luminance in each octave of spatial
    frequency, in squared 8-bit levels; together the bands hold all but the mean.
    """

    psnr_db: float
    ssim: float
    clip_similarity: float | None
    lpips: float | None
    band_error: tuple[float, ...]
    band_signal: tuple[float, ...]


class FidelityMeter:
    """Measures pairs of images with whichever of the optional models it is given."""

    def __init__(
        self, clip: ClipModel | None, device: str | torch.device = "cpu", *, lpips: bool | None = None
    ) -> None:
        """`lpips` None measures it where its weights are present. Nothing is downloaded."""
        self.clip = clip
        self.device = torch.device(device)
        wanted = lpips_present() if lpips is None else lpips
        self.lpips = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device).net if wanted else None

    def measure(self, references: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> list[Fidelity | str]:
        """One result for each pair of uint8 RGB images [H, W, 3]; a pair that cannot be compared gets the reason."""
        faults = [_fault(*pair) for pair in zip(references, images, strict=True)]
        whole = [index for index, fault in enumerate(faults) if fault is None]
        similar: list[float] | list[None] = [None] * len(whole)
        if self.clip is not None and whole:
            first, second = (self.clip.image_features([some[i] for i in whole]) for some in (references, images))
            similar = (first * second).sum(-1).tolist()
        found: dict[int, Fidelity] = {}
        for index, similarity in zip(whole, similar, strict=True):
            found[index] = self._measure(references[index], images[index], similarity)
        return [found[index] if fault is None else fault for index, fault in enumerate(faults)]

    @exact_inference()
    def _measure(self, reference: np.ndarray, image: np.ndarray, similarity: float | None) -> Fidelity:
        reference_1CHW, image_1CHW = (
            torch.from_numpy(each).to(self.device).permute(2, 0, 1)[None].float() / 255 for each in (reference, image)
        )
        ssim = structural_similarity_index_measure(image_1CHW, reference_1CHW, data_range=1.0)
        lpips = None if self.lpips is None else float(self.lpips(image_1CHW, reference_1CHW, normalize=True).item())
        error_F, signal_F = band_power(image_1CHW - reference_1CHW), band_power(reference_1CHW)
        assert isinstance(ssim, Tensor)
        return Fidelity(
            psnr_db(reference, image), float(ssim), similarity, lpips, tuple(error_F.tolist()), tuple(signal_F.tolist())
        )


def lpips_present() -> bool:
    """Whether LPIPS' backbone lies in torch.hub's folder (TORCH_HOME), so that it loads without a download."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE).is_file()


def band_power(image_1CHW: Tensor) -> Tensor:
    """Mean square of the luminance (Rec. 601) in each octave of spatial frequency: float64 [F], squared 8-bit levels.

    By Parseval's theorem the bands sum to the variance of the luminance.
    """
    weights_C = image_1CHW.new_tensor([0.299, 0.587, 0.114])
    luminance_HW = 255 * torch.einsum("c,chw->hw", weights_C, image_1CHW[0]).double()
    height, width = luminance_HW.shape
    power_HW = torch.fft.fft2(luminance_HW, norm="forward").abs().square()
    vertical_H1 = torch.fft.fftfreq(height, device=power_HW.device)[:, None]
    frequency_HW = (vertical_H1.square() + torch.fft.fftfreq(width, device=power_HW.device).square()).sqrt()
    edges = torch.tensor(BAND_EDGES[1:-1], device=power_HW.device)
    band_HW = torch.bucketize(frequency_HW, edges)
    power_HW[0, 0] = 0.0  # the mean
    return power_HW.new_zeros(len(BANDS)).index_add_(0, band_HW.flatten(), power_HW.flatten()).cpu()


def band_signal_to_error_db(results: Sequence[Fidelity]) -> dict[str, float]:
    """Signal over error of all images together in each band, in dB: inf where nothing is lost, nan where nothing is."""
    signal_F = np.sum([result.band_signal for result in results] or [(0.0,) * len(BANDS)], axis=0)
    error_F = np.sum([result.band_error for result in results] or [(0.0,) * len(BANDS)], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return dict(zip(BANDS, (10 * np.log10(signal_F / error_F)).tolist(), strict=True))


def _fault(reference: object, image: object) -> str | None:
    for name, one in (("the twin", reference), ("the image", image)):
        if fault := image_fault(one):
            return f"{name}: {fault}"
    assert isinstance(reference, np.ndarray)
    assert isinstance(image, np.ndarray)
    if reference.shape != image.shape:
        return f"the image is {list(image.shape)}, its twin {list(reference.shape)}"
    if min(image.shape[:2]) < SMALLEST_SIDE:
        return f"images must be at least {SMALLEST_SIDE} pixels wide and high, got {list(image.shape)}"
    return None
