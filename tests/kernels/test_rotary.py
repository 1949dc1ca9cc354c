import pytest
import torch

from kernels import reference
from kernels.rotary import qk_norm_rope_triton

EPS = 1e-6
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5}
FLUX_HEADS = (24, 128)
# heads, head size, images, text tokens, image tokens, columns of a token beyond its queries, keys and values
CASES = [
    (*FLUX_HEADS, 1, 2, 3, 0),
    (*FLUX_HEADS, 2, None, 2, 12288),  # a single block's projection holds its MLP's columns too
    (2, 32, 2, 3, 5, 0),
    (5, 16, 1, None, 4, 8),
    (3, 256, 1, 1, 1, 0),
]


pytestmark = pytest.mark.usefixtures("filled_memory")


def inputs(heads, size, images, text_tokens, tokens, columns_beside, dtype):
    """Arguments of `qk_norm_rope`, every tensor from its own random numbers."""
    generator = torch.Generator().manual_seed(heads)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    columns = 3 * heads * size + columns_beside
    text_qkv = text_weights = None
    if text_tokens is not None:
        # Rows between others: neither the images nor the tokens of a view lie side by side.
        text_qkv = random(images, text_tokens + 1, columns + 8).to(dtype)[:, 1:, 8:]
        text_weights = (random(size).to(dtype), random(size).to(dtype))
    qkv = random(images, tokens, columns).to(dtype)
    weights = (random(size).to(dtype), random(size).to(dtype))
    angles = random((text_tokens or 0) + tokens, size // 2).repeat_interleave(2, dim=1)
    return qkv, text_qkv, heads, weights, text_weights, angles.cos(), angles.sin(), EPS


def copied(value, device):
    """The tensors of `value` on `device` with their strides, which Tensor.to drops there."""
    if isinstance(value, tuple):
        return tuple(copied(part, device) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_and_keys_are_the_references(case, dtype, device):
    arguments = inputs(*case, dtype)
    actual = qk_norm_rope_triton(*copied(arguments, device))
    for joined, expected in zip(actual, reference.qk_norm_rope(*arguments), strict=True):
        assert joined.is_contiguous()
        # A rotation subtracts products that may nearly cancel.
        torch.testing.assert_close(joined.cpu(), expected, rtol=TOLERANCES[dtype], atol=1e-5)


def test_only_queries_and_keys_are_read(device):
    arguments = inputs(2, 32, 1, 1, 2, 0, torch.bfloat16)
    arguments[0][..., 2 * 2 * 32 :] = torch.nan
    query_BSHD, key_BSHD = qk_norm_rope_triton(*copied(arguments, device))
    assert query_BSHD.isfinite().all()
    assert key_BSHD.isfinite().all()


def test_head_sizes_that_are_no_power_of_two_are_refused(device):
    arguments = inputs(2, 24, 1, None, 2, 0, torch.bfloat16)
    with pytest.raises(ValueError, match="heads of 24 columns"):
        qk_norm_rope_triton(*copied(arguments, device))
