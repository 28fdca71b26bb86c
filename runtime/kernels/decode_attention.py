"""Attention of one new position: the time is that of reading keys and values.

Shapes: B sequences, Q heads, C positions a cache has room for, D head width, N positions read at a
time.

A program owns one head of one sequence; nothing is worth a tensor core. It also writes the new
position's key and value into the cache, which saves a kernel and a round for a 129th position.
Warps are few, so that enough programs share a multiprocessor to keep its loads in flight.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY, fetch, has_hopper

_POSITIONS = 8
_NUM_WARPS = 2
_STAGES = 4
_MIN_PROGRAMS = 264  # two a multiprocessor: with fewer, most of the memory would wait


def decode_attention(
    query_BQ1D: Tensor,
    key_BQ1D: Tensor,
    value_BQ1D: Tensor,
    keys_BQCD: Tensor,
    values_BQCD: Tensor,
    length: int,
    scale: float,
) -> Tensor:
    """Return what a new position reads from those before it and its own, [B, Q, 1, D].

    Args:
        query_BQ1D: of the new position.
        key_BQ1D: likewise; written into the cache, as is the value.
        value_BQ1D: likewise.
        keys_BQCD: the cache.
        values_BQCD: laid out like the keys.
        length: positions in the cache before this one.
        scale: multiplies the scores.
    """
    num_sequences, num_heads, _, width = query_BQ1D.shape
    out_BQ1D = torch.empty(query_BQ1D.shape, dtype=query_BQ1D.dtype, device=query_BQ1D.device)
    _decode[(num_sequences * num_heads,)](
        query_BQ1D,
        key_BQ1D,
        value_BQ1D,
        keys_BQCD,
        values_BQCD,
        out_BQ1D,
        scale / math.log(2),
        length,
        *query_BQ1D.stride()[:2],
        *key_BQ1D.stride()[:2],
        *value_BQ1D.stride()[:2],
        *keys_BQCD.stride()[:2],
        *values_BQCD.stride()[:2],
        num_heads,
        D=width,
        N=_POSITIONS,
        STAGES=_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_STAGES,
        **EARLY,
    )
    return out_BQ1D


def serves(query_BQSD: Tensor, key_BGSD: Tensor, value_BGSV: Tensor) -> bool:
    """Return whether `decode_attention` can take these, and was measured faster than SDPA."""
    num_sequences, num_heads, num_queries, width = query_BQSD.shape
    return (
        num_queries == 1
        and key_BGSD.shape[1] == num_heads
        and num_sequences * num_heads >= _MIN_PROGRAMS
        and width == key_BGSD.shape[3] == value_BGSV.shape[3] == 512
        and query_BQSD.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and has_hopper(query_BQSD.device)
        and all(x.stride(3) == 1 for x in (query_BQSD, key_BGSD, value_BGSV))
    )


@triton.jit
def _decode(
    query,
    key,
    value,
    keys,
    values,
    out,
    scale_log2,
    length,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    keys_stride_b,
    keys_stride_h,
    values_stride_b,
    values_stride_h,
    num_heads,
    D: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    sequence = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    column_D = tl.arange(0, D)
    keys += sequence * keys_stride_b + head * keys_stride_h
    values += sequence * values_stride_b + head * values_stride_h
    tl.extra.cuda.gdc_launch_dependents()
    # What other steps wrote can be brought into L2 before the kernel before has ended.
    line_L = tl.minimum(tl.arange(0, N * D // 64) * 64, tl.maximum(length * D - 64, 0))
    fetch(keys + line_L)
    fetch(values + line_L)
    tl.extra.cuda.gdc_wait()
    query_D = tl.load(query + sequence * query_stride_b + head * query_stride_h + column_D)
    query_D = query_D.to(tl.float32) * scale_log2
    key_D = tl.load(key + sequence * key_stride_b + head * key_stride_h + column_D)
    value_D = tl.load(value + sequence * value_stride_b + head * value_stride_h + column_D)
    tl.store(keys + length * D + column_D, key_D)
    tl.store(values + length * D + column_D, value_D)
    largest = tl.sum(key_D.to(tl.float32) * query_D, 0)
    total = 1.0
    out_D = value_D.to(tl.float32)
    for first in tl.range(0, length, N, num_stages=STAGES):
        position_N = first + tl.arange(0, N)
        is_key_N = position_N < length
        offset_ND = position_N[:, None] * D + column_D[None, :]
        key_ND = tl.load(keys + offset_ND, mask=is_key_N[:, None], other=0.0)
        value_ND = tl.load(values + offset_ND, mask=is_key_N[:, None], other=0.0)
        score_N = tl.sum(key_ND.to(tl.float32) * query_D[None, :], 1)
        score_N = tl.where(is_key_N, score_N, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score_N, 0))
        shrink = tl.exp2(largest - new_largest)
        weight_N = tl.exp2(score_N - new_largest)
        total = total * shrink + tl.sum(weight_N, 0)
        out_D = out_D * shrink + tl.sum(weight_N[:, None] * value_ND.to(tl.float32), 0)
        largest = new_largest
    result_D = (out_D / total).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + column_D, result_D)
