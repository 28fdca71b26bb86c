"""What a decode step does between its large products, a kernel each: norms, routing, batching.

Shapes: T tokens, H hidden size, E experts, K experts per token, N = T x K rows.

Each of them is several kernels in torch, which at decode sizes take longer to start than to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY, workspace

_TOKENS = 16  # of a router program
_INPUTS = 512  # likewise
_GROUPS = 8  # parts of a program's inputs, a warp each


def add_rms_norm(
    x_TH: Tensor, delta_TH: Tensor | None, gain_H: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return x + delta, and that scaled to unit RMS, times the gain."""
    width = x_TH.shape[-1]
    x_TH = x_TH.contiguous()
    delta_TH = None if delta_TH is None else delta_TH.contiguous()
    sum_TH = x_TH if delta_TH is None else torch.empty_like(x_TH)
    normed_TH = torch.empty_like(x_TH)
    _add_rms_norm[(x_TH.numel() // width,)](
        x_TH,
        x_TH if delta_TH is None else delta_TH,
        x_TH if gain_H is None else gain_H,
        sum_TH,
        normed_TH,
        width,
        epsilon,
        HAS_DELTA=delta_TH is not None,
        HAS_GAIN=gain_H is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=16,
        **EARLY,
    )
    return sum_TH, normed_TH


def route_best(h_TH: Tensor, router_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights_T1 (float32) and experts_T1 of softmax routing to the best expert."""
    (num_tokens, width), num_experts = h_TH.shape, router_EH.shape[0]
    weights_T1 = torch.empty(num_tokens, 1, dtype=torch.float32, device=h_TH.device)
    experts_T1 = torch.empty(num_tokens, 1, dtype=torch.int64, device=h_TH.device)
    blocks, parts = triton.cdiv(num_tokens, _TOKENS), triton.cdiv(width, _INPUTS)
    padded = max(16, triton.next_power_of_2(num_experts))
    sums, arrived = workspace(h_TH.device, blocks * parts * _TOKENS * padded)
    _route_best[(blocks * parts,)](
        h_TH,
        router_EH,
        sums,
        arrived,
        weights_T1,
        experts_T1,
        num_tokens,
        num_experts,
        width,
        parts,
        M=_TOKENS,
        N=padded,
        G=_GROUPS,
        B=_INPUTS // _GROUPS,
        P=triton.next_power_of_2(parts),
        num_warps=_GROUPS,
        **EARLY,
    )
    return weights_T1, experts_T1


def look_up(table: Tensor, index_TK: Tensor) -> Tensor:
    """Return table[index], both int64."""
    out_TK = torch.empty_like(index_TK)
    _look_up[(triton.cdiv(index_TK.numel(), 1024),)](
        table, index_TK, out_TK, index_TK.numel(), BLOCK=1024, num_warps=4, **EARLY
    )
    return out_TK


def batch_rows(x_TH: Tensor, slot_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return rows_NH sorted by slot, then by row; and where each row went, int64 [N]."""
    (num_rows,), width = slot_N.shape, x_TH.shape[1]
    rows_NH = x_TH.new_empty(num_rows, width)
    place_N = torch.empty_like(slot_N)
    _batch_rows[(num_rows,)](
        x_TH,
        slot_N,
        rows_NH,
        place_N,
        num_rows,
        width,
        top_k,
        ROWS=triton.next_power_of_2(num_rows),
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        **EARLY,
    )
    return rows_NH, place_N


def pad_rows(
    x_TH: Tensor, slot_TK: Tensor, weights_TK: Tensor, num_slots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `epplan.runtime.dispatchers.padding.pad` returns."""
    (num_tokens, top_k), width = slot_TK.shape, x_TH.shape[1]
    num_rows = num_tokens * top_k
    padded_CH = x_TH.new_empty(num_slots * capacity, width)
    place_TK, kept_TK = torch.empty_like(slot_TK), torch.empty_like(weights_TK)
    counts_S = slot_TK.new_empty(num_slots)
    _pad_rows[(num_slots * capacity,)](
        x_TH.contiguous(),
        slot_TK.contiguous(),
        weights_TK.contiguous(),
        padded_CH,
        place_TK,
        kept_TK,
        counts_S,
        num_rows,
        width,
        top_k,
        capacity,
        num_slots * capacity - 1,
        ROWS=triton.next_power_of_2(num_rows),
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        **EARLY,
    )
    return padded_CH, place_TK, kept_TK, counts_S


def add_up_rows(rows_NH: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return each token's rows added up by weight, from its first choice to its last, [T, H]."""
    rows_NH, place_TK, weights_TK = (x.contiguous() for x in (rows_NH, place_TK, weights_TK))
    (num_tokens, top_k), width = place_TK.shape, rows_NH.shape[1]
    out_TH = rows_NH.new_empty(num_tokens, width)
    _add_up_rows[(num_tokens,)](
        rows_NH,
        place_TK,
        weights_TK,
        out_TH,
        width,
        K=top_k,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        **EARLY,
    )
    return out_TH


def append(buffers: list[Tensor], news: list[Tensor], position: int) -> None:
    """Write new keys and values, [B, G, 1, D], at a position of their buffers, [B, G, C, D]."""
    keys, values = buffers
    num_sequences, heads, _, width = keys.shape
    new_keys, new_values = news
    _append[(num_sequences * heads,)](
        keys,
        values,
        new_keys,
        new_values,
        position,
        heads,
        *keys.stride()[:2],
        *values.stride()[:2],
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=2,
        **EARLY,
    )


@triton.jit
def _add_rms_norm(
    x,
    delta,
    gain,
    out,
    normed,
    H,
    epsilon,
    HAS_DELTA: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * H
    column_H = tl.arange(0, BLOCK)
    inside_H = column_H < H
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    x_H = tl.load(x + row + column_H, mask=inside_H, other=0.0)
    if HAS_DELTA:
        x_H += tl.load(delta + row + column_H, mask=inside_H, other=0.0)
        tl.store(out + row + column_H, x_H, mask=inside_H)
    wide_H = x_H.to(tl.float32)
    wide_H *= tl.rsqrt(tl.sum(wide_H * wide_H, 0) / H + epsilon)
    if HAS_GAIN:
        wide_H *= tl.load(gain + column_H, mask=inside_H, other=0.0).to(tl.float32)
    tl.store(normed + row + column_H, wide_H.to(x_H.dtype), mask=inside_H)


@triton.jit
def _route_best(
    h,
    router,
    sums,
    arrived,
    weights,
    experts,
    T,
    E,
    H,
    parts,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
):
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    token_M = block * M + tl.arange(0, M)
    expert_N = tl.arange(0, N)
    column_GB = (part * G + tl.arange(0, G)[:, None]) * B + tl.arange(0, B)[None, :]
    inside_GB = column_GB < H
    tl.extra.cuda.gdc_launch_dependents()
    router_GBN = tl.load(
        router + expert_N[None, None, :] * H + column_GB[:, :, None],
        mask=(expert_N < E)[None, None, :] & inside_GB[:, :, None],
        other=0.0,
    )
    tl.extra.cuda.gdc_wait()
    h_GMB = tl.load(
        h + token_M[None, :, None].to(tl.int64) * H + column_GB[:, None, :],
        mask=(token_M < T)[None, :, None] & inside_GB[:, None, :],
        other=0.0,
    )
    logit_GMN = tl.dot(h_GMB.to(tl.float32), router_GBN, input_precision="tf32x3")
    offset_MN = tl.arange(0, M)[:, None] * N + expert_N[None, :]
    tl.store(sums + tl.program_id(0) * M * N + offset_MN, tl.sum(logit_GMN, 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + block, 1, sem="acq_rel") == parts - 1:
        # All parts at once and always in the same order, whichever came last.
        part_P = tl.arange(0, P)
        logit_PMN = tl.load(
            sums + (block * parts + part_P)[:, None, None] * M * N + offset_MN[None, :, :],
            mask=(part_P < parts)[:, None, None],
            other=0.0,
            cache_modifier=".cg",
        )
        logit_MN = tl.sum(logit_PMN, 0)
        logit_MN = tl.where((expert_N < E)[None, :], logit_MN, -float("inf"))
        power_MN = tl.exp(logit_MN - tl.max(logit_MN, 1)[:, None])
        tl.store(weights + token_M, 1.0 / tl.sum(power_MN, 1), mask=token_M < T)
        tl.store(experts + token_M, tl.argmax(logit_MN, 1).to(tl.int64), mask=token_M < T)
        tl.store(arrived + block, 0)


@triton.jit
def _look_up(table, index, out, number, BLOCK: tl.constexpr):
    place_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    index_B = tl.load(index + place_B, mask=place_B < number, other=0)
    tl.store(out + place_B, tl.load(table + index_B), mask=place_B < number)


@triton.jit
def _batch_rows(x, slot, rows, place, num_rows, H, top_k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_N = tl.arange(0, ROWS)
    column_H = tl.arange(0, BLOCK)
    inside_H = column_H < H
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    own_slot = tl.load(slot + row)
    slot_N = tl.load(slot + row_N, mask=row_N < num_rows, other=9223372036854775807)
    before_N = (slot_N < own_slot) | ((slot_N == own_slot) & (row_N < row))
    here = tl.sum(before_N.to(tl.int64), 0)
    tl.store(place + row, here)
    x_H = tl.load(x + (row // top_k).to(tl.int64) * H + column_H, mask=inside_H)
    tl.store(rows + here * H + column_H, x_H, mask=inside_H)


@triton.jit
def _pad_rows(
    x,
    slot,
    weights,
    padded,
    place,
    kept,
    counts,
    num_rows,
    H,
    top_k,
    capacity,
    last,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here = tl.program_id(0)
    own_slot = here // capacity
    number = here % capacity
    row_N = tl.arange(0, ROWS)
    column_H = tl.arange(0, BLOCK)
    inside_H = column_H < H
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    own_N = tl.load(slot + row_N, mask=row_N < num_rows, other=-1) == own_slot
    number_N = tl.cumsum(own_N.to(tl.int32), 0) - 1
    row = tl.max(tl.where(own_N & (number_N == number), row_N, -1), 0)
    x_H = tl.load(
        x + (row // top_k).to(tl.int64) * H + column_H, mask=inside_H & (row >= 0), other=0.0
    )
    tl.store(padded + here.to(tl.int64) * H + column_H, x_H, mask=inside_H)
    if number == 0:
        fits_N = number_N < capacity
        place_N = tl.where(fits_N, own_slot * capacity + number_N, last)
        tl.store(place + row_N, place_N.to(tl.int64), mask=own_N)
        weight_N = tl.load(weights + row_N, mask=own_N, other=0.0)
        tl.store(kept + row_N, tl.where(fits_N, weight_N, 0.0), mask=own_N)
        tl.store(counts + own_slot, tl.sum(own_N.to(tl.int64), 0))


@triton.jit
def _add_up_rows(rows, place, weights, out, H, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column_H = tl.arange(0, BLOCK)
    inside_H = column_H < H
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    sum_H = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(K):
        here = tl.load(place + token * K + choice)
        row_H = tl.load(rows + here * H + column_H, mask=inside_H, other=0.0).to(tl.float32)
        sum_H += row_H * tl.load(weights + token * K + choice)
    tl.store(out + token * H + column_H, sum_H.to(out.dtype.element_ty), mask=inside_H)


@triton.jit
def _append(
    keys,
    values,
    new_keys,
    new_values,
    position,
    heads,
    keys_b,
    keys_g,
    values_b,
    values_g,
    new_keys_b,
    new_keys_g,
    new_values_b,
    new_values_g,
    D,
    BLOCK: tl.constexpr,
):
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    column_D = tl.arange(0, BLOCK)
    inside_D = column_D < D
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    key_D = tl.load(new_keys + sequence * new_keys_b + head * new_keys_g + column_D, mask=inside_D)
    value_D = tl.load(
        new_values + sequence * new_values_b + head * new_values_g + column_D, mask=inside_D
    )
    tl.store(
        keys + sequence * keys_b + head * keys_g + position * D + column_D, key_D, mask=inside_D
    )
    tl.store(
        values + sequence * values_b + head * values_g + position * D + column_D,
        value_D,
        mask=inside_D,
    )
