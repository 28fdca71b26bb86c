"""Balancing that changes outputs: off unless asked for, and then said in the result.

Two switches, both of training, where the model learns with them; at inference they trade quality
for even ranks. (Placing, replicating and moving experts change no output: `migrate.py`.)

- Gating bias (DeepSeek-V3's loss-free balancing, arXiv 2408.15664): after every step each expert's
  bias rises or falls by a fixed rate, as it had fewer or more rows than the mean. The bias enters
  the choice of experts, never their weights.
- Capacity (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961): each source rank sends an expert no
  more rows than its even share times a factor; the rows with the lowest weights are dropped, and
  of a token without any row only the residual goes on.

Shapes: T tokens of this rank, K experts per token, E experts, H hidden size, M rows kept.
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
class Kept:
    """The rows within the capacity: what to dispatch in place of a token's K experts.

    Dispatch takes them as tokens with one expert each: `x_TH[token_M]`, `experts_M1`, and combines
    with `weights_M1`; `home` brings the result back to tokens.
    """

    token_M: Tensor
    experts_M1: Tensor
    weights_M1: Tensor
    row_M: Tensor  # t * K + k
    top_k: int

    def home(self, out_MH: Tensor, tokens: int) -> Tensor:
        """Return out_TH, summed from a token's first choice to its last; dropped rows add 0."""
        out_NH = out_MH.new_zeros(tokens * self.top_k, out_MH.shape[1])
        out_NH.index_copy_(0, self.row_M, out_MH)
        return out_NH.view(tokens, self.top_k, -1).sum(1)


def keep_within(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, limit: int) -> Kept:
    """Return the rows to send when no expert takes more than `limit` rows of this rank.

    Of an expert's rows those with the highest weights stay, of equal ones the earliest.
    """
    top_k = experts_TK.shape[1]
    expert_N, weight_N = experts_TK.flatten(), weights_TK.flatten()
    falling_N = weight_N.argsort(descending=True, stable=True)
    order_N = falling_N[expert_N[falling_N].argsort(stable=True)]  # by expert, then by weight
    rows_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    rows_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
    first_E = rows_E.cumsum(0) - rows_E
    place_N = torch.arange(len(order_N), device=order_N.device) - first_E[expert_N[order_N]]
    row_M = order_N[place_N < limit].sort().values
    return Kept(
        token_M=row_M // top_k,
        experts_M1=expert_N[row_M, None],
        weights_M1=weight_N[row_M, None],
        row_M=row_M,
        top_k=top_k,
    )
