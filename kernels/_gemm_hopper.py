"""Ternary matrix product for compute capability 9.0, written in Gluon, which leaves the waits to the kernel.

Plain Triton waits for every product of a decoded plane before it decodes the next. Here a plane is decoded while the
product with the plane before is under way, and the copies into shared memory run ahead across tiles, so that the next
tile's operands arrive while a tile is stored.

Legend: BN x BM a tile of the result (output features x tokens), BJ packed bytes of a row that a step reads; a "full"
barrier tells that the operands of a step arrived in its stage of shared memory.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels._gemm_parts import BFLOAT16, FLOAT16, INT8

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


_DTYPES = {torch.int8: gl.int8, torch.uint8: gl.uint8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def shared_layout(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied block of `dtype` lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])


@gluon.jit
def _decode(packed, PLANE: gl.constexpr, DTYPE: gl.constexpr):
    if DTYPE.is_int8():
        codes = gl.inline_asm_elementwise(INT8[PLANE], "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4)
    elif DTYPE.is_bf16():
        codes = gl.inline_asm_elementwise(BFLOAT16[PLANE], "=r,=r,r", [packed], dtype=gl.bfloat16, is_pure=True, pack=4)
    else:
        codes = gl.inline_asm_elementwise(FLOAT16[PLANE], "=r,=r,r", [packed], dtype=gl.float16, is_pure=True, pack=4)
    return codes


@gluon.jit
def _tile_start(tile, tokens, features, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First token and first feature of a tile, in the order of `tile_origin` in kernels/_gemm_parts.py."""
    tiles_m = gl.cdiv(tokens, BM)
    tiles_n = gl.cdiv(features, BN)
    first = tile // (GROUP * tiles_n) * GROUP
    rows = gl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return (first + inside % rows) * BM, inside // rows * BN


@gluon.jit
def _copy(x_desc, packed_desc, x_smem, packed_smem, full, stage, start_m, start_n, start_j, pred):
    """Begins to copy the operands of a step into their stage."""
    bar = full.index(stage)
    mbarrier.expect(bar, packed_desc.block_type.nbytes + x_desc.block_type.nbytes, pred)
    tma.async_copy_global_to_shared(packed_desc, [start_n, start_j], bar, packed_smem.index(stage), pred)
    tma.async_copy_global_to_shared(x_desc, [0, start_m, start_j], bar, x_smem.index(stage), pred)


@gluon.jit
def _next_step(
    tile,
    start_m,
    start_n,
    start_j,
    width,
    tokens,
    features,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BJ: gl.constexpr,
    GROUP: gl.constexpr,
):
    """What is copied after the step at column `start_j` of a tile."""
    start_j += BJ
    if start_j >= width:
        start_j = 0
        tile += gl.num_programs(0)
        start_m, start_n = _tile_start(tile, tokens, features, BM, BN, GROUP)
    return tile, start_m, start_n, start_j


@gluon.jit
def _halves(acc):
    """The left and the right columns."""
    return acc.reshape((acc.shape[0], 2, acc.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _store(
    acc,  # [features, tokens] int32 or float32
    y_ptr,
    token_scale_ptr,
    token_sum_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    start_m,
    start_n,
    tokens,
    features,
    tokens_an_image,
    residual_stride,
    ONE_IMAGE: gl.constexpr,
    DIGITS: gl.constexpr,
):
    """As `store_tile` of kernels/_gemm_parts.py, but in the accumulator's layout: what crosses shared memory to be
    turned round, the residual one way and the result the other, is of 16 bits.
    """
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1] // DIGITS
    offs_r = start_m + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    mask_r = offs_r < tokens
    if token_sum_ptr is not None:
        acc -= gl.expand_dims(gl.load(token_sum_ptr + offs_r, mask_r, other=0), 0)
    y = acc.to(gl.float32)
    if token_scale_ptr is not None:
        y *= gl.expand_dims(gl.load(token_scale_ptr + offs_r, mask_r, other=0), 0)
    if DIGITS > 1:
        y = gl.sum(y.reshape((BN, BM, DIGITS)), 2)
    COLUMNS: gl.constexpr = y.type.layout
    start_m //= DIGITS
    tokens //= DIGITS
    offs_m = start_m + gl.arange(0, BM, gl.SliceLayout(0, COLUMNS))
    offs_n = start_n + gl.arange(0, BN, gl.SliceLayout(1, COLUMNS))
    mask_m = offs_m < tokens
    mask_n = offs_n < features
    y *= gl.expand_dims(gl.load(scale_ptr + offs_n, mask_n, other=0), 1)
    if bias_ptr is not None:
        y += gl.expand_dims(gl.load(bias_ptr + offs_n, mask_n, other=0).to(gl.float32), 1)
    if gate_ptr is not None:
        if ONE_IMAGE:
            y *= gl.expand_dims(gl.load(gate_ptr + offs_n, mask_n, other=0).to(gl.float32), 1)
        else:
            gates = gl.expand_dims(offs_m // tokens_an_image * features, 0) + gl.expand_dims(offs_n, 1)
            mask = gl.expand_dims(mask_m, 0) & gl.expand_dims(mask_n, 1)
            y *= gl.load(gate_ptr + gates, mask, other=0).to(gl.float32)
    LANES: gl.constexpr = BN // 8 if BN < 256 else 32
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.expand_dims(start_m + gl.arange(0, BM, gl.SliceLayout(1, ROWS)), 1)
    offs_n = gl.expand_dims(start_n + gl.arange(0, BN, gl.SliceLayout(0, ROWS)), 0)
    mask = (offs_m < tokens) & (offs_n < features)
    rows = offs_m.to(gl.int64)
    if residual_ptr is not None:
        residual = gl.load(residual_ptr + rows * residual_stride + offs_n, mask, other=0)
        y += gl.convert_layout(residual.permute((1, 0)), COLUMNS).to(gl.float32)
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty).permute((1, 0)), ROWS)
    gl.store(y_ptr + rows * features + offs_n, y, mask)


@gluon.jit
def gemm_hopper(
    x_desc,  # [4, M, P / 4], blocks [4, BM, BJ]
    packed_desc,  # [N, P / 4], blocks [BN, BJ]
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
    ONE_IMAGE: gl.constexpr,
    DIGITS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    SUBTILES: gl.constexpr,
):
    """Descriptors read zeros beyond a plane's end: the tokens' zeros cancel whatever the weights' bytes decode to."""
    DTYPE: gl.constexpr = x_desc.dtype
    ACC: gl.constexpr = gl.int32 if DTYPE.is_int8() else gl.float32
    BM: gl.constexpr = x_desc.block_shape[1]
    BN: gl.constexpr = packed_desc.block_shape[0]
    BJ: gl.constexpr = packed_desc.block_shape[1]
    STEP: gl.constexpr = 256 // DTYPE.primitive_bitwidth  # columns of K that one instruction takes
    WIDE: gl.constexpr = BM if BM <= 128 or not DTYPE.is_int8() else 128  # Triton has no integer instruction of 256
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDE, STEP])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 32 // DTYPE.primitive_bitwidth)
    PART: gl.constexpr = BM // SUBTILES

    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 4, BM, BJ], x_desc.layout)
    # The same bytes, a matrix a plane.
    PLANE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BJ], DTYPE)
    planes = x_smem._reinterpret(DTYPE, [STAGES * 4, BM, BJ], PLANE)
    packed_smem = gl.allocate_shared_memory(packed_desc.dtype, [STAGES, BN, BJ], packed_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)

    tiles = gl.cdiv(tokens, BM) * gl.cdiv(features, BN)
    # What is copied next, STAGES - 1 steps ahead of what is multiplied.
    next_tile = gl.program_id(0)
    next_m, next_n = _tile_start(next_tile, tokens, features, BM, BN, GROUP)
    next_j = 0
    for ahead in gl.static_range(STAGES - 1):
        pred = next_tile < tiles
        _copy(x_desc, packed_desc, x_smem, packed_smem, full, ahead, next_m, next_n, next_j, pred)
        next_tile, next_m, next_n, next_j = _next_step(
            next_tile, next_m, next_n, next_j, plane_width, tokens, features, BM, BN, BJ, GROUP
        )

    stage = 0
    phase = 0
    free = STAGES - 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = _tile_start(tile, tokens, features, BM, BN, GROUP)
        acc = gl.zeros((BN, BM), ACC, MMA)
        for _ in range(0, plane_width, BJ):
            mbarrier.wait(full.index(stage), phase)
            packed = packed_smem.index(stage).load(OPERAND)
            for plane in gl.static_range(4):
                x = planes.index(stage * 4 + plane).permute((1, 0))
                acc = warpgroup_mma(_decode(packed, plane, DTYPE), x, acc, is_async=True)
                # One product stays under way while the next plane is decoded, but none into the next turn of the loop:
                # the assembler would serialize them all (its warning C7513). The other warpgroup fills the gap.
                acc = warpgroup_mma_wait(1 if plane < 3 else 0, [acc])
                if plane == 0:
                    _barrier()  # every warp is done with the step before: its stage may be written
                    pred = next_tile < tiles
                    _copy(x_desc, packed_desc, x_smem, packed_smem, full, free, next_m, next_n, next_j, pred)
                    next_tile, next_m, next_n, next_j = _next_step(
                        next_tile, next_m, next_n, next_j, plane_width, tokens, features, BM, BN, BJ, GROUP
                    )
            free = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1

        if SUBTILES == 1:
            parts = (acc,)
        elif SUBTILES == 2:
            parts = _halves(acc)
        else:
            first, second = _halves(acc)
            parts = _halves(first) + _halves(second)
        for part in gl.static_range(SUBTILES):
            _store(
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
