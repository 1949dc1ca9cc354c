"""Ternary matrix product by tiles, on any GPU: a persistent grid, operands through tensor descriptors or pointers.

The weights are the first operand of the tensor cores' product, since that one may come from registers, where they are
decoded; the tokens are the second, so a tile of the result is [features, tokens] and is turned round when stored.
"""

import triton
import triton.language as tl

from kernels._gemm_parts import decode, halves, store_tile, tile_origin


@triton.jit
def gemm_tile(
    x_source,  # a descriptor of [4, M, P / 4] in blocks [1, BM, BJ], or a pointer to [M, P]
    packed_source,  # a descriptor of [N, P / 4] in blocks [BN, BJ], or a pointer to it
    y_ptr,
    token_scale_ptr,
    token_sum_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    tokens,
    features,
    plane_width,
    tokens_an_image,
    residual_stride,
    x_stride,
    packed_stride,
    ONE_IMAGE: tl.constexpr,
    DIGITS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """Descriptors copy blocks by hardware from compute capability 9.0 on; before it, pointers are the faster way."""
    DTYPE: tl.constexpr = x_source.dtype if DESCRIPTORS else x_source.dtype.element_ty
    ACC: tl.constexpr = tl.int32 if DTYPE.is_int8() else tl.float32
    PART: tl.constexpr = BM // SUBTILES
    tiles_m = tl.cdiv(tokens, BM)
    tiles_n = tl.cdiv(features, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        block_m, block_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        start_m = block_m * BM
        start_n = block_n * BN
        acc = tl.zeros((BN, BM), ACC)
        offs_j = tl.arange(0, BJ)
        # Rows beyond the last are read as copies of row 0: they make results that are not stored.
        rows_m = tl.where(start_m + tl.arange(0, BM) < tokens, start_m + tl.arange(0, BM), 0).to(tl.int64)[:, None]
        rows_n = tl.where(start_n + tl.arange(0, BN) < features, start_n + tl.arange(0, BN), 0).to(tl.int64)[:, None]
        # Zeros are read beyond a plane's end: the tokens' zeros cancel whatever the weights' bytes decode to.
        for start_j in tl.range(0, plane_width, BJ, num_stages=STAGES):
            mask = (start_j + offs_j < plane_width)[None, :]
            columns = (start_j + offs_j)[None, :]
            if DESCRIPTORS:
                packed = packed_source.load([start_n, start_j])
            else:
                packed = tl.load(packed_source + rows_n * packed_stride + columns, mask, other=0)
            for plane in tl.static_range(4):
                if DESCRIPTORS:
                    x = x_source.load([plane, start_m, start_j]).reshape(BM, BJ)
                else:
                    x = tl.load(x_source + rows_m * x_stride + (plane * plane_width + columns), mask, other=0)
                if not ASSEMBLY and not DTYPE.is_int8():
                    x = x.to(tl.float32)
                acc = tl.dot(decode(packed, plane, DTYPE, ASSEMBLY), x.T, acc, out_dtype=ACC)
        if SUBTILES == 1:
            parts = (acc,)
        elif SUBTILES == 2:
            parts = halves(acc)
        else:
            first, second = halves(acc)
            parts = halves(first) + halves(second)
        for part in tl.static_range(SUBTILES):
            store_tile(
                parts[part],
                y_ptr,
                token_scale_ptr,
                token_sum_ptr,
                scale_ptr,
                bias_ptr,
                gate_ptr,
                residual_ptr,
                start_m + part * PART,
                start_n,
                tokens,
                features,
                tokens_an_image,
                residual_stride,
                ONE_IMAGE,
                DIGITS,
            )
