"""Causal attention with heads of 512 on Hopper: 450 to 490 TFLOP/s where SDPA reaches 130.

The library kernels stop at heads of 256 or keep scores and outputs in one warp group, which either
spills or computes the scores twice. Here a block of M = 64 queries owns a multiprocessor and its
two warp groups share every product by columns: of the scores [M, N] each has N / 2, of the
outputs [M, D] D / 2, so that the outputs fit into registers and nothing is computed twice.

    shared memory: queries 64 KiB, keys 64 KiB, values 64 KiB, of 227 KiB
    tensor cores:  scores of tile j-1 | outputs of tile j           | scores of tile j-2 | ...
    meanwhile:                        | softmax of tile j-1, copies |

Tiles run from the diagonal down to position 0. Written in Gluon, the layer of Triton where layouts
and copies are explicit; measurements are in docs/log.md.

Shapes: B sequences, Q query heads, G key and value heads, S query positions, T key positions, D
head width, M queries of a block, N keys of a tile.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEAD_DIM = 512
# Newer versions of Triton renamed it; compiled with 3.6, 3.7 and 3.9.
_start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_QUERIES = 64  # M
_KEYS = 64  # N
_NUM_WARPS = 8
# Below every score, and finite: a row that sees nothing of its last tile must not give inf - inf.
_LOWEST = gl.constexpr(-1e30)


def wide_attention(
    query_BQSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scale: float
) -> Tensor:
    """Return what the last S of T positions read from those up to their own, [B, Q, S, D].

    Heads may lie side by side, as a product for all heads leaves them, and so does the result, for
    the product after it.

    Args:
        query_BQSD: float16 or bfloat16, on a GPU of compute capability 9.0, D = 512.
        key_BGTD: query head q reads head q * G // Q.
        value_BGTD: values.
        scale: multiplies the scores.
    """
    num_sequences, num_heads, num_queries, _ = query_BQSD.shape
    num_blocks = triton.cdiv(num_queries, _QUERIES)
    out_BSQD = query_BQSD.new_empty(num_sequences, num_queries, num_heads, HEAD_DIM)
    query_BQSD, key_BGTD, value_BGTD = map(_in_rows, (query_BQSD, key_BGTD, value_BGTD))
    _attention[(num_sequences * num_heads * num_blocks,)](
        _tiles(query_BQSD, _QUERIES),
        _tiles(key_BGTD, _KEYS),
        _tiles(value_BGTD, _KEYS),
        out_BSQD,
        *query_BQSD.stride()[:3],
        *key_BGTD.stride()[:3],
        *value_BGTD.stride()[:3],
        scale / math.log(2),
        num_queries,
        key_BGTD.shape[2],
        num_blocks,
        num_heads,
        key_BGTD.shape[1],
        D=HEAD_DIM,
        M=_QUERIES,
        N=_KEYS,
        num_warps=_NUM_WARPS,
    )
    return out_BSQD.transpose(1, 2)


def _in_rows(x_BQSD: Tensor) -> Tensor:
    """Return heads whose positions are the rows of one matrix, copied if they are not.

    A row is one position of one head, or of all heads. No rows may lie between those of two heads
    or sequences, as in a cache with room: tiles reach over the end, and weigh what is there by 0.
    """
    sequences, heads, positions, _ = x_BQSD.shape
    sequence, head, row, element = x_BQSD.stride()
    has_rows_of_heads = (
        element == 1
        and row % 8 == x_BQSD.data_ptr() % 16 == 0  # 16 bytes, as copies of tiles want it
        and (heads - 1) * head + HEAD_DIM <= row
        and (sequences == 1 or sequence == positions * row)
    )
    return x_BQSD if has_rows_of_heads else x_BQSD.contiguous()


def _tiles(x_BQSD: Tensor, positions: int) -> TensorDescriptor:
    """Return what copies some positions of a head at a time, from the rows of `_in_rows`."""
    sequences, heads, num_positions, _ = x_BQSD.shape
    sequence, head, row, _ = x_BQSD.stride()
    last = (sequences - 1) * sequence + (heads - 1) * head
    shape = (last // row + num_positions, last % row + HEAD_DIM)
    dtype = gl.float16 if x_BQSD.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([positions, HEAD_DIM], dtype)
    return TensorDescriptor.from_tensor(
        x_BQSD.as_strided(shape, (row, 1)), [positions, HEAD_DIM], layout
    )


@gluon.jit
def _attention(
    query_tiles,
    key_tiles,
    value_tiles,
    out_pointer,
    query_sequence,
    query_head,
    query_row,
    key_sequence,
    key_head,
    key_row,
    value_sequence,
    value_head,
    value_row,
    scale_log2,
    num_queries,
    num_keys,
    num_blocks,
    Q,
    G,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
):
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = query_tiles.dtype

    # The longest blocks of a head first; blocks that run together read the same keys from L2.
    block = num_blocks - 1 - gl.program_id(0) % num_blocks
    sequence = gl.program_id(0) // num_blocks // Q
    head = gl.program_id(0) // num_blocks % Q
    shared = head * G // Q  # the head of keys and values
    query_at, query_column = _begin(sequence, head, query_sequence, query_head, query_row)
    key_at, key_column = _begin(sequence, shared, key_sequence, key_head, key_row)
    value_at, value_column = _begin(sequence, shared, value_sequence, value_head, value_row)
    position = num_keys - num_queries + block * M  # of the block's first query
    tile = (gl.minimum(position + M, num_keys) + N - 1) // N - 1

    query = gl.allocate_shared_memory(dtype, [M, D], query_tiles.layout)
    key = gl.allocate_shared_memory(dtype, [N, D], key_tiles.layout)
    value = gl.allocate_shared_memory(dtype, [N, D], value_tiles.layout)
    query_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    value_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(query_here, count=1)
    mbarrier.init(key_here, count=1)
    mbarrier.init(value_here, count=1)
    fence_async_shared()
    _copy(query_tiles, query_at + block * M, query_column, query, query_here, True)
    _copy(key_tiles, key_at + tile * N, key_column, key, key_here, True)
    _copy(value_tiles, value_at + tile * N, value_column, value, value_here, True)

    position_M = position + gl.arange(0, M, gl.SliceLayout(1, score_layout))
    column_N = gl.arange(0, N, gl.SliceLayout(0, score_layout))
    no_score_MN = gl.zeros([M, N], gl.float32, score_layout)
    out_MD = gl.zeros([M, D], gl.float32, out_layout)

    mbarrier.wait(query_here, 0)
    mbarrier.wait(key_here, 0)
    score_MN = warpgroup_mma(query, key.permute((1, 0)), no_score_MN, use_acc=False, is_async=True)
    score_MN = warpgroup_mma_wait(0, deps=[score_MN])
    _copy(key_tiles, key_at + (tile - 1) * N, key_column, key, key_here, tile > 0)
    seen_MN = tile * N + column_N[None, :] <= position_M[:, None]
    score_MN = gl.where(seen_MN, score_MN * scale_log2, -float("inf"))
    largest_M = gl.maximum(gl.max(score_MN, 1), _LOWEST)
    weight_MN = gl.exp2(score_MN - largest_M[:, None])
    sum_MN = weight_MN  # added up over columns only at the end: that needs both warp groups
    operand_MN = gl.convert_layout(weight_MN.to(dtype), weight_layout)
    phase = 0
    while tile > 0:
        mbarrier.wait(key_here, phase ^ 1)
        score_MN = warpgroup_mma(
            query, key.permute((1, 0)), no_score_MN, use_acc=False, is_async=True
        )
        mbarrier.wait(value_here, phase)
        out_MD = warpgroup_mma(operand_MN, value, out_MD, is_async=True)
        score_MN = warpgroup_mma_wait(1, deps=[score_MN])  # the outputs are still under way
        _copy(key_tiles, key_at + (tile - 2) * N, key_column, key, key_here, tile > 1)
        score_MN = score_MN * scale_log2
        if tile * N > position:
            seen_MN = (tile - 1) * N + column_N[None, :] <= position_M[:, None]
            score_MN = gl.where(seen_MN, score_MN, -float("inf"))
        new_largest_M = gl.maximum(largest_M, gl.max(score_MN, 1))
        shrink_M = gl.exp2(largest_M - new_largest_M)
        largest_M = new_largest_M
        weight_MN = gl.exp2(score_MN - largest_M[:, None])
        sum_MN = sum_MN * shrink_M[:, None] + weight_MN
        out_shrink_M = gl.convert_layout(shrink_M, gl.SliceLayout(1, out_layout))
        out_MD, operand_MN = warpgroup_mma_wait(0, deps=[out_MD, operand_MN])
        _copy(value_tiles, value_at + (tile - 1) * N, value_column, value, value_here, True)
        operand_MN = gl.convert_layout(weight_MN.to(dtype), weight_layout)
        out_MD = out_MD * out_shrink_M[:, None]
        phase ^= 1
        tile -= 1
    mbarrier.wait(value_here, phase)
    out_MD = warpgroup_mma(operand_MN, value, out_MD, is_async=True)
    out_MD, operand_MN = warpgroup_mma_wait(0, deps=[out_MD, operand_MN])

    sum_M = gl.convert_layout(gl.sum(sum_MN, 1), gl.SliceLayout(1, out_layout))
    row_M = block * M + gl.arange(0, M, gl.SliceLayout(1, out_layout))
    column_D = gl.arange(0, D, gl.SliceLayout(0, out_layout))
    offset_M = ((sequence.to(gl.int64) * num_queries + row_M) * Q + head) * D
    gl.store(
        out_pointer + offset_M[:, None] + column_D[None, :],
        (out_MD / sum_M[:, None]).to(dtype),
        mask=(row_M < num_queries)[:, None],
    )


@gluon.jit
def _begin(sequence, head, sequence_stride, head_stride, row_stride):
    """Return the row of a head's first position, and its column there."""
    element = sequence.to(gl.int64) * sequence_stride + head.to(gl.int64) * head_stride
    return (element // row_stride).to(gl.int32), (element % row_stride).to(gl.int32)


@gluon.jit
def _copy(tiles, row, column, memory, here, wanted):
    """Start to copy the tile at `row` into shared memory; `here` completes when it has arrived."""
    mbarrier.expect(here, tiles.block_type.nbytes, pred=wanted)
    _start_copy(tiles, [row, column], here, memory, pred=wanted)
