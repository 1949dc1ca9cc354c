"""Trains the mini detector on rendered scenes, worn as generated images are: blurred, noisy, shifted in colour."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.detector import batched_loss, normalise
from bitflux_core.mini.render import NO_SHAPE, PromptTable, render, sample_scenes
from bitflux_core.training import fit

LEARNING_RATE = 1e-3
AVERAGE_DECAY = 0.998


def wear(image_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur (half of the images), noise and colour shift; float32 [B, 3, H, W] in [0, 1]."""
    batch, device = image_BCHW.shape[0], image_BCHW.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    small = F.interpolate(image_BCHW, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False)
    image = torch.lerp(image_BCHW, blurred, (2 * uniform(batch, 1, 1, 1) - 1).clamp(min=0))
    shift = 0.08 * (uniform(batch, 3, 1, 1) - 0.5)
    noise = 0.05 * uniform(batch, 1, 1, 1) * torch.randn(image.shape, device=device, generator=generator)
    return (image + shift + noise).clamp(0, 1)


def train_detector(
    model: Mask2FormerForUniversalSegmentation, *, steps: int, batch: int, device: torch.device, seed: int
) -> None:
    """Trains `model` in place on the training prompts' scenes."""
    specs, weights = training_prompts()
    weights = [weight * len(spec.shapes) for spec, weight in zip(specs, weights, strict=True)]  # crowds are hardest
    table, probability = PromptTable.build(specs, device), torch.tensor(weights, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)

    def step_loss() -> Tensor:
        index = torch.multinomial(probability, batch, replacement=True, generator=generator)
        scenes = sample_scenes(table, index, generator)
        image, masks = render(scenes, generator)
        labels = torch.where(scenes.shapes_BO == NO_SHAPE, model.config.num_labels, scenes.shapes_BO)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return batched_loss(model, normalise(wear(image, generator)), masks, labels)

    fit(
        "detector",
        model,
        step_loss,
        steps=steps,
        device=device,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        average_decay=AVERAGE_DECAY,
    )
