"""The mini detector: transformers' Mask2Former at small dimensions, and its training loss without loops over images.

Legend: B images, Q queries, L label slots (classes + 1 "no object"), O object slots, D prediction depths (initial and
each decoder layer), H = W = 128 pixels, h = w = 32 mask logits (stride 4), P = h * w.
"""

import json
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from bitflux_core.mini.world import SHAPES

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)
PREPROCESSOR = {
    "image_processor_type": "Mask2FormerImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "size_divisor": 32,
    "num_labels": len(SHAPES),
}


def build_detector() -> Mask2FormerForUniversalSegmentation:
    """Random weights; seed torch before the call. GroupNorm(32, .) inside forces feature_size to a multiple of 32."""
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 48, 96, 128],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        encoder_feedforward_dim=128,
        decoder_layers=4,  # transformers builds one fewer: 3 layers, one per feature level
        dim_feedforward=256,
        num_attention_heads=4,
        num_queries=12,
        no_object_weight=0.5,  # the usual 0.1 leaves twins of an object standing, and counting fails on them
        train_num_points=1024,
        dropout=0.0,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: index for index, name in enumerate(SHAPES)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def normalise(images_BCHW: Tensor) -> Tensor:
    """[0, 1] RGB to the detector's input."""
    mean = images_BCHW.new_tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    std = images_BCHW.new_tensor(IMAGE_STD).view(1, 3, 1, 1)
    return (images_BCHW - mean) / std


def save_detector(model: Mask2FormerForUniversalSegmentation, directory: Path) -> None:
    model.save_pretrained(directory)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def batched_loss(model, images_BCHW: Tensor, masks_BOHW: Tensor, labels_BO: Tensor) -> Tensor:
    """Mask2Former's objective, batched: all depths and images at once, whole masks in place of random points.

    masks_BOHW: bool, an empty slot all False. labels_BO: int64, an empty slot >= number of classes (render.NO_SHAPE).
    Leaves out only the importance-sampled points of Mask2Former (section 3.3), needless on so small an image.
    """
    config = model.config
    logits_DBQL, masks_DBQP, size = _predict_all_depths(model, images_BCHW)
    classes = logits_DBQL.shape[-1] - 1
    target_BOP = F.interpolate(masks_BOHW.float(), size=size, mode="area").flatten(2)
    present_BO = labels_BO < classes
    source_DBO = _match(config, logits_DBQL, masks_DBQP, target_BOP, labels_BO.clamp(max=classes - 1), present_BO)

    depths, batch = logits_DBQL.shape[:2]
    depth_index = torch.arange(depths, device=labels_BO.device)[:, None, None]
    batch_index = torch.arange(batch, device=labels_BO.device)[None, :, None]
    # Empty slots write "no object" to a query of their own (see _match), so one scatter fills every target.
    wanted_DBQ = torch.full(logits_DBQL.shape[:3], classes, dtype=torch.int64, device=labels_BO.device)
    wanted_DBQ[depth_index, batch_index, source_DBO] = torch.where(present_BO, labels_BO, classes).expand(
        depths, -1, -1
    )
    weight_L = torch.ones(classes + 1, device=labels_BO.device)
    weight_L[-1] = config.no_object_weight
    class_loss = F.cross_entropy(logits_DBQL.flatten(0, 2), wanted_DBQ.flatten(), weight=weight_L)

    # At full size against hard masks: soft ones at stride 4 leave edges at half confidence, and a small object is all
    # edge, while GenEval's counting wants a mean confidence above 0.9.
    chosen_DBOhw = masks_DBQP[depth_index, batch_index, source_DBO].unflatten(-1, size)
    full = F.interpolate(
        chosen_DBOhw.flatten(0, 1), size=masks_BOHW.shape[-2:], mode="bilinear", align_corners=False
    ).flatten(2)
    hard = masks_BOHW.float().flatten(2).repeat(depths, 1, 1)
    bce = F.binary_cross_entropy_with_logits(full, hard, reduction="none").mean(-1)
    probability = full.sigmoid()
    dice = 1 - (2 * (probability * hard).sum(-1) + 1) / (probability.sum(-1) + hard.sum(-1) + 1)
    present = present_BO.repeat(depths, 1)
    objects = present_BO.sum().clamp(min=1)
    mask_loss = ((config.mask_weight * bce + config.dice_weight * dice) * present).sum() / objects
    return depths * config.class_weight * class_loss + mask_loss


def _predict_all_depths(model, images_BCHW: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Class logits [D, B, Q, L] and mask logits [D, B, Q, P] of the initial queries and of every decoder layer."""
    outputs = model.model(pixel_values=images_BCHW, output_hidden_states=True, return_dict=True)
    hidden_DBQC = torch.stack(outputs.transformer_decoder_intermediate_states).transpose(1, 2)
    masks_DBQhw = torch.stack(outputs.masks_queries_logits)
    height, width = masks_DBQhw.shape[-2:]
    return model.class_predictor(hidden_DBQC).float(), masks_DBQhw.flatten(3).float(), (height, width)


@torch.no_grad()
def _match(config, logits_DBQL, masks_DBQP, target_BOP, labels_BO, present_BO) -> Tensor:
    """The query of every object slot, int64 [D, B, O]; empty slots cost nothing anywhere, so they take what is left."""
    depths, _, queries, _ = logits_DBQL.shape
    class_DBQO = -logits_DBQL.softmax(-1).gather(-1, labels_BO[None, :, None, :].expand(depths, -1, queries, -1))
    points = target_BOP.shape[-1]
    target_BPO = target_BOP.transpose(1, 2)
    # BCE(x, t) = softplus(x) - x t, so the pairwise cost is one matrix product.
    bce_DBQO = (F.softplus(masks_DBQP).sum(-1, keepdim=True) - masks_DBQP @ target_BPO) / points
    prob_DBQP = masks_DBQP.sigmoid()
    total_DBQO = prob_DBQP.sum(-1, keepdim=True) + target_BOP.sum(-1)[None, :, None, :]
    dice_DBQO = 1 - (2 * prob_DBQP @ target_BPO + 1) / (total_DBQO + 1)
    cost_DBQO = config.class_weight * class_DBQO + config.mask_weight * bce_DBQO + config.dice_weight * dice_DBQO
    cost_DBQO = cost_DBQO * present_BO[None, :, None, :]
    cost_NOQ = cost_DBQO.transpose(2, 3).flatten(0, 1).cpu().numpy()  # the one device-to-host copy
    rows = [linear_sum_assignment(cost_OQ)[1] for cost_OQ in cost_NOQ]
    return torch.tensor(np.stack(rows), device=labels_BO.device).view(*cost_DBQO.shape[:2], -1)
