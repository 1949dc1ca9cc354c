"""Random models of the benchmark, the small GPU's cases, and the count of what is copied to a device."""

import pytest
import torch

from bitflux_core.accounting import resident_bytes, size_report
from bitflux_core.benchmark.images import MODEL_OFFLOAD, RESIDENT, SEQUENTIAL_OFFLOAD, measure_small_gpu
from bitflux_core.benchmark.models import FLUX_DEV, TINY, random_transformer, step_inputs
from bitflux_core.benchmark.rows import GB
from bitflux_core.benchmark.traffic import HostToDevice
from bitflux_core.checkpoint import empty_transformer
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from kernels.packing import check_packed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("variant", ["bf16", "ternary", "ternary-int8", "ternary-reference"])
@torch.no_grad()
def test_a_random_transformer_is_whole_and_computes(variant):
    torch.manual_seed(0)
    transformer = random_transformer(variant, TINY, CPU)
    sizes = size_report(transformer, "planes")
    assert resident_bytes(transformer) == (sizes.bf16_bytes if variant == "bf16" else sizes.storage_bytes)
    for name, layer in block_linears(transformer).items():
        assert isinstance(layer, TernaryLinear) == (variant != "bf16")
        if isinstance(layer, TernaryLinear):
            check_packed(layer.packed, name)
            assert layer.dequantize().std() == pytest.approx(0.02, rel=0.3)
    output = transformer(**step_inputs(TINY, batch=2, resolution=64, device=CPU), return_dict=False)[0]
    assert output.shape == (2, 16, 64)
    assert output.isfinite().all()
    assert output.std() > 0


def test_the_full_size_is_flux_dev():
    assert size_report(empty_transformer(FLUX_DEV.transformer)).total_params == 11_901_408_320


def test_the_small_gpus_cases_are_told_apart():
    rows = list(measure_small_gpu(("bf16", "ternary"), TINY, CPU, (1,), 64))
    assert [(row.mode, row.placement) for row in rows] == [
        ("ternary", RESIDENT),
        ("bf16", RESIDENT),
        ("bf16", MODEL_OFFLOAD),
        ("bf16", SEQUENTIAL_OFFLOAD),
    ]
    ternary, full, *offloaded = rows
    for row in (ternary, full):
        assert row.error is None
        assert row.image_s > 0
        assert row.host_to_device_gb == 0
        assert row.memory_cap_gb == 24
    for row in offloaded:  # diffusers offloads to accelerators only
        assert row.image_s is None
        assert row.error


def test_traffic_counts_what_leaves_the_host():
    weight, input_ = torch.zeros(100), torch.zeros(7, dtype=torch.int8)
    with HostToDevice() as counter:
        torch.nn.Linear(3, 4).to("meta")
        weight.to("meta")
        torch.empty(7, dtype=torch.int8, device="meta").copy_(input_)
        weight.to(torch.float64)
        weight.clone()
    assert counter.bytes == 4 * (3 * 4 + 4) + 400 + 7
    assert counter.bytes < GB
