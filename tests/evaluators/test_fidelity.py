"""Images against their twins: pixels, structure, content and frequencies."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch

from bitflux_core.mini.models import WEIGHTS
from evaluators.clip import ClipModel
from evaluators.fidelity import BAND_EDGES, BANDS, Fidelity, FidelityMeter, band_power, band_signal_to_error_db
from evaluators.gates import IDENTICAL_DB

SIDE = 64


def noise(seed, low=60, high=200):
    return np.random.default_rng(seed).integers(low, high, (SIDE, SIDE, 3), dtype=np.uint8)


def wave(cycles_a_pixel, amplitude=40):
    """A grey image of one spatial frequency, along x."""
    row = 128 + amplitude * np.cos(2 * np.pi * cycles_a_pixel * np.arange(SIDE))
    return np.repeat(np.repeat(row[None, :, None], SIDE, 0), 3, 2).round().astype(np.uint8)


@pytest.fixture(scope="module")
def meter():
    return FidelityMeter(None)


def test_identical_images_differ_in_nothing(meter):
    [found] = meter.measure([noise(0)], [noise(0)])
    assert (found.psnr_db, found.ssim) == (IDENTICAL_DB, pytest.approx(1.0))
    assert found.band_error == (0,) * len(BANDS)
    assert (found.clip_similarity, found.lpips) == (None, None)


def test_psnr_is_that_of_the_error(meter):
    image = noise(1)
    [found] = meter.measure([image], [image + np.uint8(16)])
    assert found.psnr_db == pytest.approx(20 * math.log10(255 / 16))
    # A brighter image has the same structure: only the means differ.
    assert 0.9 < found.ssim < 1


def test_structure_suffers_more_from_blur_than_from_brightness(meter):
    image = noise(2)
    blurred = np.repeat(np.repeat(image[::2, ::2], 2, 0), 2, 1)
    [brighter, softer] = meter.measure([image, image], [image + np.uint8(16), blurred])
    assert softer.ssim < 0.6 < brighter.ssim


@pytest.mark.parametrize("band", range(len(BANDS)))
def test_a_wave_lands_in_its_octave(band):
    frequency = (BAND_EDGES[band] + min(BAND_EDGES[band + 1], 0.5)) / 2
    frequency = max(1, round(frequency * SIDE)) / SIDE
    power = band_power(torch.from_numpy(wave(frequency)).permute(2, 0, 1)[None] / 255)
    assert power.argmax() == min(i for i in range(len(BANDS)) if frequency <= BAND_EDGES[i + 1])
    assert power.max() == pytest.approx(40**2 / 2, rel=0.02)


def test_bands_sum_to_the_variance_of_the_luminance():
    image = noise(3)
    power = band_power(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert float(power.sum()) == pytest.approx((image @ np.array([0.299, 0.587, 0.114])).var(), rel=1e-5)


def test_lost_detail_is_an_error_at_high_frequencies(meter):
    image = (wave(1 / 32).astype(int) + wave(3 / 8, 20) - 128).astype(np.uint8)
    results = meter.measure([image], [wave(1 / 32)])
    ratios = band_signal_to_error_db(results)
    assert ratios["1/2"] == pytest.approx(0, abs=0.1)  # all of it is lost
    assert ratios["1/32"] > 20


def test_ratios_are_of_all_images_together():
    one = Fidelity(30, 0.9, None, None, (1.0,) * 6, (100.0,) * 6)
    other = dataclasses.replace(one, band_error=(3.0,) * 6)
    assert band_signal_to_error_db([one, other])["1/4"] == pytest.approx(10 * math.log10(200 / 4))
    assert band_signal_to_error_db([dataclasses.replace(one, band_error=(0.0,) * 6)])["1/4"] == math.inf
    assert math.isnan(band_signal_to_error_db([])["1/4"])


def test_pairs_that_cannot_be_compared_get_a_reason_and_spoil_no_other(meter):
    image = noise(4)
    found = meter.measure([image, image, None, image[:8]], [image[:32], image, image, image[:8]])
    assert found[0] == "the image is [32, 64, 3], its twin [64, 64, 3]"
    assert found[1].psnr_db == IDENTICAL_DB
    assert found[2].startswith("the twin: an image must be a numpy array")
    assert "at least 16 pixels" in found[3]


def test_clip_says_how_alike_the_content_is():
    meter = FidelityMeter(ClipModel(WEIGHTS / "clip"))
    image = noise(5)
    [same, other] = meter.measure([image, image], [image, wave(1 / 8)])
    assert same.clip_similarity == pytest.approx(1, abs=1e-5)
    assert other.clip_similarity < 0.99


def test_lpips_is_measured_where_its_backbone_is_present(tmp_path, monkeypatch):
    """With a random backbone in place of ImageNet's: identical images are at distance 0, others are not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert FidelityMeter(None).lpips is None
    from torchvision.models import alexnet

    folder = tmp_path / "hub" / "checkpoints"
    os.makedirs(folder)
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), folder / "alexnet-owt-7be5be79.pth")
    image, other = noise(6), noise(7)
    [same, different] = FidelityMeter(None).measure([image, image], [image, other])
    assert same.lpips == 0
    assert different.lpips > 0
