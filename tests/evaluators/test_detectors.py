"""Which detector a folder is, and what is said of folders that are none, without the extra `mmdet` too."""

import shutil
import sys
from pathlib import Path

import pytest

from bitflux_core.errors import UserError
from evaluators.detectors import load_detector
from evaluators.mask2former import Mask2FormerDetector


def load(folder: Path):
    return load_detector(folder, batch_size=2, labels=None, min_score=0.3)


def test_a_configuration_of_transformers_is_transformers(detector_dir):
    detector = load(detector_dir)
    assert isinstance(detector, Mask2FormerDetector)
    assert (detector.batch_size, detector.min_score) == (2, 0.3)


def test_a_checkpoint_is_mmdets_and_without_the_extra_the_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "mask2former.pth").write_bytes(b"")
    for name in ("mmcv", "mmdet"):
        monkeypatch.setitem(sys.modules, name, None)  # as where they are not installed
    with pytest.raises(UserError, match=rf"{tmp_path} .*run `uv sync --extra mmdet`") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_configuration_goes_before_a_checkpoint_beside_it(detector_dir, tmp_path):
    folder = Path(shutil.copytree(detector_dir, tmp_path / "both"))
    (folder / "original.pth").write_bytes(b"")
    assert isinstance(load(folder), Mask2FormerDetector)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_of_neither_names_both(tmp_path, exists):
    folder = tmp_path / "detector"
    if exists:
        folder.mkdir()
    with pytest.raises(UserError, match=rf"{folder} has neither a config.json .*nor a .pth checkpoint"):
        load(folder)


def test_two_checkpoints_are_one_too_many(tmp_path):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 files \*\.pth \(a\.pth, b\.pth\): leave one of them"):
        load(tmp_path)
