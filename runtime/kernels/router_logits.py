"""Router logits in float32 from half-precision hidden states, without a float32 copy of them.

Shapes: T tokens, H hidden size, E experts.

The products run on the tensor cores in three tf32 passes: hidden states of half precision are tf32
numbers as they are, the router's float32 ones are split into a tf32 number and a rest. The time is
that of reading the hidden states, so several programs share a block of tokens, each with a part of
the inputs, where there are too few blocks to keep the memory busy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY, workspace

_TOKENS = 64
_INPUTS = 64
_STAGES = 4
_PROGRAMS = 512  # four a multiprocessor
_MOST_PARTS = 16


def router_logits(h_TH: Tensor, router_EH: Tensor) -> Tensor:
    """Return logits_TE, float32, of products and sums in float32."""
    (num_tokens, width), num_experts = h_TH.shape, router_EH.shape[0]
    blocks, experts = triton.cdiv(num_tokens, _TOKENS), max(16, triton.next_power_of_2(num_experts))
    parts = min(triton.next_power_of_2(max(1, _PROGRAMS // blocks)), _MOST_PARTS)
    logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=h_TH.device)
    sums, arrived = workspace(h_TH.device, blocks * parts * _TOKENS * experts if parts > 1 else 1)
    _router_logits[(blocks * parts,)](
        h_TH,
        router_EH,
        logits_TE,
        sums,
        arrived,
        num_tokens,
        num_experts,
        width,
        M=_TOKENS,
        N=experts,
        B=_INPUTS,
        PARTS=parts,
        STAGES=_STAGES,
        num_warps=4,
        num_stages=_STAGES,
        **EARLY,
    )
    return logits_TE


@triton.jit
def _router_logits(
    h,
    router,
    logits,
    sums,
    arrived,
    T,
    E,
    H,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    token_M = block * M + tl.arange(0, M)
    expert_N = tl.arange(0, N)
    logit_MN = tl.zeros([M, N], tl.float32)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    inputs = tl.cdiv(tl.cdiv(H, PARTS), B) * B  # of a part
    for first in tl.range(part * inputs, min((part + 1) * inputs, H), B, num_stages=STAGES):
        column_B = first + tl.arange(0, B)
        h_MB = tl.load(
            h + token_M[:, None].to(tl.int64) * H + column_B[None, :],
            mask=(token_M < T)[:, None] & (column_B < H)[None, :],
            other=0.0,
        )
        router_NB = tl.load(
            router + expert_N[:, None] * H + column_B[None, :],
            mask=(expert_N < E)[:, None] & (column_B < H)[None, :],
            other=0.0,
        )
        logit_MN = tl.dot(h_MB.to(tl.float32), router_NB.T, logit_MN, input_precision="tf32x3")
    is_last = True
    if PARTS > 1:
        offset_MN = tl.arange(0, M)[:, None] * N + expert_N[None, :]
        tl.store(sums + tl.program_id(0) * M * N + offset_MN, logit_MN)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == PARTS - 1
        if is_last:
            # In the order of parts, whichever came last, so that sums are always the same.
            logit_MN = tl.zeros([M, N], tl.float32)
            for other in tl.static_range(PARTS):
                logit_MN += tl.load(
                    sums + (block * PARTS + other) * M * N + offset_MN, cache_modifier=".cg"
                )
            tl.store(arrived + block, 0)
    if is_last:
        tl.store(
            logits + token_M[:, None].to(tl.int64) * E + expert_N[None, :],
            logit_MN,
            mask=(token_M < T)[:, None] & (expert_N < E)[None, :],
        )
