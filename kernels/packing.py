"""Layouts of ternary codes: 2-bit planes, which the kernels read, and trits, five codes a byte, for files.

Legend: N output features, K input features, J = ceil(K / 4) bytes a row.
Byte j of a row holds the codes of k = j, j + J, j + 2J, j + 3J in bits 0-1, 2-3, 4-5, 6-7 (the four "planes"), so that
one shift and one AND decode a contiguous run of k. A code in {-1, 0, +1} is stored as code + 1; 3 never occurs.
Where K is no multiple of 4 the rows are padded with code 0.

Trits: the bytes of the planes, padded with code 0 to five equal runs of G, make G groups of a byte of each run. The 20
codes of a group, in that order and from the lowest bits up, are four trit bytes, c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 of
five codes each plus 1; 243 and above never occur. The first two bytes of all groups come first, then the last two, so
that a table of byte pairs and shifts of whole runs decode them.
"""

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Codes = Literal["planes", "trits"]

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


CODES_A_TRIT_BYTE = 5
_RUNS, _GROUP_TRITS = 5, 4  # bytes of the same 20 codes
_PAIR_BITS = 2 * 2 * CODES_A_TRIT_BYTE
_LARGEST_TRIT = 3**CODES_A_TRIT_BYTE - 1
_ZEROS = 0b01010101  # four codes 0


def trits_length(rows: int, in_features: int) -> int:
    """L, the bytes of the trits of codes [rows, in_features]."""
    return _GROUP_TRITS * -(-rows * packed_width(in_features) // _RUNS)


def codes_bytes(codes: Codes, rows: int, in_features: int) -> int:
    """Bytes of codes [rows, in_features] in this layout."""
    return trits_length(rows, in_features) if codes == "trits" else rows * packed_width(in_features)


def pack_trits(packed_NJ: Tensor) -> Tensor:
    """The planes uint8 [N, J] as trits uint8 [L]; lossless. No code may be 3, see `check_packed`."""
    flat = packed_NJ.flatten()
    runs_5G = F.pad(flat, (0, -len(flat) % _RUNS), value=_ZEROS).view(_RUNS, -1)
    pairs_2G = torch.empty(2, runs_5G.shape[1], dtype=torch.int16, device=flat.device)
    table = _trits_of_bits(flat.device)
    size = _chunk(flat.device)
    for runs, out in zip(runs_5G.split(size, dim=1), pairs_2G.split(size, dim=1), strict=True):
        b0, b1, b2, b3, b4 = runs.int()
        out[0] = table.index_select(0, b0 | (b1 << 8) | ((b2 & 15) << 16))
        out[1] = table.index_select(0, (b2 >> 4) | (b3 << 4) | (b4 << 12))
    return pairs_2G.flatten().view(torch.uint8)


def unpack_trits(trits_L: Tensor, rows: int, in_features: int) -> Tensor:
    """The planes uint8 [rows, J] of `pack_trits`' result, on its device; see `check_trits` for foreign bytes."""
    width = packed_width(in_features)
    pairs_2G = trits_L.view(torch.uint16).view(2, -1)
    runs_5G = trits_L.new_empty(_RUNS, pairs_2G.shape[1])
    table = _bits_of_trits(trits_L.device)
    size = _chunk(trits_L.device)
    for pairs, out in zip(pairs_2G.split(size, dim=1), runs_5G.split(size, dim=1), strict=True):
        low, high = (table.index_select(0, pair.int()) for pair in pairs)  # 20 bits each
        out[0] = low
        out[1] = low >> 8
        out[2] = (low >> 16) | (high << 4)
        out[3] = high >> 4
        out[4] = high >> 12
    return runs_5G.flatten()[: rows * width].view(rows, width)


def check_trits(trits_L: Tensor, name: str) -> None:
    """ValueError if a byte of `trits_L` (called `name` in the message) is above 242."""
    if trits_L.numel() and trits_L.max() > _LARGEST_TRIT:
        index = int((trits_L > _LARGEST_TRIT).nonzero()[0])
        raise ValueError(f"{name} holds the byte {int(trits_L[index])} (byte {index}), which is no five ternary codes")


def _chunk(device: torch.device) -> int:
    """Groups that are worked on at a time: what a core's cache holds, or enough for a whole GPU."""
    return 1 << (16 if device.type == "cpu" else 24)


@functools.cache
def _bits_of_trits(device: torch.device) -> Tensor:
    """int32 [65536]: the ten codes, two bits each, of two trit bytes read as one little-endian number."""
    trits = torch.arange(256, dtype=torch.int32, device=device)
    codes = [trits // 3**place % 3 << 2 * place for place in range(CODES_A_TRIT_BYTE)]
    bits = torch.stack(codes).sum(dim=0, dtype=torch.int32)
    return (bits[None, :] | (bits[:, None] << (_PAIR_BITS // 2))).flatten()


@functools.cache
def _trits_of_bits(device: torch.device) -> Tensor:
    """int16 [2^20]: the inverse of `_bits_of_trits`; what has a code 3 in it gives a wrong byte."""
    bits = torch.arange(1 << (_PAIR_BITS // 2), dtype=torch.int32, device=device)
    codes = [(bits >> 2 * place & 3) * 3**place for place in range(CODES_A_TRIT_BYTE)]
    trits = torch.stack(codes).sum(dim=0, dtype=torch.int32) & 255
    return (trits[None, :] | (trits[:, None] << 8)).flatten().to(torch.int16)
