"""Load of experts and ranks, from the counts of one step.

All numbers are rows: a token sent to two experts is two rows. Everything comes from the counts
matrices that dispatch gathers anyway, [MoE layers, source ranks, destination ranks, slots].
"""

from dataclasses import dataclass

from torch import Tensor

from epplan.planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBalance:
    """How evenly one layer's rows spread."""

    layer: int  # absolute
    max_over_mean: float  # of the ranks' rows; 1 is even
    jain: float  # (sum x)^2 / (n sum x^2) of the ranks' rows: 1 is even, 1 / n is one rank
    idle_experts: tuple[int, ...]
    cross_host_share: float  # of the rows whose expert is on another host


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Rows of one step, over all ranks."""

    expert_load: list[list[int]]  # [MoE layers][experts]
    rank_load: list[list[int]]  # [MoE layers][ranks]
    balance: tuple[LayerBalance, ...]


def measure_load(plan: Plan, counts_LWWP: Tensor) -> Load:
    """Return the load of experts and ranks.

    Args:
        plan: says which expert is in which slot and which rank on which host.
        counts_LWWP: rows by MoE layer, source rank, destination rank and slot.
    """
    rank_load: list[list[int]] = counts_LWWP.sum((1, 3)).tolist()
    expert_load = [
        _by_expert(plan, ordinal, counts.sum(0).flatten().tolist())
        for ordinal, counts in enumerate(counts_LWWP)
    ]
    balance = [
        _balance(plan, ordinal, counts_LWWP[ordinal], rank_load[ordinal], expert_load[ordinal])
        for ordinal in range(len(counts_LWWP))
    ]
    return Load(expert_load=expert_load, rank_load=rank_load, balance=tuple(balance))


def _by_expert(plan: Plan, ordinal: int, rows_of_slot: list[int]) -> list[int]:
    load = [0] * plan.model.num_experts
    for expert, rows in zip(plan.expert_of_slot[ordinal], rows_of_slot, strict=True):
        if expert is not None:
            load[expert] += rows
    return load


def _balance(
    plan: Plan, ordinal: int, counts_WWP: Tensor, rank_load: list[int], expert_load: list[int]
) -> LayerBalance:
    total, num_ranks = sum(rank_load), len(rank_load)
    rows_WW: list[list[int]] = counts_WWP.sum(-1).tolist()
    hosts = [rank.host for rank in plan.ranks]
    crossing = sum(
        rows
        for source, row in enumerate(rows_WW)
        for destination, rows in enumerate(row)
        if hosts[source] != hosts[destination]
    )
    return LayerBalance(
        layer=plan.model.moe_layers[ordinal],
        max_over_mean=max(rank_load) * num_ranks / total,
        jain=total**2 / (num_ranks * sum(rows**2 for rows in rank_load)),
        idle_experts=tuple(expert for expert, rows in enumerate(expert_load) if not rows),
        cross_host_share=crossing / total,
    )
