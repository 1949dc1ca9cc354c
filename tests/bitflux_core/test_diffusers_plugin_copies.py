"""Copies of a ternary transformer: pickled, deep-copied, dequantized."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from bitflux_core.checkpoint import load_ternary
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear


def inputs(model: FluxTransformer2DModel) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    return {
        "hidden_states": normal(1, 4, model.config.in_channels),
        "encoder_hidden_states": normal(1, 3, model.config.joint_attention_dim),
        "pooled_projections": normal(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.3], dtype=model.dtype),
        "guidance": torch.tensor([2.0], dtype=model.dtype),
        "img_ids": torch.arange(12).reshape(4, 3).to(model.dtype),
        "txt_ids": torch.zeros(3, 3, dtype=model.dtype),
        "return_dict": False,
    }


@torch.no_grad()
def output(model: FluxTransformer2DModel) -> torch.Tensor:
    return model(**inputs(model))[0]


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LOADERS = [FluxTransformer2DModel.from_pretrained, partial(load_ternary, device="cpu")]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "copied",
    [lambda model: pickle.loads(pickle.dumps(model)), through_torch, copy.deepcopy],
    ids=["pickle", "torch", "deep"],
)
def test_a_copy_is_a_ternary_transformer_of_its_own(ternary_dir, tmp_path, load, copied):
    model = load(ternary_dir, dtype=torch.bfloat16)
    other = copied(model)
    assert torch.equal(output(other), output(model))
    with torch.no_grad():
        other.x_embedder.weight.add_(1)
    other.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(again.single_transformer_blocks[0].proj_out, TernaryLinear)
    assert torch.equal(output(again), output(other))
    assert not torch.equal(output(again), output(model))
    assert "# Ternary FLUX transformer" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="LoRA cannot be added to ternary layers"):
        other.load_lora_adapter({})


@pytest.mark.slow
def test_a_process_that_unpickles_one_refuses_loras_of_pipelines(ternary_dir, pipeline_dir, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(ternary_dir)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from diffusers import FluxPipeline\n"
        "FluxPipeline.from_pretrained(sys.argv[2], transformer=model).load_lora_weights({})\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.pkl"), str(pipeline_dir)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert "ValueError: a LoRA cannot be added to ternary layers" in result.stderr


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rank", [0, 2])
def test_dequantized_it_is_a_plain_transformer_that_computes_the_same(
    ternary_dir, pipeline_dir, tmp_path, load, dtype, tolerance, rank
):
    model = load(ternary_dir, dtype=dtype)
    torch.manual_seed(0)
    for layer in block_linears(model).values():
        layer.bias += torch.randn_like(layer.bias)  # biases start at 0, which would hide that they are dropped
        if rank:
            layer.down = torch.randn(rank, layer.in_features, dtype=dtype) / 8
            layer.up = torch.randn(layer.out_features, rank, dtype=dtype) / 8
    expected = output(model)
    plain = model.dequantize()

    linears = block_linears(plain).values()
    assert {type(linear) for linear in linears} == {nn.Linear}
    assert {tensor.dtype for tensor in plain.state_dict().values()} == {dtype}
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    error = (output(plain) - expected).double().norm() / expected.double().norm()
    assert error < tolerance

    plain.save_pretrained(tmp_path)  # as diffusers saves any other
    assert not (tmp_path / "README.md").exists()
    again = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(output(again), output(plain))
    pipeline = FluxPipeline.from_pretrained(pipeline_dir, transformer=plain)
    with pytest.raises(ValueError, match=r"PEFT|LoRA|lora") as caught:  # diffusers' own words
        pipeline.load_lora_weights({})
    assert "ternary" not in str(caught.value)
    plain.fuse_qkv_projections()
    assert (output(plain) - expected).double().norm() / expected.double().norm() < tolerance


def test_fusing_its_projections_is_refused_with_the_remedies(ternary_dir):
    model = FluxTransformer2DModel.from_pretrained(ternary_dir)
    with pytest.raises(ValueError, match=r"packed.*fused\.fuse\(transformer\).*dequantize\(\)"):
        model.fuse_qkv_projections()
