import itertools

import pytest
import torch

from kernels.packing import (
    check_packed,
    check_trits,
    codes_bytes,
    pack_planes,
    pack_trits,
    packed_width,
    unpack_planes,
    unpack_trits,
)


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3), (5, 4), (4, 5), (7, 9), (16, 256), (3, 1023)])
def test_unpacking_gives_the_codes_back(shape):
    codes_NK = random_codes(*shape)
    packed_NJ = pack_planes(codes_NK)
    assert packed_NJ.dtype == torch.uint8
    assert packed_NJ.shape == (shape[0], packed_width(shape[1]))
    assert torch.equal(unpack_planes(packed_NJ, shape[1]), codes_NK)


def test_byte_j_holds_the_codes_of_the_four_planes_low_bits_first():
    codes_NK = random_codes(3, 24, seed=1)
    packed_NJ = pack_planes(codes_NK)
    for n, j in itertools.product(range(3), range(6)):
        expected = sum((int(codes_NK[n, j + 6 * plane]) + 1) << (2 * plane) for plane in range(4))
        assert int(packed_NJ[n, j]) == expected


def test_ragged_rows_are_padded_with_code_zero():
    packed_NJ = pack_planes(torch.tensor([[1, -1, 1, -1, 1]], dtype=torch.int8))
    assert unpack_planes(packed_NJ, 8).tolist() == [[1, -1, 1, -1, 1, 0, 0, 0]]


@pytest.mark.parametrize("stray", [-2, 2, 127])
def test_packing_refuses_other_values(stray):
    codes_NK = random_codes(2, 8)
    codes_NK[1, 3] = stray
    with pytest.raises(ValueError, match="-1, 0 or \\+1"):
        pack_planes(codes_NK)


def test_check_accepts_every_byte_of_three_valued_codes():
    valid = [a + 4 * b + 16 * c + 64 * d for a, b, c, d in itertools.product(range(3), repeat=4)]
    check_packed(torch.tensor([valid], dtype=torch.uint8), "weight")


@pytest.mark.parametrize("plane", range(4))
def test_check_finds_a_three_in_every_plane(plane):
    packed_NJ = pack_planes(random_codes(4, 32))
    packed_NJ[2, 5] |= 3 << (2 * plane)
    with pytest.raises(ValueError, match=r"block\.packed holds the code value 3 \(row 2, byte 5\)"):
        check_packed(packed_NJ, "block.packed")


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 7), (5, 130), (16, 256), (2, 400_001)])
def test_trits_give_the_planes_back(shape):
    packed_NJ = pack_planes(random_codes(*shape))
    trits_L = pack_trits(packed_NJ)
    check_trits(trits_L, "x")
    assert (trits_L.dtype, trits_L.nbytes) == (torch.uint8, codes_bytes("trits", *shape))
    assert torch.equal(unpack_trits(trits_L, *shape), packed_NJ)


def test_a_trit_byte_is_five_codes_to_the_base_three():
    planes = torch.tensor([[0b10010000, 0b00000110, 0b01010101, 0b10101010, 0b00011011 & 0b00011010]]).to(torch.uint8)
    codes = [(byte >> shift) & 3 for byte in planes[0].tolist() for shift in (0, 2, 4, 6)]
    expected = [sum(code * 3**place for place, code in enumerate(codes[i : i + 5])) for i in range(0, 20, 5)]
    assert pack_trits(planes).tolist() == expected


def test_trits_are_a_fifth_smaller_than_planes():
    assert codes_bytes("trits", 3072, 3072) == pytest.approx(0.8 * codes_bytes("planes", 3072, 3072), abs=4)


def test_check_finds_a_byte_that_is_no_trits():
    trits_L = torch.full((8,), 242, dtype=torch.uint8)
    check_trits(trits_L, "proj.packed")
    trits_L[5] = 243
    with pytest.raises(ValueError, match=r"proj\.packed holds the byte 243 \(byte 5\)"):
        check_trits(trits_L, "proj.packed")
