"""mmdet's Mask2Former, where the extra `mmdet` is installed: the official Swin-S and a small one, of random weights."""

import copy
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from bitflux_core.errors import UserError
from evaluators.base import Detection
from evaluators.detector_check import DetectorRecord, differences, sanity_image
from evaluators.detectors import load_detector
from evaluators.geneval_classes import GENEVAL_CLASSES
from evaluators.mmdet_detector import CONFIG, MmdetDetector

pytestmark = [
    pytest.mark.mmdet,
    pytest.mark.timeout(1800),  # the official network takes half a minute an image on one core
    pytest.mark.skipif(find_spec("mmdet") is None, reason="needs the extra mmdet"),
]

SMALL = """
model = dict(
    backbone=dict(embed_dims=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], init_cfg=None),
    panoptic_head=dict(
        in_channels=[24, 48, 96, 192],
        num_queries=20,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=2),
    ),
)
"""


def official_config() -> Path:
    import mmdet

    return Path(mmdet.__file__).parent / ".mim" / "configs" / CONFIG


def save_random_weights(config: Path, path: Path) -> None:
    """A checkpoint in mmdet's form. Class logits are spread out, since those of random weights are nearly alike."""
    from mmdet.apis import init_detector

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = init_detector(str(config), device="cpu")
    with torch.no_grad():
        model.panoptic_head.cls_embed.weight.mul_(8)
    torch.save({"meta": {"dataset_meta": {"CLASSES": ("person",)}}, "state_dict": model.state_dict()}, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.py").write_text(f'_base_ = "{official_config()}"{SMALL}')
    save_random_weights(folder / "small.py", folder / "small.pth")
    return folder


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coloured blocks, so that there are edges to see."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)


def by_mmdet(config: Path, checkpoint: Path, pixels: np.ndarray) -> list[Detection]:
    """The detections of mmdet's own inference, best first; on 8-bit pixels, as GenEval's version of it resizes."""
    from mmcv.transforms import Compose
    from mmdet.apis import inference_detector, init_detector
    from mmdet.utils import get_test_pipeline_cfg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = init_detector(str(config), str(checkpoint), device="cpu")
    pipeline = copy.deepcopy(get_test_pipeline_cfg(model.cfg))
    pipeline[0] = {"type": "mmdet.LoadImageFromNDArray"}
    found = inference_detector(model, pixels[..., ::-1].copy(), Compose(pipeline)).pred_instances
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.masks[order].flatten(1).any(1)]
    rows = zip(found.labels[order], found.scores[order], found.bboxes[order], found.masks[order], strict=True)
    return [
        Detection(GENEVAL_CLASSES[label], float(score), tuple(box.tolist()), mask.numpy())
        for label, score, box, mask in rows
    ]


def assert_alike(found: list[Detection], expected: list[Detection], tolerance: float) -> None:
    """As many detections with the same scores, and the same objects, of which near-equals may have changed places."""
    assert len(found) == len(expected) > 0
    scores = [[one.score for one in same] for same in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=tolerance)
    left = list(found)
    for one in expected:
        twins = [
            other
            for other in left
            if other.label == one.label
            and abs(other.score - one.score) <= tolerance
            and (other.mask != one.mask).mean() < 1e-3
        ]
        assert twins, (one.label, one.score, one.box)
        left.remove(twins[0])


def test_swin_s_finds_in_an_image_what_mmdet_finds(tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    save_random_weights(official_config(), folder / "swin-s.pth")
    detector = load_detector(folder, batch_size=1, labels=GENEVAL_CLASSES, min_score=0.0)
    pixels = image(1024, 1024)
    (found,) = detector.detect([pixels])
    assert len(found) == 100
    assert {one.label for one in found} <= set(GENEVAL_CLASSES)
    assert found[0].mask.shape == (1024, 1024)
    assert_alike(found, by_mmdet(official_config(), folder / "swin-s.pth", pixels), 1e-4)


@pytest.mark.parametrize("size", [(1024, 1024), (256, 768), (320, 96)])
def test_a_folders_own_configuration_and_every_shape_of_image(small, size):
    detector = MmdetDetector(small, batch_size=1)
    (found,) = detector.detect([image(*size)])
    assert_alike(found, by_mmdet(small / "small.py", small / "small.pth", image(*size)), 1e-4)


def test_a_result_does_not_depend_on_its_neighbours(small):
    detector = MmdetDetector(small, batch_size=2)
    images = [image(64, 160, seed) for seed in range(3)]
    together = detector.detect(images)
    alone = [detector.detect([one])[0] for one in images]
    assert [[(d.label, d.score, d.box) for d in found] for found in together] == [
        [(d.label, d.score, d.box) for d in found] for found in alone
    ]
    assert_alike(together[0], MmdetDetector(small, batch_size=1).detect(images[:1])[0], 1e-4)
    assert together[0][0].mask.any()
    assert [d.score for d in together[0]] != [d.score for d in together[1]]


def test_min_score_and_names(small):
    names = tuple(f"class {index}" for index in range(80))
    faint = MmdetDetector(small, batch_size=1).detect([sanity_image()])[0]
    cut = faint[5].score
    (kept,) = MmdetDetector(small, batch_size=1, labels=names, min_score=cut).detect([sanity_image()])
    assert [one.score for one in kept] == [one.score for one in faint[:5]]
    assert [one.label for one in kept] == [names[GENEVAL_CLASSES.index(one.label)] for one in faint[:5]]
    with pytest.raises(UserError, match=f"{small} knows 80 classes, not 2"):
        MmdetDetector(small, labels=("a", "b"))


def test_the_self_test_sees_the_same_twice(small):
    detectors = [MmdetDetector(small, batch_size=2, min_score=0.3) for _ in range(2)]
    one, two = (DetectorRecord.of(d.fingerprint, "cpu", d.detect_faint(sanity_image())) for d in detectors)
    assert one.seen
    assert one.fingerprint == two.fingerprint
    assert differences(one, two) == []


def test_fingerprint_follows_weights_configuration_and_settings(small, tmp_path):
    copied = Path(shutil.copytree(small, tmp_path / "copy"))
    original = MmdetDetector(small).fingerprint
    assert MmdetDetector(copied).fingerprint == original
    assert MmdetDetector(copied, min_score=0.5).fingerprint != original
    with (copied / "small.py").open("a") as file:
        file.write("remark = 'another text'\n")
    assert MmdetDetector(copied).fingerprint != original
    shutil.copy(small / "small.py", copied)
    _change(copied, lambda weights: weights["panoptic_head.cls_embed.bias"].add_(1))
    assert MmdetDetector(copied).fingerprint != original


def test_a_bare_state_dict_is_a_checkpoint_too(small, tmp_path):
    copied = Path(shutil.copytree(small, tmp_path / "copy"))
    torch.save(torch.load(small / "small.pth", weights_only=True)["state_dict"], copied / "small.pth")
    found = [MmdetDetector(folder, batch_size=1).detect([sanity_image()])[0] for folder in (small, copied)]
    assert_alike(*found, 0.0)


def _change(folder: Path, change) -> None:
    checkpoint = torch.load(folder / "small.pth", weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "small.pth")


class Code:
    """What a pickle runs on loading."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


def _without_checkpoint(folder: Path) -> None:
    (folder / "small.pth").unlink()


def _empty(folder: Path) -> None:
    (folder / "small.pth").write_bytes(b"")


def _truncated(folder: Path) -> None:
    path = folder / "small.pth"
    path.write_bytes(path.read_bytes()[:-5000])


def _with_code(folder: Path) -> None:
    torch.save({"state_dict": {}, "meta": Code()}, folder / "small.pth")


def _without_a_tensor(folder: Path) -> None:
    _change(folder, lambda weights: weights.pop("panoptic_head.level_embed.weight"))


def _misshapen(folder: Path) -> None:
    _change(folder, lambda weights: weights.update({"panoptic_head.cls_embed.bias": torch.zeros(9)}))


def _no_dictionary(folder: Path) -> None:
    torch.save([1, 2], folder / "small.pth")


def _unreadable_configuration(folder: Path) -> None:
    (folder / "small.py").write_text("model = dict(")


def _another_model(folder: Path) -> None:
    (folder / "small.py").write_text("model = dict(type='FasterRCNN')")


def _of_the_official_model(folder: Path) -> None:
    (folder / "small.py").unlink()  # the weights are not those of the wheel's configuration


@pytest.mark.parametrize(
    "damage",
    [
        _without_checkpoint,
        _empty,
        _truncated,
        _with_code,
        _without_a_tensor,
        _misshapen,
        _no_dictionary,
        _unreadable_configuration,
        _another_model,
        _of_the_official_model,
    ],
)
def test_an_unusable_folder_is_one_line_that_names_it(small, tmp_path, damage):
    folder = Path(shutil.copytree(small, tmp_path / "detector"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        MmdetDetector(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    print(message)
