import copy
import gc
import json
import pickle
import threading
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bitflux_core.checkpoint import load_ternary
from bitflux_core.convert import quantize_transformer
from bitflux_core.fused import fuse
from bitflux_core.layers import block_linears

TEXT, SIDE = 7, 4


@pytest.fixture(scope="module")
def ternary() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide that they are dropped
        parameter.data += 0.1 * torch.randn_like(parameter)
    quantize_transformer(model)
    return model.eval().requires_grad_(False)


def inputs(dtype: torch.dtype, guidance: bool = True) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = torch.arange(SIDE).repeat_interleave(SIDE)
    columns = torch.arange(SIDE).repeat(SIDE)
    given = {
        "hidden_states": normal(2, SIDE * SIDE, 16),
        "encoder_hidden_states": normal(2, TEXT, 24),
        "pooled_projections": normal(2, 20),
        "timestep": torch.tensor([0.3, 0.8], dtype=dtype),  # two images, so that a mix-up of their modulations shows
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(dtype),
        "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
        "return_dict": False,
    }
    return given | ({"guidance": torch.tensor([3.5, 2.0], dtype=dtype)} if guidance else {})


def prepared(ternary: FluxTransformer2DModel, activations: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    model = copy.deepcopy(ternary)
    for layer in block_linears(model).values():
        layer.activations = activations
    return model.to(dtype)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


# int8 values may round the other way where float32 sums differ in their last bits.
@pytest.mark.parametrize(
    ("activations", "dtype", "tolerance"),
    [("native", torch.float32, 1e-5), ("int8", torch.float32, 5e-3), ("native", torch.bfloat16, 3e-2)],
)
def test_fused_blocks_compute_what_the_single_layers_do(ternary, activations, dtype, tolerance):
    model = prepared(ternary, activations, dtype)
    (expected,) = model(**inputs(dtype))
    (y,) = fuse(model)(**inputs(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance


def test_an_image_does_not_depend_on_the_others_of_its_batch(ternary):
    model = fuse(prepared(ternary, "int8", torch.float32))
    given = inputs(torch.float32)
    (both,) = model(**given)
    alone = {name: x[1:] if name not in ("img_ids", "txt_ids", "return_dict") else x for name, x in given.items()}
    assert relative_error(model(**alone)[0], both[1:]) < 5e-3


def test_a_model_without_guidance(ternary):
    config = {**ternary.config, "guidance_embeds": False}
    model = FluxTransformer2DModel.from_config(config).eval().requires_grad_(False)
    quantize_transformer(model)
    given = inputs(torch.float32, guidance=False)
    (expected,) = model(**given)
    assert relative_error(fuse(model)(**given)[0], expected) < 1e-5


def test_layers_are_views_of_the_stacks(ternary):
    model = fuse(prepared(ternary, "native", torch.float32))
    for layer, stack in (
        (model.transformer_blocks[1].norm1_context.linear, model.modulation),
        (model.transformer_blocks[0].attn.add_k_proj, model.transformer_blocks[0].text.qkv),
        (model.single_transformer_blocks[1].attn.to_v, model.single_transformer_blocks[1].qkv),
    ):
        assert layer.packed.untyped_storage().data_ptr() == stack.packed_NJ.untyped_storage().data_ptr()
        assert layer.scale.untyped_storage().data_ptr() == stack.scale_N.untyped_storage().data_ptr()
        assert layer.bias.untyped_storage().data_ptr() == stack.bias_N.untyped_storage().data_ptr()
    assert model.state_dict().keys() == ternary.state_dict().keys()


def test_casting_keeps_layers_and_stacks_together(ternary):
    model = fuse(prepared(ternary, "native", torch.float32))
    expected = prepared(ternary, "native", torch.bfloat16)(**inputs(torch.bfloat16))[0]
    model = model.to(torch.bfloat16)
    qkv = model.single_transformer_blocks[0].qkv
    assert qkv.bias_N.dtype == torch.bfloat16
    assert qkv.scale_N.dtype == torch.float32
    assert relative_error(model(**inputs(torch.bfloat16))[0], expected) < 3e-2


def test_blocks_compile_as_one_graph(ternary):
    model = fuse(prepared(ternary, "int8", torch.float32))
    (expected,) = model(**inputs(torch.float32))
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative_error(model(**inputs(torch.float32))[0], expected) < 5e-3


def test_full_precision_layers_are_refused(ternary):
    model = FluxTransformer2DModel.from_config(ternary.config)
    with pytest.raises(ValueError, match="all ternary"):
        fuse(model)


def test_mixed_activations_are_refused(ternary):
    model = copy.deepcopy(ternary)
    model.transformer_blocks[0].ff.net[2].activations = "int8"
    with pytest.raises(ValueError, match=r"differ \(int8, native\)"):
        fuse(model)


def test_attention_arguments_are_refused(ternary):
    model = fuse(prepared(ternary, "native", torch.float32))
    with pytest.raises(ValueError, match="ip_adapter_image_embeds"):
        model(**inputs(torch.float32), joint_attention_kwargs={"ip_adapter_image_embeds": []})


@pytest.mark.parametrize("pickled", [pickle.dumps, lambda model: torch.save(model, "/dev/null")])
def test_pickling_is_refused_with_the_remedy(ternary, pickled):
    model = fuse(prepared(ternary, "native", torch.float32))
    with pytest.raises(TypeError, match=r"cannot be pickled: pickle the one that fuse\(\) takes"):
        pickled(model)


def test_a_deep_copy_has_stacks_of_its_own(ternary):
    model = fuse(prepared(ternary, "native", torch.float32))
    (expected,) = model(**inputs(torch.float32))
    other = copy.deepcopy(model)
    layer, stack = other.single_transformer_blocks[1].attn.to_v, other.single_transformer_blocks[1].qkv
    assert layer.packed.untyped_storage().data_ptr() == stack.packed_NJ.untyped_storage().data_ptr()
    assert torch.equal(other(**inputs(torch.float32))[0], expected)
    for buffer in other.buffers():
        buffer.zero_()
    assert not torch.equal(other(**inputs(torch.float32))[0], expected)
    assert torch.equal(model(**inputs(torch.float32))[0], expected)


def test_a_deep_copy_makes_cuda_graphs_of_itself(ternary):
    model = fuse(prepared(ternary, "native", torch.float32))
    model._graphs._graphs["a shape"] = threading.Lock()  # like a captured graph, it cannot be copied
    other = copy.deepcopy(model)
    assert not other._graphs._graphs
    assert other._graphs._function.__self__ is other


def test_a_deep_copy_saves_itself(ternary_dir, tmp_path):
    model = fuse(load_ternary(ternary_dir, dtype=torch.float32, device="cpu"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.x_embedder.weight.add_(1)
    other.register_to_config(_name_or_path="the copy")
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_name_or_path"] == "the copy"
    saved = load_ternary(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(saved.x_embedder.weight, other.x_embedder.weight)
    assert not torch.equal(saved.x_embedder.weight, model.x_embedder.weight)


def test_dequantizing_is_refused_with_the_remedy(ternary_dir):
    model = fuse(load_ternary(ternary_dir, dtype=torch.float32, device="cpu"))
    with pytest.raises(ValueError, match=r"load it again and call dequantize\(\) before fuse\(\)"):
        model.dequantize()


def test_fused_it_does_not_keep_the_transformer_that_it_took_over(ternary_dir, tmp_path):
    transformer = load_ternary(ternary_dir, dtype=torch.float32, device="cpu")
    reference = weakref.ref(transformer)
    model = fuse(transformer)
    del transformer
    gc.collect()
    assert reference() is None
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
