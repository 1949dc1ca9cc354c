"""A ternary transformer is saved by diffusers' own options, and its model card spares what others wrote."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from bitflux_core.checkpoint import load_ternary
from bitflux_core.fused import fuse
from bitflux_core.layers import block_linears


@pytest.fixture
def loaded(ternary_dir) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(ternary_dir, dtype=torch.bfloat16)


def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
@pytest.mark.parametrize("prepare", [lambda model: model, fuse])
def test_the_parameters_are_those_of_diffusers(loaded, name, prepare):
    def parameters(method):
        own = {"max_shard_size"}  # smaller, for the memory that loading takes
        given = inspect.signature(method).parameters.values()
        return [(p.name, p.kind, None if p.name in own else p.default) for p in given]

    assert parameters(getattr(prepare(loaded), name)) == parameters(getattr(FluxTransformer2DModel, name))[1:]


@pytest.mark.parametrize("prepare", [lambda model: model, fuse])
def test_a_pipelines_variant_reaches_the_transformer(pipeline_dir, tmp_path, loaded, prepare):
    expected = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    pipeline = FluxPipeline.from_pretrained(pipeline_dir, transformer=prepare(loaded))
    pipeline.save_pretrained(tmp_path, variant="bf16")
    assert [file.name for file in (tmp_path / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.bf16.safetensors"
    ]
    again = FluxPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16).transformer
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_other_options_of_a_pipeline_reach_the_transformer(pipeline_dir, tmp_path, loaded):
    pipeline = FluxPipeline.from_pretrained(pipeline_dir, transformer=loaded)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "transformer" / "diffusion_pytorch_model.bin").exists()


def test_the_second_argument_is_no_upload(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: pytest.fail("an upload"))
    loaded.save_pretrained(tmp_path, True)
    assert (tmp_path / "README.md").exists()


def test_a_process_that_is_not_the_main_one_writes_tensors_alone(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: pytest.fail("an upload"))
    loaded.save_pretrained(tmp_path, is_main_process=False, push_to_hub=True)
    assert [file.name for file in tmp_path.iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_a_readme_that_somebody_else_wrote_is_kept(loaded, tmp_path):
    (tmp_path / "README.md").write_text("Notes on the Ternary FLUX transformer")
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Notes on the Ternary FLUX transformer"


def test_a_name_that_is_a_files_is_left_alone_as_diffusers_does(loaded, tmp_path):
    (tmp_path / "file").write_text("x")
    loaded.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_activations_are_saved_as_they_are_now(loaded, tmp_path):
    for kind in ("int8", "native"):  # the second time too, when diffusers has made a dictionary of the config
        for layer in block_linears(loaded).values():
            layer.activations = kind
        loaded.save_pretrained(tmp_path / kind)
        loaded.register_to_config(_name_or_path="another")
        assert saved_config(tmp_path / kind)["activations"] == kind
        again = FluxTransformer2DModel.from_pretrained(tmp_path / kind)
        assert {layer.activations for layer in block_linears(again).values()} == {kind}


def test_differing_activations_are_refused_before_anything_is_written(ternary_dir, tmp_path):
    model = load_ternary(ternary_dir, dtype=torch.bfloat16, device="cpu")
    model.transformer_blocks[0].ff.net[2].activations = "int8"
    with pytest.raises(ValueError, match=r"differ \(int8, native\): set one for all"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
