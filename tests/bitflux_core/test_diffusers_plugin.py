"""Ternary checkpoints through diffusers' own from_pretrained and save_pretrained."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import load_ternary
from bitflux_core.diffusers_plugin import BitFluxConfig, BitFluxQuantizer
from bitflux_core.errors import UserError
from bitflux_core.fused import FusedFluxTransformer2DModel, fuse
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear

LAYER = "single_transformer_blocks.0.proj_out"
REPOSITORY = Path(__file__).parents[2]


def assert_same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copy(ternary_dir, tmp_path) -> Path:
    return Path(shutil.copytree(ternary_dir, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diffusers_loads_what_bitflux_saved(ternary_dir, dtype):
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir, dtype=dtype)
    assert_same(loaded, load_ternary(ternary_dir, dtype=dtype, device="cpu"))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert isinstance(fuse(loaded), FusedFluxTransformer2DModel)


@pytest.mark.parametrize("codes", ["planes", "trits"])
def test_what_diffusers_saves_both_can_load(copy, tmp_path, codes):
    edit_config(copy, codes=codes, activations="int8")
    loaded = FluxTransformer2DModel.from_pretrained(copy, dtype=torch.bfloat16)
    assert {layer.activations for layer in block_linears(loaded).values()} == {"int8"}
    loaded.save_pretrained(tmp_path / "new")
    (file,) = (tmp_path / "new").glob("*.safetensors")
    dimensions = {t.ndim for name, t in load_file(file).items() if name.endswith(".packed")}
    assert dimensions == {2 if codes == "planes" else 1}
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "new", dtype=torch.bfloat16), loaded)
    assert_same(load_ternary(tmp_path / "new", dtype=torch.bfloat16, device="cpu"), loaded)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert codes in card


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("load", [FluxTransformer2DModel.from_pretrained, partial(load_ternary, device="cpu")])
def test_a_whole_pipeline_is_saved_and_loaded(pipeline_dir, ternary_dir, tmp_path, load, fused):
    transformer = load(ternary_dir, dtype=torch.bfloat16)
    pipeline = FluxPipeline.from_pretrained(pipeline_dir, transformer=transformer)
    if fused:
        pipeline.transformer = fuse(transformer)
    pipeline.save_pretrained(tmp_path / "whole")
    loaded = FluxPipeline.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert isinstance(loaded.transformer.single_transformer_blocks[0].proj_out, TernaryLinear)
    assert_same(loaded.transformer, transformer)


def test_a_lora_is_refused_with_the_reason(ternary_dir):
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir)
    with pytest.raises(ValueError, match="LoRA cannot be added to ternary layers"):
        loaded.load_lora_adapter({})


@pytest.mark.parametrize("lora", [{"transformer.proj_out.lora_A.weight": torch.zeros(1, 1)}, "a-name", {}])
def test_a_lora_on_the_pipeline_is_refused_with_the_reason(pipeline_dir, ternary_dir, lora):
    """Whether PEFT is installed or not."""
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir)
    pipeline = FluxPipeline.from_pretrained(pipeline_dir, transformer=loaded)
    with pytest.raises(ValueError, match="LoRA cannot be added to ternary layers"):
        pipeline.load_lora_weights(lora)
    full_precision = FluxPipeline.from_pretrained(pipeline_dir)
    with pytest.raises(ValueError, match=r"PEFT|LoRA|lora") as caught:  # diffusers' own words
        full_precision.load_lora_weights({})
    assert "ternary" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """What the hub was sent."""
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, name, **options):
            seen["name"] = name
            return type("Repository", (), {"repo_id": f"me/{name}"})

        def file_exists(self, repo_id, name):
            return (repo_id, name) == seen.get("there")

        def upload_folder(self, repo_id, folder_path, **options):
            folder = Path(folder_path)
            seen.update(repo_id=repo_id, files=sorted(path.name for path in folder.iterdir()), **options)
            seen["card"] = (folder / "README.md").read_text()
            return "an address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *_, **__: pytest.fail("diffusers' own upload"))
    return seen


def test_saving_to_the_hub_uploads_the_folder_with_its_card(ternary_dir, tmp_path, hub):
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir)
    loaded.save_pretrained(tmp_path / "flux-ternary", push_to_hub=True, token="t")
    assert (hub["token"], hub["name"], hub["repo_id"]) == ("t", "flux-ternary", "me/flux-ternary")
    assert {"README.md", "config.json"} < set(hub["files"])
    assert "# Ternary FLUX transformer" in hub["card"]


def test_push_to_hub_uploads_our_card_not_a_blank_one(ternary_dir, hub):
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir)
    assert loaded.push_to_hub("twin", "Better codes", token="t", subfolder="transformer") == "an address"
    assert (hub["token"], hub["repo_id"]) == ("t", "me/twin")
    assert (hub["commit_message"], hub["path_in_repo"]) == ("Better codes", "transformer")
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} == set(hub["files"])
    assert "# Ternary FLUX transformer" in hub["card"]


@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_a_card_that_is_on_the_hub_already_is_left_alone(ternary_dir, hub, subfolder):
    loaded = FluxTransformer2DModel.from_pretrained(ternary_dir)
    loaded.push_to_hub("twin", subfolder=subfolder)
    assert hub["ignore_patterns"] is None
    hub["there"] = ("me/twin", "README.md" if subfolder is None else "transformer/README.md")
    loaded.push_to_hub("twin", subfolder=subfolder)
    assert hub["ignore_patterns"] == ["README.md"]


def test_another_format_is_named(copy):
    edit_config(copy, format_version=99)
    with pytest.raises(ValueError, match="format 99, this BitFlux reads 2: update BitFlux"):
        FluxTransformer2DModel.from_pretrained(copy)


def test_a_damaged_file_is_named(copy):
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=re.escape(shard.name)):
        FluxTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [("packed", 250, "which is no five ternary codes"), ("scale", float("nan"), "not finite")],
)
def test_a_senseless_tensor_is_named(copy, part, value, words):
    name = f"single_transformer_blocks.0.proj_out.{part}"
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3] = value
            shard.unlink()
            save_file(tensors, shard, metadata={"format": "pt"})
    edit_config(copy, files=None)
    with pytest.raises(ValueError, match=rf"single_transformer_blocks\.0\.proj_out.*{words}"):
        FluxTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["x_embedder.weight", *(f"{LAYER}.{part}" for part in ("packed", "scale", "bias"))])
def test_a_missing_tensor_is_named(copy, name):
    """diffusers itself would compute with what is in memory by chance."""
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(name, None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    edit_config(copy, files=None)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is in none of the checkpoint's files"):
        FluxTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("places", [{"": "disk"}, {"x_embedder": 0, "single_transformer_blocks": "cpu"}])
def test_offloading_in_part_is_refused_with_the_remedy(places):
    with pytest.raises(ValueError, match="give it a whole device"):
        BitFluxQuantizer(BitFluxConfig()).validate_environment(device_map=places)
    for whole in (None, "auto", {"": "cpu"}, {"": 0}, {"x_embedder": 0, "proj_out": 1}):
        BitFluxQuantizer(BitFluxConfig()).validate_environment(device_map=whole)


def test_what_bitflux_loaded_says_how_it_was_made_and_takes_no_lora(ternary_dir, tmp_path):
    loaded = load_ternary(ternary_dir, dtype=torch.bfloat16, device="cpu", activations="int8")
    loaded.save_pretrained(tmp_path / "new")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (ternary_dir, tmp_path / "new"))
    for key in ("quant_method", "method", "provenance", "codes"):
        assert new["quantization_config"][key] == old["quantization_config"][key]
    assert new["quantization_config"]["activations"] == "int8"
    with pytest.raises(ValueError, match="LoRA cannot be added"):
        loaded.load_lora_adapter({})


def test_another_variant_in_the_folder_is_not_mixed_in(ternary_dir, tmp_path):
    first, second = (FluxTransformer2DModel.from_pretrained(ternary_dir, dtype=torch.bfloat16) for _ in range(2))
    second.x_embedder.weight.add_(1)
    first.save_pretrained(tmp_path / "both", max_shard_size="40KB")
    second.save_pretrained(tmp_path / "both", max_shard_size="40KB", variant="zz")
    assert_same(load_ternary(tmp_path / "both", dtype=torch.bfloat16, device="cpu"), first)


def test_importing_bitflux_imports_neither_torch_nor_diffusers():
    code = "import bitflux_core, sys; print({'torch', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("first", ["bitflux_core", "diffusers", "bitflux_core.diffusers_plugin"])
def test_the_quantizer_is_registered_whatever_is_imported_first(first):
    code = f"import {first}, bitflux_core; from diffusers.quantizers import auto; print(*auto.AUTO_QUANTIZER_MAPPING)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bitflux" in result.stdout.split()


def test_the_readmes_script_draws(tmp_path):
    section = (REPOSITORY / "README.md").read_text().split("## Use it from diffusers")[1]
    script = (
        section.split("```python\n")[1].split("```")[0].replace("bitflux_core/mini", f"{REPOSITORY}/bitflux_core/mini")
    )
    assert len(script.strip().splitlines()) <= 10
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    image = Image.open(tmp_path / "ternary.png")
    assert image.size == (128, 128)
    assert len(image.getcolors(128 * 128)) > 100
