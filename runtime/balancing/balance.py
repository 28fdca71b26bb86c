"""Balancing that changes outputs: off unless asked for, and then said in the result.

Two switches, both of training, where the model learns with them; at inference they trade quality
for even ranks. (Placing, replicating and moving experts change no output: `migrate.py`.)

- Gating bias (DeepSeek-V3's loss-free balancing, arXiv 2408.15664): after every step each expert's
  bias rises or falls by a fixed rate, as it had fewer or more rows than the mean. The bias enters
  the choice of experts, never their weights.
- Capacity (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961): each source rank sends an expert no
  more rows than its even share times a factor; the rows with the lowest weights are dropped, and
  of a token without any row only the residual goes on.

Shapes: T tokens of this rank, K experts per token, N = T x K rows, E experts, H hidden size, M rows
kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChanges:
    """Which balancing that changes outputs is on; the same on all ranks."""

    bias_rate: float | None = None  # of the gating bias, per step
    capacity_factor: float | None = None  # of an expert's even share of a rank's rows

    def notes(self) -> tuple[str, ...]:
        """Return what is on, for the result: none if outputs are the model's."""
        notes = []
        if self.bias_rate is not None:
            notes.append(
                f"gating bias, {self.bias_rate:g} a step: tokens may go to other experts than the "
                "model's router chooses"
            )
        if self.capacity_factor is not None:
            notes.append(
                f"capacity {self.capacity_factor:g}: rows of a rank beyond this many times an "
                "expert's even share are dropped"
            )
        return tuple(notes)


def updated_bias(bias_E: Tensor, rows_E: Tensor, rate: float) -> Tensor:
    """Return b + rate * sign(mean - rows), the same on every rank that has the same rows.

    Args:
        bias_E: float32.
        rows_E: of the last step over all ranks, int64; compared in integers, without rounding.
        rate: change of a bias in one step.
    """
    direction_E = torch.sign(rows_E.sum() - rows_E * len(rows_E))
    return bias_E + rate * direction_E.to(bias_E)


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Return how many rows one rank may send to one expert: ceil(T K / E x factor)."""
    return math.ceil(tokens * top_k / experts * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What a rank sends to experts, as dispatch takes it: tokens with their experts.

    All T tokens with K experts each; or, within a capacity, each row that is kept as a token of its
    own with one expert.
    """

    x_MH: Tensor
    experts_MK: Tensor
    weights_MK: Tensor
    row_M: Tensor | None = None  # t * K + k, of rows that are kept; None: all tokens
    tokens: int
    top_k: int

    def home(self, out_MH: Tensor) -> Tensor:
        """Return out_TH, summed from a token's first choice to its last; dropped rows add 0."""
        if self.row_M is None:
            return out_MH
        out_NH = out_MH.new_zeros(self.tokens * self.top_k, out_MH.shape[1])
        out_NH = out_NH.index_copy(0, self.row_M, out_MH)
        return out_NH.view(self.tokens, self.top_k, -1).sum(1)


def limited(
    x_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    factor: float | None,
) -> Outgoing:
    """Return what to send; with a capacity factor no more than that of any expert's rows.

    Args:
        x_TH: hidden states of this rank.
        experts_TK: the router's choice.
        weights_TK: of the experts' outputs.
        num_experts: E.
        factor: of the capacity; None: everything.
    """
    tokens, top_k = experts_TK.shape
    if factor is None:
        return Outgoing(
            x_MH=x_TH, experts_MK=experts_TK, weights_MK=weights_TK, tokens=tokens, top_k=top_k
        )
    limit = capacity(tokens, top_k, num_experts, factor)
    row_M = rows_within(experts_TK, weights_TK, num_experts, limit)
    return Outgoing(
        x_MH=x_TH[row_M // top_k],
        experts_MK=experts_TK.flatten()[row_M, None],
        weights_MK=weights_TK.flatten()[row_M, None],
        row_M=row_M,
        tokens=tokens,
        top_k=top_k,
    )


def rows_within(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, limit: int) -> Tensor:
    """Return the rows t * K + k to send when no expert takes more than `limit` of this rank's.

    Of an expert's rows those with the highest weights stay, of equal ones the earliest.
    """
    expert_N, weight_N = experts_TK.flatten(), weights_TK.flatten()
    falling_N = weight_N.argsort(descending=True, stable=True)
    order_N = falling_N[expert_N[falling_N].argsort(stable=True)]  # by expert, then by weight
    rows_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    rows_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
    first_E = rows_E.cumsum(0) - rows_E
    place_N = torch.arange(len(order_N), device=order_N.device) - first_E[expert_N[order_N]]
    kept_M: Tensor = order_N[place_N < limit].sort().values
    return kept_M
