"""Unpacks a whole ternary weight, for products by the vendor's library.

Legend: N output features, K input features, J packed bytes a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packing import PLANES

_BLOCK = 1024


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, width, in_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + row * width + offs_j, offs_j < width, other=0)
    for plane in tl.static_range(4):
        codes = ((packed >> (2 * plane)) & 3).to(tl.float32) - 1
        offs_k = plane * width + offs_j
        codes = codes.to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * in_features + offs_k, codes, (offs_j < width) & (offs_k < in_features))


def unpack(packed_NJ: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The codes -1, 0, 1 as [N, K] in `dtype`: int8, float8_e4m3fn, bfloat16 or float16."""
    packed_NJ = packed_NJ.contiguous()
    rows, width = packed_NJ.shape
    assert -(-in_features // PLANES) == width
    codes_NK = packed_NJ.new_empty(rows, in_features, dtype=dtype)
    unpack_kernel[(rows, triton.cdiv(width, _BLOCK))](packed_NJ, codes_NK, width, in_features, BLOCK=_BLOCK)
    return codes_NK
