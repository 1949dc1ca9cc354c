"""Joint attention by the fastest exact implementation that torch has for a device.

Legend: B images, S tokens, H heads, D head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# On Hopper cuDNN's kernels take about half of flash attention's time; each torch falls through to what a GPU supports.
_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}


def attention(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor) -> Tensor:
    """softmax(Q K' / sqrt(D)) V, [B, S, H D] in the inputs' dtype; rows may be strided views."""
    query, key, value = (x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD))
    if query.device.type != "cuda":
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    with sdpa_kernel(_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def attention_backend(query_BSHD: Tensor) -> str:
    """Name of the implementation that `attention` uses for queries, keys and values like these, for results."""
    if query_BSHD.device.type != "cuda":
        return "torch"
    x_BHSD = query_BSHD.transpose(1, 2)
    # Constructed from (query, key, value, mask, dropout, causal, grouped heads), as torch's own dispatch does.
    case = torch.backends.cuda.SDPAParams(x_BHSD, x_BHSD, x_BHSD, None, 0.0, False, False)
    usable = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }
    chosen = next((kind for kind in _ORDER if kind in usable and usable[kind](case)), SDPBackend.MATH)
    return _NAMES[chosen]
