"""FLUX.1-dev on the meta device: which layers are ternary, and what that saves."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bitflux_core.accounting import size_report
from bitflux_core.layers import block_linears

DIM, MLP = 3072, 12288
DOUBLE_BLOCK = {  # name: (in, out)
    "norm1.linear": (DIM, 6 * DIM),
    "norm1_context.linear": (DIM, 6 * DIM),
    "attn.to_q": (DIM, DIM),
    "attn.to_k": (DIM, DIM),
    "attn.to_v": (DIM, DIM),
    "attn.to_out.0": (DIM, DIM),
    "attn.add_q_proj": (DIM, DIM),
    "attn.add_k_proj": (DIM, DIM),
    "attn.add_v_proj": (DIM, DIM),
    "attn.to_add_out": (DIM, DIM),
    "ff.net.0.proj": (DIM, MLP),
    "ff.net.2": (MLP, DIM),
    "ff_context.net.0.proj": (DIM, MLP),
    "ff_context.net.2": (MLP, DIM),
}
SINGLE_BLOCK = {
    "norm.linear": (DIM, 3 * DIM),
    "proj_mlp": (DIM, MLP),
    "proj_out": (DIM + MLP, DIM),
    "attn.to_q": (DIM, DIM),
    "attn.to_k": (DIM, DIM),
    "attn.to_v": (DIM, DIM),
}


@pytest.fixture(scope="module")
def flux_dev() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def test_the_ternary_layers_are_exactly_the_blocks_linears(flux_dev):
    expected = {
        f"{blocks}.{index}.{name}": shape
        for blocks, count, layers in [
            ("transformer_blocks", 19, DOUBLE_BLOCK),
            ("single_transformer_blocks", 38, SINGLE_BLOCK),
        ]
        for index in range(count)
        for name, shape in layers.items()
    }
    found = {name: (layer.in_features, layer.out_features) for name, layer in block_linears(flux_dev).items()}
    assert found == expected
    assert len(found) == 19 * 14 + 38 * 6 == 494
    outside = {name for name, module in flux_dev.named_modules() if isinstance(module, torch.nn.Linear)} - set(found)
    assert all("blocks" not in name for name in outside)
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} < outside


def test_share_of_the_parameters(flux_dev):
    report = size_report(flux_dev)
    assert report.total_params == sum(parameter.numel() for parameter in flux_dev.parameters()) == 11_901_408_320
    assert report.ternary_params == 11_834_228_736
    assert f"{report.ternary_share:.2%}" == "99.44%"


def test_bytes(flux_dev):
    report = size_report(flux_dev, "planes")
    assert report.bf16_bytes == 2 * 11_901_408_320
    assert report.code_bytes == 11_834_228_736 // 4
    assert report.scale_bytes == 4 * (19 * (14 * DIM + 2 * 5 * DIM + 2 * 3 * DIM) + 38 * (3 + 4 + 1 + 3) * DIM)
    assert report.rest_bytes == 2 * (11_901_408_320 - 11_834_228_736)
    assert report.storage_bytes == report.code_bytes + report.scale_bytes + report.rest_bytes
    assert f"{report.bf16_bytes / 1e9:.1f} {report.storage_bytes / 1e9:.1f} {report.ratio:.1f}" == "23.8 3.1 7.7"


def test_bytes_of_a_checkpoint(flux_dev):
    report = size_report(flux_dev)
    assert 0 <= report.code_bytes - 11_834_228_736 / 5 < 4 * 494  # whole groups of four bytes a layer
    assert report.ratio >= 9.4
    assert f"{report.storage_bytes / 1e9:.2f} {report.ratio:.2f}" == "2.51 9.47"
