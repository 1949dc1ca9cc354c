"""The detector: preprocessing and post-processing against numbers worked out by hand, and what a bad folder says."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from bitflux_core.errors import UserError
from evaluators.inference import exact_inference, pad_batch
from evaluators.mask2former import (
    TOP_CANDIDATES,
    Mask2FormerDetector,
    Preprocessing,
    candidates,
    full_size_masks,
    mask_confidence,
    mask_extent,
)

RNG = np.random.default_rng(0)


def image(height: int = 64, width: int = 64) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def answer_with(detector: Mask2FormerDetector, logits_QC: list, masks_Qhw: torch.Tensor) -> None:
    """Puts fixed logits in place of the network, for every image of the batch."""

    def model(pixel_values: torch.Tensor) -> SimpleNamespace:
        batch = len(pixel_values)
        return SimpleNamespace(
            class_queries_logits=torch.tensor([logits_QC] * batch),
            masks_queries_logits=masks_Qhw.expand(batch, -1, -1, -1),
        )

    detector.model = model


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- post-processing -------------------------------------------------------------------------------------------------


def test_scores_boxes_and_masks_by_hand(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=2)
    masks = torch.full((2, 64, 64), -3.0)
    masks[0, 10:20, 5:25] = 2.0
    masks[0, 10:15, 5:25] = 1.0  # half of the mask at logit 1, half at 2
    masks[1, 40:, 50:] = 4.0
    # softmax over three classes and "no object"
    answer_with(detector, [[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]], masks)
    (found,) = detector.detect([image()])
    first, second = math.exp(3) + math.e + 2, 2 + math.exp(2) + math.e
    inside = [(sigmoid(1.0) + sigmoid(2.0)) / 2, sigmoid(4.0)]
    expected = sorted(
        [
            ("circle", math.exp(3) / first * inside[0]),
            ("square", math.e / first * inside[0]),
            ("star", 1 / first * inside[0]),
            ("circle", 1 / second * inside[1]),
            ("square", 1 / second * inside[1]),
            ("star", math.exp(2) / second * inside[1]),
        ],
        key=lambda row: -row[1],
    )
    assert [detection.score for detection in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert [detection.label for detection in found[:2]] == ["circle", "star"]
    best, runner_up = found[0], found[1]
    assert best.box == (5.0, 10.0, 25.0, 20.0)
    assert runner_up.box == (50.0, 40.0, 64.0, 64.0)
    assert best.mask.dtype == bool
    assert np.array_equal(best.mask, masks[0].numpy() > 0)


def test_min_score_is_exclusive_and_an_empty_mask_is_no_detection(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=1, min_score=0.3)
    masks = torch.full((2, 64, 64), -1.0)
    masks[0, :8, :8] = 20.0
    answer_with(detector, [[math.log(3), math.log(2), 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]], masks)
    (found,) = detector.detect([image()])
    # 3/7 is kept, 2/7 is not; the second query is sure of a class but has no mask.
    assert [(detection.label, round(detection.score, 3)) for detection in found] == [("circle", 0.429)]


def test_an_image_may_hold_nothing(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=2, min_score=0.3)
    answer_with(detector, [[0.0, 0.0, 0.0, 9.0]], torch.full((1, 64, 64), 20.0))
    assert detector.detect([image(), image()]) == [[], []]


def test_one_query_can_be_two_detections_without_nms(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=1, min_score=0.3)
    masks = torch.full((1, 64, 64), 20.0)
    answer_with(detector, [[5.0, 5.0, 0.0, 0.0]], masks)
    (found,) = detector.detect([image()])
    assert {detection.label for detection in found} == {"circle", "square"}
    assert {detection.box for detection in found} == {(0.0, 0.0, 64.0, 64.0)}


def test_candidates_are_the_top_hundred_over_queries_and_classes():
    torch.manual_seed(0)
    logits_QC = torch.randn(60, 6)
    label_K, score_K, query_K = candidates(logits_QC, 0.0)
    probability = logits_QC.softmax(-1)[:, :-1]
    assert len(score_K) == TOP_CANDIDATES == 100
    assert torch.equal(score_K, probability.flatten().sort(descending=True).values[:100])
    assert torch.equal(probability[query_K, label_K], score_K)


def test_masks_are_enlarged_then_cut_then_fitted_to_the_image():
    masks = torch.zeros(1, 8, 8)
    masks[:, :, :6] = 1.0
    masks[:, :, 6:] = -9.0  # in the padding: cut off before the second resize can mix it in
    full = full_size_masks(masks, (32, 32), (32, 22), (64, 44))
    assert full.shape == (1, 64, 44)
    assert torch.allclose(full, torch.ones(()), atol=1e-6)
    assert torch.equal(full_size_masks(masks, (8, 8), (8, 8), (8, 8)), masks)


def test_confidence_is_the_mean_sigmoid_inside_the_mask():
    masks = torch.tensor([[[2.0, -5.0], [-1.0, 0.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    assert mask_confidence(masks).tolist() == pytest.approx([sigmoid(2.0), 0.0], abs=1e-5)


def test_extent_ends_just_past_the_last_pixel():
    mask = np.zeros((9, 9), dtype=bool)
    mask[3, 2] = mask[5, 7] = True
    assert mask_extent(mask) == (2.0, 3.0, 8.0, 6.0)


# --- preprocessing ---------------------------------------------------------------------------------------------------

COCO = Preprocessing(resize=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), divisor=32)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),
        ((500, 2000), (333, 1333)),
        ((256, 256), (800, 800)),
        ((1, 3000), (1, 1333)),
        ((6000, 2), (1333, 1)),
    ],
)
def test_coco_models_see_a_keep_ratio_resize_to_1333_by_800(size, expected):
    assert COCO.network_size(*size) == expected
    assert Preprocessing(False, COCO.mean, COCO.std, 32).network_size(*size) == size


@pytest.mark.parametrize("size", [(1, 3000), (6000, 2)])
def test_a_strip_of_an_image_is_searched_like_any_other(detector_dir, tmp_path, size):
    folder = Path(shutil.copytree(detector_dir, tmp_path / "resizing"))
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessing, "do_resize": True}))
    [found] = Mask2FormerDetector(folder, batch_size=1).detect([np.zeros((*size, 3), np.uint8)])
    assert all(one.mask.shape == size for one in found)


def test_coco_normalisation_is_the_protocols():
    assert [round(255 * mean, 3) for mean in COCO.mean] == [123.675, 116.28, 103.53]
    assert [round(255 * std, 3) for std in COCO.std] == [58.395, 57.12, 57.375]


def test_pixels_are_normalised_then_zero_padded():
    preprocessing = Preprocessing(False, (0.5, 0.25, 0.0), (0.25, 0.5, 1.0), 32)
    pixels = preprocessing.pixels([np.full((40, 33, 3), 255, dtype=np.uint8)], torch.device("cpu"))
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, 39, 32].tolist() == [2.0, 1.5, 1.0]
    assert not pixels[0, :, 40:].any()
    assert not pixels[0, :, :, 33:].any()


def test_resized_pixels_are_whole_again():
    pixels = Preprocessing(True, (0.0,) * 3, (1 / 255,) * 3, 32).pixels([image(100, 100)], torch.device("cpu"))
    assert pixels.shape == (1, 3, 800, 800)
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)


# --- batches ---------------------------------------------------------------------------------------------------------


def same(one, other) -> bool:
    return [(d.label, d.score, d.box) for d in one] == [(d.label, d.score, d.box) for d in other]


def test_a_result_does_not_depend_on_its_neighbours(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=3)
    images = [image() for _ in range(5)]
    together = detector.detect(images)
    assert all(together)
    for index, one in enumerate(images):
        assert same(detector.detect([one])[0], together[index])
        assert same(detector.detect([images[0], one])[1], together[index])


def test_images_of_several_sizes_keep_their_order(detector_dir):
    detector = Mask2FormerDetector(detector_dir, batch_size=2)
    images = [image(64, 64), image(64, 96), image(64, 64), image(40, 70)]
    found = detector.detect(images)
    for one, detections in zip(images, found, strict=True):
        assert all(detection.mask.shape == one.shape[:2] for detection in detections)
        assert same(detector.detect([one])[0], detections)
    assert detector.detect([]) == []


def test_bad_image_is_named(detector_dir):
    with pytest.raises(ValueError, match=r"image 1: .*uint8"):
        Mask2FormerDetector(detector_dir).detect([image(), image().astype(float)])


def test_padding_fills_with_zeros():
    assert pad_batch(torch.ones(2, 3), 4).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


def test_exact_inference_turns_tf32_off_and_restores_it():
    before = torch.backends.cudnn.allow_tf32
    with exact_inference():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.is_inference_mode_enabled()
    assert torch.backends.cudnn.allow_tf32 == before


# --- the folder ------------------------------------------------------------------------------------------------------


def test_labels_come_from_the_folder_or_the_caller(detector_dir):
    assert Mask2FormerDetector(detector_dir).labels == ("circle", "square", "star")
    assert Mask2FormerDetector(detector_dir, labels=["a", "b", "c"]).labels == ("a", "b", "c")
    with pytest.raises(UserError, match=rf"{detector_dir} knows 3 classes, not 2"):
        Mask2FormerDetector(detector_dir, labels=["a", "b"])


def test_fingerprint_follows_weights_and_settings(detector_dir, tmp_path):
    copy = Path(shutil.copytree(detector_dir, tmp_path / "copy"))
    original = Mask2FormerDetector(detector_dir).fingerprint
    assert Mask2FormerDetector(copy).fingerprint == original
    assert Mask2FormerDetector(copy, min_score=0.5).fingerprint != original
    tensors = load_file(copy / "model.safetensors")
    tensors["class_predictor.bias"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert Mask2FormerDetector(copy).fingerprint != original


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _misshapen(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["class_predictor.bias"] = torch.zeros(9)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _unreadable_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def _without_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _preprocessor_without_mean(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        _without_weights,
        _truncated,
        _without_a_tensor,
        _misshapen,
        _unreadable_config,
        _another_model,
        _without_preprocessor,
        _preprocessor_without_mean,
    ],
)
def test_an_unusable_folder_is_one_line_that_names_it(detector_dir, tmp_path, damage):
    folder = Path(shutil.copytree(detector_dir, tmp_path / "detector"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        Mask2FormerDetector(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message


def test_a_swin_checkpoint_as_published_loads(tmp_path, detector_dir):
    """Without the backbone's last normalisation, which transformers has come to build and whose output nothing reads,
    and under the names that tensors had before."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=8, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, decoder_layers=2, dim_feedforward=16, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    shutil.copy(detector_dir / "preprocessor_config.json", tmp_path)
    picture = image()
    whole = Mask2FormerDetector(tmp_path).detect([picture])[0]
    tensors = load_file(tmp_path / "model.safetensors")
    published = {
        name.replace(".swin.", "."): tensor for name, tensor in tensors.items() if "swin.layernorm" not in name
    }
    assert len(published) < len(tensors)
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert whole
    assert same(Mask2FormerDetector(tmp_path).detect([picture])[0], whole)
