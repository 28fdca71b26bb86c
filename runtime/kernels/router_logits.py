"""Router logits in float32 from half-precision hidden states, without a float32 copy of them.

Shapes: T tokens, H hidden size, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY

_TOKENS = 16
_INPUTS = 128


def router_logits(h_TH: Tensor, router_EH: Tensor) -> Tensor:
    """Return logits_TE, float32, of products and sums in float32."""
    (num_tokens, width), num_experts = h_TH.shape, router_EH.shape[0]
    logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=h_TH.device)
    _router_logits[(triton.cdiv(num_tokens, _TOKENS),)](
        h_TH,
        router_EH,
        logits_TE,
        num_tokens,
        num_experts,
        width,
        M=_TOKENS,
        N=max(16, triton.next_power_of_2(num_experts)),
        B=_INPUTS,
        num_warps=4,
        num_stages=3,
        **EARLY,
    )
    return logits_TE


@triton.jit
def _router_logits(h, router, logits, T, E, H, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    token_M = tl.program_id(0) * M + tl.arange(0, M)
    expert_N = tl.arange(0, N)
    logit_MN = tl.zeros([M, N], tl.float32)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    for first in range(0, H, B):
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
        logit_MN = tl.dot(h_MB.to(tl.float32), router_NB.T, logit_MN, input_precision="ieee")
    tl.store(
        logits + token_M[:, None].to(tl.int64) * E + expert_N[None, :],
        logit_MN,
        mask=(token_M < T)[:, None] & (expert_N < E)[None, :],
    )
