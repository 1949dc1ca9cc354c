import pytest
import torch

from kernels import dispatch, reference
from kernels.packing import pack_planes


@pytest.mark.parametrize(
    ("activations", "function"), [("native", reference.ternary_linear), ("int8", reference.ternary_linear_int8)]
)
def test_activations_choose_the_arithmetic(activations, function):
    generator = torch.Generator().manual_seed(0)
    packed_NJ = pack_planes(torch.randint(-1, 2, (6, 20), generator=generator, dtype=torch.int8))
    scale_N, bias_N = torch.rand(6, generator=generator), torch.randn(6, generator=generator)
    x_MK = torch.randn(3, 20, generator=generator)
    expected_MN = function(x_MK, packed_NJ, scale_N, bias_N, 20)
    assert torch.equal(dispatch.linear(x_MK, packed_NJ, scale_N, bias_N, 20, activations), expected_MN)


def test_backend_is_named_for_the_results():
    assert dispatch.backend_name("cpu") == "torch-reference (cpu)"
