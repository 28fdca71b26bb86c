"""Attention of one new position: the time is that of reading keys and values.

Shapes: B sequences, Q query heads, G key and value heads, T key positions, D head width, N
positions read at a time.

A program owns one key head of one sequence and its Q / G query heads; nothing is worth a tensor
core. Warps are few, so that enough programs share a multiprocessor to keep its loads in flight.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY, has_hopper

_POSITIONS = 16
_NUM_WARPS = 2
_STAGES = 2
_MIN_PROGRAMS = 264  # two a multiprocessor: with fewer, most of the memory would wait


def decode_attention(
    query_BQ1D: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scale: float
) -> Tensor:
    """Return what the last position reads, [B, Q, 1, D].

    Args:
        query_BQ1D: of the last of the T positions.
        key_BGTD: query head q reads head q * G // Q; may be a view of a cache.
        value_BGTD: laid out like the keys.
        scale: multiplies the scores.
    """
    num_sequences, num_heads, _, width = query_BQ1D.shape
    out_BQ1D = query_BQ1D.new_empty(query_BQ1D.shape)
    _decode[(num_sequences * num_heads,)](
        query_BQ1D,
        key_BGTD,
        value_BGTD,
        out_BQ1D,
        scale / math.log(2),
        key_BGTD.shape[2],
        *query_BQ1D.stride()[:2],
        *key_BGTD.stride()[:2],
        *value_BGTD.stride()[:2],
        num_heads,
        num_heads // key_BGTD.shape[1],
        D=width,
        N=_POSITIONS,
        STAGES=_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_STAGES,
        **EARLY,
    )
    return out_BQ1D


def serves(query_BQSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor) -> bool:
    """Return whether `decode_attention` can take these, and was measured faster than SDPA."""
    num_sequences, num_heads, num_queries, width = query_BQSD.shape
    return (
        num_queries == 1
        and key_BGTD.shape[1] == num_heads
        and num_sequences * num_heads >= _MIN_PROGRAMS
        and width == value_BGTV.shape[3] == 512
        and query_BQSD.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and has_hopper(query_BQSD.device)
        and query_BQSD.stride(3) == 1
        and all(x.stride()[2:] == (width, 1) for x in (key_BGTD, value_BGTV))
    )


@triton.jit
def _decode(
    query,
    key,
    value,
    out,
    scale_log2,
    num_keys,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_g,
    value_stride_b,
    value_stride_g,
    num_heads,
    group,
    D: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)  # of all sequences
    sequence = (head // num_heads).to(tl.int64)
    key_head = head % num_heads // group
    key += sequence * key_stride_b + key_head * key_stride_g
    value += sequence * value_stride_b + key_head * value_stride_g
    column_D = tl.arange(0, D)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    query += sequence * query_stride_b + head % num_heads * query_stride_h
    query_D = tl.load(query + column_D).to(tl.float32) * scale_log2
    largest = -float("inf")
    total = 0.0
    out_D = tl.zeros([D], tl.float32)
    for first in tl.range(0, num_keys, N, num_stages=STAGES):
        position_N = first + tl.arange(0, N)
        is_key_N = position_N < num_keys
        offset_ND = position_N[:, None] * D + column_D[None, :]
        key_ND = tl.load(key + offset_ND, mask=is_key_N[:, None], other=0.0)
        value_ND = tl.load(value + offset_ND, mask=is_key_N[:, None], other=0.0)
        score_N = tl.sum(key_ND.to(tl.float32) * query_D[None, :], 1)
        score_N = tl.where(is_key_N, score_N, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score_N, 0))
        shrink = tl.exp2(largest - new_largest)
        weight_N = tl.exp2(score_N - new_largest)
        total = total * shrink + tl.sum(weight_N, 0)
        out_D = out_D * shrink + tl.sum(weight_N[:, None] * value_ND.to(tl.float32), 0)
        largest = new_largest
    result_D = (out_D / total).to(out.dtype.element_ty)
    tl.store(out + head.to(tl.int64) * D + column_D, result_D)
