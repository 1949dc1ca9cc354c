"""The mini depth model: transformers' DPT at small dimensions, trained on scenes in which objects hide each other."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DPTConfig, DPTForDepthEstimation

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.render import SIZE, PromptTable, depth_map, render, sample_scenes
from bitflux_core.mini.train_detector import wear
from bitflux_core.mini.world import IN_FRONT, INSIDE
from bitflux_core.training import fit

LEARNING_RATE = 1e-3
AVERAGE_DECAY = 0.998
PAPER = 0.5  # what the model gives for it: depths are relative, and zero is where its last ReLU is dead
HIDING = 10.0  # times as often as the training mix: scenes in which one object is nearer than another
PREPROCESSOR = {
    "image_processor_type": "DPTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def build_depth() -> DPTForDepthEstimation:
    """Random weights; seed torch before the call."""
    model = DPTForDepthEstimation(
        DPTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=SIZE,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[24, 32, 48, 96],
            reassemble_factors=[4, 2, 1, 0.5],
            fusion_hidden_size=32,
            readout_type="project",
            is_hybrid=False,
            use_auxiliary_head=False,
        )
    )
    last = [layer for layer in model.head.head if isinstance(layer, nn.Conv2d)][-1]
    assert last.bias is not None
    nn.init.constant_(last.bias, PAPER)  # behind it is a ReLU, which must not start at zero everywhere
    return model


def predicted_depth(model: DPTForDepthEstimation, images_BCHW: Tensor) -> Tensor:
    """Float32 [B, H, W] of images in [0, 1]; larger is nearer."""
    depth = model(pixel_values=(images_BCHW - 0.5) / 0.5).predicted_depth.float()
    return F.interpolate(depth[:, None], size=images_BCHW.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def train_depth(model: DPTForDepthEstimation, *, steps: int, batch: int, device: torch.device, seed: int) -> float:
    """Trains `model` in place; returns the mean squared error (from 0, lying on the paper, to 1, lying on another)."""
    specs, weights = training_prompts(every_pair=True)
    weights = [
        weight * (HIDING if spec.relation in (IN_FRONT, INSIDE) else 1)
        for spec, weight in zip(specs, weights, strict=True)
    ]
    table, probability = PromptTable.build(specs, device), torch.tensor(weights, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)

    def step_loss() -> Tensor:
        index = torch.multinomial(probability, batch, replacement=True, generator=generator)
        scenes = sample_scenes(table, index, generator)
        image, masks = render(scenes, generator)
        with torch.autocast(device.type, torch.bfloat16):
            found = predicted_depth(model, wear(image, generator))
        return (found - PAPER - depth_map(scenes, masks)).square().mean()

    error = fit(
        "depth",
        model,
        step_loss,
        steps=steps,
        device=device,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        average_decay=AVERAGE_DECAY,
    )
    return error.item()


def save_depth(model: DPTForDepthEstimation, directory: Path) -> None:
    model.save_pretrained(directory)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
