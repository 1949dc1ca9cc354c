import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from bitflux_core.accounting import size_report
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.loading import load_transformer, storage_bytes
from bitflux_core.variants import VARIANTS, model_fingerprint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def load(pipeline_dir, ternary_dir):
    def load(variant, dtype=torch.bfloat16, pipeline_dir=pipeline_dir, ternary_dir=ternary_dir):
        return load_transformer(variant, pipeline_dir=pipeline_dir, ternary_dir=ternary_dir, device="cpu", dtype=dtype)

    return load


@pytest.fixture
def pipeline_copy(pipeline_dir, tmp_path):
    return shutil.copytree(pipeline_dir, tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_load_frozen_in_the_type_asked_for(load, variant, dtype):
    transformer = load(variant, dtype)
    assert isinstance(transformer, FluxTransformer2DModel)
    assert {parameter.dtype for parameter in transformer.parameters()} == {dtype}
    assert transformer.dtype == dtype
    assert not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_variants_differ_in_their_linears(load):
    kinds = {}
    for variant in VARIANTS:
        kinds[variant] = {
            (type(layer), getattr(layer, "activations", None), getattr(layer, "execution", None))
            for layer in block_linears(load(variant)).values()
        }
    assert kinds == {
        "bf16": {(nn.Linear, None, None)},
        "ternary": {(TernaryLinear, "native", "kernel")},
        "ternary-int8": {(TernaryLinear, "int8", "kernel")},
        "ternary-reference": {(TernaryLinear, "native", "reference")},
    }


def test_storage_needs_no_weights(pipeline_copy, ternary_dir, load):
    (pipeline_copy / WEIGHTS).unlink()
    report = size_report(load("bf16"))
    assert storage_bytes("bf16", pipeline_dir=pipeline_copy, ternary_dir=None) == report.bf16_bytes
    for variant in ("ternary", "ternary-int8", "ternary-reference"):
        assert storage_bytes(variant, pipeline_dir=pipeline_copy, ternary_dir=ternary_dir) == report.storage_bytes


def test_fingerprint_covers_the_weights_in_use_and_the_rest_of_the_pipeline(pipeline_copy, ternary_dir):
    def fingerprints():
        folders = {"pipeline_dir": pipeline_copy, "ternary_dir": ternary_dir}
        return [model_fingerprint(variant, **folders) for variant in ("bf16", "ternary")]

    first = fingerprints()
    assert len(set(first)) == 2
    config = pipeline_copy / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    second = fingerprints()
    assert (second[0] != first[0], second[1] == first[1]) == (True, True)
    scheduler = pipeline_copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    third = fingerprints()
    assert (third[0] != second[0], third[1] != second[1]) == (True, True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def edit(change):
    def apply(path):
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "cannot be loaded"),
        (lambda path: path.unlink(), "cannot be loaded"),
        (lambda path: shutil.rmtree(path.parent), "is missing: name the folder of a FLUX pipeline"),
        (edit(lambda tensors: tensors.pop("proj_out.bias")), "missing keys such as proj_out.bias"),
        (edit(lambda tensors: tensors.update(alien=torch.zeros(2))), "unexpected keys such as alien"),
        (edit(lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)})), "proj_out.bias"),
    ],
    ids=["truncated", "no weights", "no folder", "tensor missing", "tensor too many", "mismatched shape"],
)
def test_a_damaged_full_precision_model_is_named_in_one_line(load, pipeline_copy, damage, words):
    damage(pipeline_copy / WEIGHTS)
    with pytest.raises(UserError) as caught:
        load("bf16", pipeline_dir=pipeline_copy)
    message = str(caught.value)
    assert words in message
    assert str(pipeline_copy / "transformer") in message
    assert "\n" not in message
