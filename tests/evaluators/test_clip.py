"""CLIP features and the colour classifier: the protocol's wording, mask, crop and nearest embedding."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bitflux_core.errors import UserError
from evaluators.clip import ClipColorClassifier, ClipModel, object_crop
from evaluators.geneval import COLORS

RNG = np.random.default_rng(0)


def image(height: int = 48, width: int = 40) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- the model -------------------------------------------------------------------------------------------------------


def test_features_are_open_clips_own_at_unit_length(clip_dir):
    clip = ClipModel(clip_dir, batch_size=2)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_dir}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_dir}")(["a photo of a red star"])
    one = image()
    with torch.no_grad():
        pixels = transform(Image.fromarray(one))[None]
        expected_image = model.eval().encode_image(pixels, normalize=True)
        expected_text = model.encode_text(tokens, normalize=True)
    assert torch.allclose(clip.image_features([one]), expected_image, atol=1e-5)
    assert torch.allclose(clip.text_features(["a photo of a red star"]), expected_text, atol=1e-5)


def test_features_do_not_depend_on_neighbours(clip_dir):
    clip = ClipModel(clip_dir, batch_size=3)
    images = [image(), image(20, 60), image(64, 64), image()]
    texts = [f"a photo of a {color} star" for color in COLORS[:4]]
    for index in range(4):
        assert torch.equal(clip.image_features(images)[index], clip.image_features([images[index]])[0])
        assert torch.equal(clip.text_features(texts)[index], clip.text_features([texts[index]])[0])


def test_fingerprint_follows_the_folder(clip_dir, tmp_path):
    copy = Path(shutil.copytree(clip_dir, tmp_path / "copy"))
    (copy / "README.md").write_text("not part of the model")
    assert ClipModel(copy).fingerprint == ClipModel(clip_dir).fingerprint
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.0, 0.0, 0.0]}
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    assert ClipModel(copy).fingerprint != ClipModel(clip_dir).fingerprint


def _without_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _other_width(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 24
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def _unreadable_config(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, _without_weights, _truncated, _without_tokenizer, _other_width, _unreadable_config]
)
def test_an_unusable_folder_is_one_line_that_names_it(clip_dir, tmp_path, damage):
    folder = Path(shutil.copytree(clip_dir, tmp_path / "clip"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        ClipModel(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message


# --- the colour classifier -------------------------------------------------------------------------------------------


class RgbClip:
    """A stand-in for CLIP: an image's feature is its mean colour away from grey, a text's the colour that it names."""

    fingerprint = "rgb"
    directions: ClassVar = dict(
        zip(COLORS, F.normalize(torch.randn(10, 3, generator=torch.Generator().manual_seed(0))), strict=True)
    )

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.crops: list[np.ndarray] = []

    def image_features(self, images):
        self.crops += images
        means = [torch.tensor(crop.reshape(-1, 3).mean(0) / 255 - 0.5) for crop in images]
        return F.normalize(torch.stack(means).float(), dim=-1)

    def text_features(self, texts):
        self.texts += texts
        named = [next(color for color in COLORS if color in text.replace("-", " ").split()) for text in texts]
        return torch.stack([self.directions[name] for name in named])


def painted(color: str) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in (RgbClip.directions[color] * 120 + 127.5).round())
    return red, green, blue


def test_wordings_are_the_protocols_three(make_detection):
    clip = RgbClip()
    ClipColorClassifier(clip).classify(np.zeros((100, 100, 3), np.uint8), [make_detection("wine glass")])
    assert clip.texts[:6] == [
        "a photo of a red wine glass",
        "a photo of a red-colored wine glass",
        "a photo of a red object",
        "a photo of a orange wine glass",
        "a photo of a orange-colored wine glass",
        "a photo of a orange object",
    ]
    assert len(clip.texts) == 30


def test_each_object_gets_the_color_inside_its_mask(make_detection):
    scene = image(100, 100)
    objects = [
        make_detection("star", box=(0.0, 0.0, 20.0, 20.0)),
        make_detection("circle", box=(40.0, 60.0, 55.0, 90.0)),
        make_detection("star", box=(70.0, 0.0, 99.0, 12.0)),
    ]
    for one, color in zip(objects, ("purple", "white", "green"), strict=True):
        scene[one.mask] = painted(color)
    clip = RgbClip()
    classifier = ClipColorClassifier(clip)
    assert classifier.classify(scene, objects) == ["purple", "white", "green"]
    assert [crop.shape for crop in clip.crops] == [(20, 20, 3), (30, 15, 3), (12, 29, 3)]
    assert len(clip.texts) == 60, "two classes, each embedded once"
    assert classifier.classify(scene, []) == []


def test_color_embeddings_are_normalised_averaged_and_normalised_again(clip_dir):
    clip = ClipModel(clip_dir)
    embeddings = ClipColorClassifier(clip)._color_features("star")
    wordings = ["a photo of a blue star", "a photo of a blue-colored star", "a photo of a blue object"]
    blue = F.normalize(clip.text_features(wordings).mean(0), dim=0)
    assert embeddings.shape == (10, 16)
    assert torch.allclose(embeddings[COLORS.index("blue")], blue, atol=1e-6)


def test_outside_the_mask_is_999_and_the_crop_is_the_box(make_detection):
    scene = np.full((100, 100, 3), 7, dtype=np.uint8)
    detection = make_detection("star", box=(10.0, 20.0, 14.0, 23.0))
    detection.mask[20, 10] = False
    crop = object_crop(scene, detection)
    assert crop.shape == (3, 4, 3)
    assert crop[0, 0].tolist() == [153, 153, 153]
    assert (crop.reshape(-1, 3)[1:] == 7).all()
