import itertools

import pytest
import torch

from kernels.packing import check_packed, pack_planes, packed_width, unpack_planes


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
