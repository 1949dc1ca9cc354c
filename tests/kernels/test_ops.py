"""The operators' contract: what they refuse, and that torch.compile's view of them is that of their results."""

import pytest
import torch

from kernels import ops
from kernels.packing import pack_planes
from kernels.reference import Quantized

M, N, K = 6, 10, 40


def weight(features: int = N, in_features: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(features)
    codes_NK = torch.randint(-1, 2, (features, in_features), generator=generator, dtype=torch.int8)
    return pack_planes(codes_NK), torch.rand(features, generator=generator), torch.randn(features, generator=generator)


def activations(rows: int = M, columns: int = K) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_describe_the_results(dtype):
    packed_NJ, scale_N, bias_N = weight()
    x_MK, rows_BK = activations().to(dtype), activations(2).to(dtype)
    quantized, gate_BN, residual_MN = ops.quantize(x_MK), activations(2, N), activations(M, N).to(dtype)
    qkv_BSC, weights, rotary = activations(2 * 3, 32).view(2, 3, 32).to(dtype), torch.ones(4), torch.ones(8, 4)
    cases = {
        ops._quantize: (x_MK,),
        ops._norm_modulate: (x_MK, rows_BK, rows_BK, 1e-6),
        ops._norm_modulate_quantize: (x_MK, rows_BK, rows_BK, 1e-6),
        ops._gelu: (x_MK, x_MK[:, :8].contiguous()),
        ops._gelu_quantize: (x_MK, None),
        ops._matmul: (x_MK, packed_NJ, scale_N, bias_N, gate_BN, residual_MN, K),
        ops._matmul_int8: (*quantized, packed_NJ, scale_N, bias_N, None, None, K, dtype),
        ops._qk_norm_rope: (qkv_BSC, qkv_BSC.repeat(1, 2, 1)[:, :5], 4, *[weights] * 4, rotary, rotary, 1e-6),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_gate_and_residual():
    packed_NJ, scale_N, bias_N = weight()
    x_MK, gate_BN, residual_MN = activations(), activations(2, N), activations(M, N)
    plain_MN = ops.matmul(x_MK, packed_NJ, scale_N, bias_N)
    y_MN = ops.matmul(x_MK, packed_NJ, scale_N, bias_N, gate_BN=gate_BN, residual_MN=residual_MN)
    expected_MN = residual_MN + plain_MN * gate_BN.repeat_interleave(M // 2, dim=0)
    torch.testing.assert_close(y_MN, expected_MN)


def misfits():
    packed_NJ, scale_N, bias_N = weight()
    x_MK, q = activations(), ops.quantize(activations())
    int8 = {"in_features": K, "dtype": torch.float32}
    yield "packed is uint8", lambda: ops.matmul(x_MK[:, :36], packed_NJ, scale_N)
    yield "packed is int32", lambda: ops.matmul(x_MK, packed_NJ.int(), scale_N)
    yield "scale is float64", lambda: ops.matmul(x_MK, packed_NJ, scale_N.double())
    yield "bias is float32 \\[9\\]", lambda: ops.matmul(x_MK, packed_NJ, scale_N, bias_N[:9])
    yield "x is int64", lambda: ops.matmul(x_MK.long(), packed_NJ, scale_N)
    yield "gate is .* a divisor of 6", lambda: ops.matmul(x_MK, packed_NJ, scale_N, gate_BN=activations(4, N))
    yield "residual is", lambda: ops.matmul(x_MK, packed_NJ, scale_N, residual_MN=activations(M, N + 1))
    yield "scale is .* expected float32 \\[10\\] on cpu", lambda: ops.matmul(x_MK, packed_NJ, scale_N.to("meta"))
    yield "values is", lambda: ops.matmul_int8(q._replace(values_MP=q.values_MP[:, :40]), packed_NJ, scale_N, **int8)
    yield "token sum is", lambda: ops.matmul_int8(Quantized(*q[:2], q[1]), packed_NJ, scale_N, **int8)
    yield "shift is", lambda: ops.norm_modulate(x_MK, activations(4), activations(4), 1e-6)
    yield "scale is", lambda: ops.norm_modulate_quantize(x_MK, activations(2), activations(3), 1e-6)
    yield "head is", lambda: ops.gelu_quantize(x_MK, activations(M - 1))
    yield (
        "cos is",
        lambda: ops.qk_norm_rope(
            activations(6, 32).view(2, 3, 32), None, 4, (torch.ones(4),) * 2, None, (torch.ones(4, 4),) * 2, 1e-6
        ),
    )
    yield (
        "qkv is",
        lambda: ops.qk_norm_rope(
            activations(6, 31).view(2, 3, 31), None, 4, (torch.ones(4),) * 2, None, (torch.ones(3, 4),) * 2, 1e-6
        ),
    )


@pytest.mark.parametrize(("message", "call"), list(misfits()))
def test_misfits_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
