"""The 2-bit planes layout of ternary codes, the one that the kernels read.

Legend: N output features, K input features, J = ceil(K / 4) bytes a row.
Byte j of a row holds the codes of k = j, j + J, j + 2J, j + 3J in bits 0-1, 2-3, 4-5, 6-7 (the four "planes"), so that
one shift and one AND decode a contiguous run of k. A code in {-1, 0, +1} is stored as code + 1; 3 never occurs.
Where K is no multiple of 4 the rows are padded with code 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PLANES = 4
_LOW_BITS = 0b01010101


def packed_width(in_features: int) -> int:
    """J, the bytes of a packed row of `in_features` codes."""
    return -(-in_features // PLANES)


def pack_planes(codes_NK: Tensor) -> Tensor:
    """int8 codes in {-1, 0, +1} [N, K] to uint8 [N, J]. ValueError for any other value: it would spill into others."""
    if codes_NK.numel() and (codes_NK.min() < -1 or codes_NK.max() > 1):
        raise ValueError("ternary codes must be -1, 0 or +1")
    rows, in_features = codes_NK.shape
    unsigned_NK = (codes_NK + 1).to(torch.uint8)
    padded_NK = F.pad(unsigned_NK, (0, -in_features % PLANES), value=1)
    first, second, third, fourth = padded_NK.view(rows, PLANES, -1).unbind(1)
    return first | (second << 2) | (third << 4) | (fourth << 6)


def unpack_planes(packed_NJ: Tensor, in_features: int) -> Tensor:
    """uint8 [N, J] to int8 codes in {-1, 0, +1} [N, K]; does not look for stray 3s, see `check_packed`."""
    planes_NK = torch.cat([packed_NJ, packed_NJ >> 2, packed_NJ >> 4, packed_NJ >> 6], dim=1).bitwise_and_(3)
    return planes_NK.view(torch.int8).sub_(1)[:, :in_features]


def check_packed(packed_NJ: Tensor, name: str) -> None:
    """ValueError if one of the 2-bit codes of `packed_NJ` (called `name` in the message) is 3."""
    threes_NJ = packed_NJ & (packed_NJ >> 1) & _LOW_BITS
    if threes_NJ.any():
        row, byte = (int(index) for index in threes_NJ.nonzero()[0])
        raise ValueError(f"{name} holds the code value 3 (row {row}, byte {byte}), which is no ternary code")
