"""The depth model: its frame, its range, and that images do not see each other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

from bitflux_core.errors import UserError
from bitflux_core.mini.depth import build_depth, save_depth
from evaluators.depth import PROTOCOL_SIDE, DptDepthEstimator, to_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth")
    save_depth(build_depth(), folder)
    return folder


def noise(seed, height=64, width=64):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_depth_is_stretched_to_all_of_a_byte():
    assert to_bytes(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).tolist() == [[0, 63], [127, 255]]
    assert to_bytes(torch.full((2, 2), 7.0)).tolist() == [[0, 0], [0, 0]]


def test_maps_have_the_models_frame_whatever_the_images_are(folder):
    maps = DptDepthEstimator(folder).depth([noise(0), noise(1, 100, 50)])
    assert [(one.shape, one.dtype, one.min(), one.max()) for one in maps] == [((128, 128), np.uint8, 0, 255)] * 2
    assert DptDepthEstimator(folder).depth([]) == []


def test_an_image_gets_the_same_depth_in_any_company(folder):
    model = DptDepthEstimator(folder, batch_size=3)
    alone = model.depth([noise(2)])[0]
    assert np.array_equal(model.depth([noise(i) for i in range(5)])[2], alone)


def test_pixels_have_mean_and_deviation_one_half(folder):
    image = noise(5, 40, 60)
    small = np.array(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC))
    expected = (torch.from_numpy(small).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.allclose(DptDepthEstimator(folder)._pixels(image), expected, atol=1e-6)


def test_the_hybrid_model_runs_in_the_protocols_frame(tmp_path):
    """MiDaS's kind of model at small dimensions, whose own image size is another."""
    backbone = BitConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], num_groups=4, layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3"], global_padding="same", embedding_dynamic_padding=True,
    )  # fmt: skip
    config = DPTConfig(
        is_hybrid=True, backbone_config=backbone, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        backbone_featmap_shape=[1, 64, 4, 4], neck_hidden_sizes=[16, 32, 32, 32], fusion_hidden_size=16,
        neck_ignore_stages=[0, 1], readout_type="project", use_auxiliary_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    [depth] = DptDepthEstimator(tmp_path, batch_size=1).depth([noise(3)])
    assert depth.shape == (PROTOCOL_SIDE, PROTOCOL_SIDE)


def test_what_is_no_image_is_named(folder):
    with pytest.raises(ValueError, match="image 1: an image must be uint8"):
        DptDepthEstimator(folder).depth([noise(0), np.zeros((4, 4))])


def test_a_folder_that_lacks_weights_is_named(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=f"depth model folder {tmp_path} cannot be loaded"):
        DptDepthEstimator(tmp_path)
    with pytest.raises(UserError, match="has no config"):
        DptDepthEstimator(tmp_path / "nowhere")


def test_a_checkpoint_as_published_loads(tmp_path, folder):
    """Without the residual unit of the first fusion layer, which never runs; any other tensor must be there."""
    tensors = load_file(folder / "model.safetensors")
    lacking = {name for name in tensors if "fusion_stage.layers.0.residual_layer1" in name}
    assert lacking
    published = Path(shutil.copytree(folder, tmp_path / "published"))
    save_file({name: tensors[name] for name in tensors.keys() - lacking}, published / "model.safetensors")
    picture = noise(4)
    assert np.array_equal(*(DptDepthEstimator(path).depth([picture])[0] for path in (folder, published)))
    lacking.add("neck.fusion_stage.layers.1.residual_layer1.convolution1.weight")
    save_file({name: tensors[name] for name in tensors.keys() - lacking}, published / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors lacking or misshapen, neck\.fusion_stage\.layers\.1"):
        DptDepthEstimator(published)
