import pytest
import torch
from torch import nn

from bitflux_core.linear import TernaryLinear
from bitflux_core.ternary import least_squares
from kernels import dispatch, reference


@pytest.fixture
def dense() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(22, 10)


@pytest.fixture
def layer(dense) -> TernaryLinear:
    return TernaryLinear.from_ternary(least_squares(dense.weight.detach()), dense.bias)


def test_it_computes_with_the_ternary_weight(dense, layer):
    x = torch.randn(2, 3, 22)
    weight_NK = least_squares(dense.weight.detach()).dequantize()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight_NK, dense.bias))
    assert torch.equal(layer.dequantize(), weight_NK)


def test_it_has_buffers_and_no_parameters(layer):
    assert not list(layer.parameters())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()} == {
        "packed": (torch.uint8, (10, 6)),
        "scale": (torch.float32, (10,)),
        "bias": (torch.float32, (10,)),
    }


def test_without_bias(dense):
    layer = TernaryLinear.from_ternary(least_squares(dense.weight.detach()), None)
    assert layer.bias is None
    assert layer(torch.randn(4, 22)).shape == (4, 10)


def test_casting_the_module_keeps_the_scales_to_the_bit(layer):
    scale_N = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scale, scale_N)
    assert layer.half().to("meta").scale.device.type == "meta"


def test_int8_activations_differ_a_little(layer):
    x = torch.randn(8, 22)
    native = layer(x)
    layer.activations = "int8"
    assert not torch.equal(layer(x), native)
    torch.testing.assert_close(layer(x), native, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("activations", ["native", "int8"])
def test_reference_execution_passes_the_dispatch_by(layer, activations, monkeypatch):
    x = torch.randn(3, 22)
    monkeypatch.setattr(dispatch, "linear", lambda *_: "the dispatched kernel")
    layer.activations = activations
    assert layer(x) == "the dispatched kernel"
    layer.execution = "reference"
    expected = reference.LINEARS[activations](x, layer.packed, layer.scale, layer.bias, 22)
    assert torch.equal(layer(x), expected)
