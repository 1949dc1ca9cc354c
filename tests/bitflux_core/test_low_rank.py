"""Low-rank corrections: the best of their rank, counted, saved and loaded alike, and drawn alike by every path."""

import json
import os
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from bitflux_core.accounting import size_report
from bitflux_core.checkpoint import load_ternary, save_ternary, stored_size
from bitflux_core.convert import quantize_transformer, replace_linear
from bitflux_core.errors import UserError
from bitflux_core.fused import fuse
from bitflux_core.layers import block_linears, check_rank
from bitflux_core.linear import TernaryLinear
from bitflux_core.loading import storage_bytes
from bitflux_core.low_rank import best_low_rank
from bitflux_core.ternary import least_squares
from kernels import ops
from kernels.reference import Quantized

RANK = 4
WIDTH, IN_CHANNELS, TEXT_WIDTH, POOLED = 32, 16, 24, 20


def corrected(linear: nn.Linear, rank: int = RANK) -> TernaryLinear:
    ternary = least_squares(linear.weight.detach())
    residual_NK = linear.weight.detach() - ternary.dequantize()
    return TernaryLinear.from_ternary(replace(ternary, correction=best_low_rank(residual_NK, rank)), linear.bias)


@pytest.fixture(scope="module")
def dense() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=IN_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide that they are dropped
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model(dense) -> FluxTransformer2DModel:
    """The ternary transformer with corrections, in float32."""
    made = FluxTransformer2DModel.from_config(dense.config).eval().requires_grad_(False)
    made.load_state_dict(dense.state_dict())
    for name, linear in block_linears(made).items():
        made.set_submodule(name, corrected(linear))
    return made


def inputs(dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(2, 6, IN_CHANNELS),
        "encoder_hidden_states": normal(2, 5, TEXT_WIDTH),
        "pooled_projections": normal(2, POOLED),
        "timestep": torch.tensor([0.3, 0.8], dtype=dtype),  # two images, so that a mix-up of their gates shows
        "guidance": torch.tensor([3.5, 2.0], dtype=dtype),
        "img_ids": torch.arange(18, dtype=dtype).view(6, 3),
        "txt_ids": torch.zeros(5, 3, dtype=dtype),
        "return_dict": False,
    }


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(one, other) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_the_correction_is_the_truncated_singular_value_decomposition(shape):
    generator = torch.Generator().manual_seed(0)
    residual_NK = torch.randn(shape, generator=generator)
    left, values, right = torch.linalg.svd(residual_NK, full_matrices=False)
    best_NK = left[:, :RANK] * values[:RANK] @ right[:RANK]
    low_rank = best_low_rank(residual_NK, RANK)
    assert relative_error(low_rank.product(), best_NK) < 0.01
    assert all(torch.equal(thin, thin.bfloat16().float()) for thin in low_rank)
    assert torch.linalg.matrix_rank(low_rank.product()) == RANK


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_no_other_correction_of_the_rank_serves_the_inputs_better(shape):
    generator = torch.Generator().manual_seed(0)
    columns = shape[1]
    residual_NK = torch.randn(shape, generator=generator)
    x_MK = torch.randn(500, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    factor_KK = torch.linalg.cholesky(x_MK.T @ x_MK / len(x_MK))

    def left(rank: int, factor=factor_KK) -> float:
        low_rank = best_low_rank(residual_NK, rank, factor)
        return relative_error(low_rank.of(x_MK), x_MK @ residual_NK.T)

    values = torch.linalg.svdvals(residual_NK @ factor_KK)
    bound = (values[RANK:].square().sum() / values.square().sum()).sqrt().item()
    assert left(RANK) == pytest.approx(bound, rel=1e-3)
    assert left(RANK) < 0.9 * left(RANK, None)
    errors = [left(rank) for rank in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert left(min(shape)) < 0.01  # what bfloat16 rounds


def test_a_residual_of_nothing_needs_no_correction():
    low_rank = best_low_rank(torch.zeros(6, 8), 2)
    assert not low_rank.product().abs().max() > 1e-6


def test_the_layer_computes_with_the_corrected_weight():
    torch.manual_seed(0)
    linear = nn.Linear(22, 10).requires_grad_(False)
    layer, plain = corrected(linear), corrected(linear, rank=10)
    x = torch.randn(2, 3, 22)
    for execution in ("kernel", "reference"):
        layer.execution = execution
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T + linear.bias)
    assert relative_error(plain(x), linear(x)) < 0.01  # full rank
    native = layer(x)
    layer.activations = "int8"
    assert 0 < relative_error(layer(x), native) < 0.02
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_bytes_and_share_as_by_hand(model, dense):
    plain = size_report(dense)
    report = size_report(model)
    layers = block_linears(model).values()
    extra = sum(RANK * (layer.in_features + layer.out_features) for layer in layers)
    assert report.correction_bytes == 2 * extra
    assert report.storage_bytes == plain.storage_bytes + 2 * extra
    assert report.storage_bytes == (
        report.code_bytes + report.scale_bytes + report.correction_bytes + report.rest_bytes
    )
    assert report.bf16_bytes == plain.bf16_bytes  # of the model that it was made from
    assert report.total_params == plain.total_params + extra
    assert report.ternary_share == plain.ternary_params / (plain.total_params + extra)
    assert plain.correction_bytes == 0


@pytest.mark.parametrize("codes", ["planes", "trits"])
def test_what_was_saved_comes_back(model, tmp_path, codes):
    save_ternary(model, tmp_path / "made", {}, method="least_squares", codes=codes)
    loaded = load_ternary(tmp_path / "made", dtype=torch.bfloat16, device="cpu")
    assert_same(loaded, model.to(torch.bfloat16))
    assert loaded.single_transformer_blocks[0].proj_out.down.dtype == torch.bfloat16
    stored = sum(t.nbytes for file in (tmp_path / "made").glob("*.safetensors") for t in load_file(file).values())
    assert stored == size_report(loaded, codes).storage_bytes == stored_size(tmp_path / "made").storage_bytes
    assert stored == storage_bytes("ternary", pipeline_dir=tmp_path, ternary_dir=tmp_path / "made")
    assert f"correction of rank\n{RANK}" in (tmp_path / "made" / "README.md").read_text()
    diffusers = FluxTransformer2DModel.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    assert_same(diffusers, loaded)
    diffusers.save_pretrained(tmp_path / "again")
    assert_same(load_ternary(tmp_path / "again", dtype=torch.bfloat16, device="cpu"), loaded)
    assert f"correction of rank\n{RANK}" in (tmp_path / "again" / "README.md").read_text()


def test_a_checkpoint_without_corrections_says_nothing_of_them(dense, tmp_path):
    made = FluxTransformer2DModel.from_config(dense.config)
    quantize_transformer(made)
    save_ternary(made, tmp_path / "made", {}, method="least_squares")
    assert "low_rank" not in (tmp_path / "made" / "config.json").read_text()
    assert "correction" not in (tmp_path / "made" / "README.md").read_text()
    assert not any(name.endswith((".up", ".down")) for name in made.state_dict())


@pytest.mark.parametrize(("rank", "problem"), [(-1, "low_rank of -1"), ("two", "low_rank of 'two'"), (3, "shape")])
def test_a_rank_that_is_not_the_files_is_refused(model, tmp_path, rank, problem):
    save_ternary(model, tmp_path / "made", {}, method="least_squares")
    file = tmp_path / "made" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["low_rank"] = rank
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=problem):
        load_ternary(tmp_path / "made", dtype=torch.bfloat16, device="cpu")
    with pytest.raises(ValueError, match=r"low_rank|shape"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "made")


def test_corrections_of_several_ranks_are_not_saved(model, dense, tmp_path):
    name = "single_transformer_blocks.0.proj_out"
    replace_linear(model, name, least_squares(dense.get_parameter(f"{name}.weight")))
    with pytest.raises(ValueError, match=r"ranks \[0, 4\]"):
        save_ternary(model, tmp_path / "made", {}, method="least_squares")


@pytest.mark.parametrize("rank", [-1, WIDTH + 1, 1000])
def test_a_rank_that_a_layer_cannot_have_is_named(dense, rank):
    with pytest.raises(UserError, match=rf"low rank {rank}: take 1 to {WIDTH}, the full rank of transformer_blocks.0"):
        check_rank(dense, rank)
    check_rank(dense, WIDTH)


# int8 values may round the other way where float32 sums differ in their last bits.
@pytest.mark.parametrize(
    ("activations", "dtype", "tolerance"),
    [("native", torch.float32, 1e-5), ("int8", torch.float32, 5e-3), ("native", torch.bfloat16, 3e-2)],
)
def test_fused_blocks_compute_what_the_single_layers_do(model, activations, dtype, tolerance):
    for layer in block_linears(model).values():
        layer.activations = activations
    (expected,) = model.to(dtype)(**inputs(dtype))
    for layer in block_linears(model).values():
        layer.execution = "reference"
    assert torch.equal(model(**inputs(dtype))[0], expected)  # without a GPU both are the same
    fused = fuse(model)
    assert relative_error(fused(**inputs(dtype))[0], expected) < tolerance
    fused = fused.to(torch.bfloat16)  # stacked anew
    qkv, to_v = fused.single_transformer_blocks[0].qkv, fused.single_transformer_blocks[0].attn.to_v
    assert qkv.correction.down_RK.dtype == torch.bfloat16
    assert qkv.correction.down_RK.untyped_storage().data_ptr() == to_v.down.untyped_storage().data_ptr()


def test_corrections_bring_the_image_nearer(model, dense):
    plain = FluxTransformer2DModel.from_config(dense.config).eval().requires_grad_(False)
    plain.load_state_dict(dense.state_dict())
    quantize_transformer(plain)
    given = inputs(torch.float32)
    (expected,) = dense(**given)
    fused = relative_error(fuse(model)(**given)[0], expected)
    assert fused < 0.9 * relative_error(fuse(plain)(**given)[0], expected)


def test_some_layers_with_corrections_cannot_share_a_product(model):
    layer = model.single_transformer_blocks[0].attn.to_k
    layer.down = layer.up = None
    with pytest.raises(ValueError, match="corrections of one rank"):
        fuse(model)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is chosen by tests/kernels")
@pytest.mark.parametrize(("activations", "dtype"), [("int8", torch.float32), ("native", torch.bfloat16)])
def test_triton_kernels_draw_what_the_reference_draws(model, monkeypatch, activations, dtype):
    from kernels import cuda
    from kernels.gemm import GemmConfig

    tile = GemmConfig(block_n=32, block_m=16, block_j=32, warps=4, stages=2)
    monkeypatch.setattr(cuda, "choose_config", lambda *_: tile)
    ran = set()

    def launched(name):
        function = getattr(cuda, name)

        def launch(*arguments):
            ran.add(name)
            if name == "matmul_int8":
                arguments = (Quantized(*arguments[:3]), *arguments[3:])
            if name == "qk_norm_rope":
                text_weights = None if arguments[5] is None else arguments[5:7]
                arguments = (*arguments[:3], arguments[3:5], text_weights, *arguments[7:])
            return function(*arguments)

        return launch

    for name in cuda.__all__:
        monkeypatch.setattr(ops, f"_{name}", launched(name))
    for layer in block_linears(model).values():
        layer.activations, layer.execution = activations, "reference"
    (expected,) = model.to(dtype)(**inputs(dtype))
    (y,) = fuse(model)(**inputs(dtype))
    assert relative_error(y, expected) < (5e-3 if dtype == torch.float32 else 3e-2)
    assert {"matmul_int8" if activations == "int8" else "matmul", "qk_norm_rope"} < ran
