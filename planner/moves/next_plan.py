"""From a plan and newly counted traffic to the next plan: few moves, priced again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import epplan
from epplan.errors import EpplanError, InfeasibleError
from epplan.planner.cost import Shares, evaluate_layer
from epplan.planner.plan import Certificate, LayerCost, Plan, RankMemory, Source, Workload
from epplan.planner.problem import Problem, make_problem
from epplan.planner.traffic import Traffic
from epplan.topologies.sources import load_cluster
from epplan.topologies.units import format_bytes

from .relayout import EMPTY, Floats, Layout, price, relayout
from .slot_transfers import Transfer, layer_transfers

_SOLVER = "rebalance (loads of GPUs; links are priced, not optimised)"
_NOT_PRICED = "not priced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """The next plan and how to get there.

    Attributes:
        plan: the next plan.
        transfers: by layer and target slot.
        before: busiest rank's rows over the mean with the old table, by MoE layer.
        after: the same with the new one.
        notes: automatic choices, in words.
    """

    plan: Plan
    transfers: tuple[Transfer, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def bytes_moved(self) -> int:
        """Bytes of all experts that travel."""
        return len(self.transfers) * self.plan.model.expert_bytes


def replan(plan: Plan, traffic: Traffic, *, min_gain: float, command: str) -> Replan:
    """Return the next plan for this traffic.

    Args:
        plan: the present one.
        traffic: what was counted; the mean of its windows counts.
        min_gain: a layer stays unless its busiest rank's rows fall by this part.
        command: the command line that does this.

    Raises:
        InfeasibleError: the new table does not fit into some GPU's memory.
    """
    rows_LWE = traffic.counts.mean(axis=0)
    hosts = tuple(rank.host for rank in plan.ranks)
    may_replicate, note = _may_replicate(plan)
    old = [_layout(plan, layer) for layer in range(plan.model.num_moe_layers)]
    new = [
        relayout(
            rows, layout, plan.world_size, hosts, may_replicate=may_replicate, min_gain=min_gain
        )
        for rows, layout in zip(rows_LWE, old, strict=True)
    ]
    tables = tuple(_slots(layout) for layout in new)
    transfers = tuple(
        transfer
        for layer, (before, after) in enumerate(zip(plan.expert_of_slot, tables, strict=True))
        for transfer in layer_transfers(layer, before, after, plan.slots_per_rank, hosts)
    )
    placed = plan.model_copy(
        update={
            "epplan_version": epplan.__version__,
            "command": command,
            "inputs": plan.inputs.model_copy(
                update={"traffic": Source(source=traffic.source, sha256=traffic.sha256)}
            ),
            "workload": Workload(
                tokens_per_rank=traffic.tokens_per_rank,
                source_ranks=traffic.source_ranks,
                windows=traffic.windows,
            ),
            "expert_of_slot": tables,
            "share_of_slot": _share_table(new, plan.model.num_experts),
            "memory": _memory(plan, tables),
        }
    )
    priced, price_note = _priced(placed, traffic)
    if plan.workload.transfer != "per-choice":
        price_note += f", per choice and not {plan.workload.transfer} as the plan before"
    notes = (
        f"rebalanced from plan {plan.sha256()[:12]}: {len(transfers)} experts move",
        note,
        price_note,
    )
    # In place of the last rebalance's.
    reasons = plan.reasons[: -len(notes)] if plan.certificate.solver == _SOLVER else plan.reasons
    priced = priced.model_copy(update={"reasons": (*reasons, *notes)})
    return Replan(
        plan=priced,
        transfers=transfers,
        before=_max_over_mean(old, rows_LWE, plan.world_size),
        after=_max_over_mean(new, rows_LWE, plan.world_size),
        notes=notes,
    )


def _layout(plan: Plan, layer: int) -> Layout:
    expert = [EMPTY if e is None else e for e in plan.expert_of_slot[layer]]
    return Layout(expert=np.array(expert), share=np.array(plan.shares(layer)), heaviest=0.0)


def _slots(layout: Layout) -> tuple[int | None, ...]:
    return tuple(None if expert == EMPTY else expert for expert in layout.expert.tolist())


def _share_table(
    layouts: Sequence[Layout], num_experts: int
) -> tuple[tuple[float, ...], ...] | None:
    """Return the shares of every slot; None where every expert has one copy."""
    if all(np.count_nonzero(layout.expert != EMPTY) == num_experts for layout in layouts):
        return None
    return tuple(tuple(layout.share.tolist()) for layout in layouts)


def _may_replicate(plan: Plan) -> tuple[bool, str]:
    """Return whether empty slots may take copies: if a full table fits everywhere."""
    empty = sum(slots.count(None) for slots in plan.expert_of_slot)
    if not empty:
        return True, "every slot is taken: no further replicas"
    full = plan.slots_per_rank * plan.model.num_moe_layers * plan.model.expert_bytes
    short = [use.rank for use in plan.memory if _rest(use) < full]
    if not short:
        return True, f"{empty} empty slots may take replicas: they fit into every GPU's memory"
    return False, (
        f"{empty} empty slots stay empty: with replicas in them rank {short[0]} would be over its "
        "memory"
    )


def _rest(use: RankMemory) -> int:
    """Return what a rank has for experts."""
    return use.capacity - use.replicated - use.kv_cache - use.buffers


def _memory(plan: Plan, tables: Sequence[Sequence[int | None]]) -> tuple[RankMemory, ...]:
    """Return every rank's memory with the new tables.

    Raises:
        InfeasibleError: some rank's experts no longer fit.
    """
    before, after = (_held(table, plan.world_size) for table in (plan.expert_of_slot, tables))
    size = plan.model.expert_bytes
    for use, had, count in zip(plan.memory, before, after, strict=True):
        if count > had and count * size > _rest(use):
            raise InfeasibleError(
                f"the rebalanced table puts {count} experts ({format_bytes(count * size)}) on rank "
                f"{use.rank}, which has {format_bytes(_rest(use))} for them",
                hints=["solve again with this traffic: `epplan solve --load COUNTS`"],
            )
    return tuple(
        use.model_copy(update={"experts": count * size})
        for use, count in zip(plan.memory, after, strict=True)
    )


def _held(tables: Sequence[Sequence[int | None]], num_ranks: int) -> list[int]:
    """Return how many experts of all layers each rank holds."""
    per_rank = len(tables[0]) // num_ranks
    return [
        sum(slot is not None for row in tables for slot in row[rank * per_rank :][:per_rank])
        for rank in range(num_ranks)
    ]


def _max_over_mean(layouts: Sequence[Layout], rows_LWE: Floats, num_gpus: int) -> tuple[float, ...]:
    found = []
    for layout, rows in zip(layouts, rows_LWE, strict=True):
        load = rows.sum(axis=0)
        heaviest = price(layout.expert, layout.share, load, num_gpus).heaviest
        found.append(heaviest * num_gpus / load.sum())
    return tuple(found)


def _priced(plan: Plan, traffic: Traffic) -> tuple[Plan, str]:
    """Return the plan with cost and certificate for its new tables, and a word about them."""
    try:
        problem = _problem(plan, traffic)
    except EpplanError as error:
        return _with_costs(plan, _no_costs(plan, error.message), 0.0), (
            f"{_NOT_PRICED}: {error.message}"
        )
    costs, contiguous_s = [], 0.0
    in_order = _shares(_contiguous(plan), plan, None)
    for layer, number in enumerate(plan.model.moe_layers):
        shares = _shares(plan.expert_of_slot[layer], plan, plan.shares(layer))
        evaluation = evaluate_layer(problem, layer, shares)
        longest = max(evaluation.worst.phases, key=lambda phase: phase.seconds)
        dispatch_s, compute_s, combine_s = evaluation.phase_seconds()
        costs.append(
            LayerCost(
                layer=number,
                dispatch_s=dispatch_s,
                compute_s=compute_s,
                combine_s=combine_s,
                total_s=evaluation.seconds,
                bound_s=0.0,
                binding=f"{longest.name}: {longest.worst}",
                verdict="rebalanced, not solved: no bound is proven",
            )
        )
        contiguous_s += evaluate_layer(problem, layer, in_order).seconds
    return _with_costs(plan, costs, contiguous_s), "priced again on the plan's topology"


def _problem(plan: Plan, traffic: Traffic) -> Problem:
    """Return the problem the plan was made for, with the new traffic.

    Raises:
        EpplanError: the topology is not here, or not the same.
    """
    known = plan.inputs.topology
    models = {rank.gpu_model for rank in plan.ranks}
    cluster = load_cluster(known.source, models.pop() if len(models) == 1 else None)
    if cluster.sha256 != known.sha256:
        raise EpplanError(f"topology {known.source} is not the one the plan was made from")
    place = {(gpu.host, gpu.index): gpu for gpu in cluster.gpus()}
    gpus = tuple(place[rank.host, rank.gpu_index] for rank in plan.ranks)
    try:
        return make_problem(cluster, gpus, plan.model, traffic, plan.slots_per_rank)
    except InfeasibleError:
        raise EpplanError("buffers for this traffic do not fit beside the experts") from None


def _contiguous(plan: Plan) -> list[int | None]:
    """Return the experts in id order, dealt evenly."""
    ranks, experts = plan.world_size, plan.model.num_experts
    slots: list[int | None] = []
    for rank in range(ranks):
        own = range(rank * experts // ranks, (rank + 1) * experts // ranks)
        slots += [*own, *[None] * (plan.slots_per_rank - len(own))]
    return slots


def _shares(
    slots: Sequence[int | None], plan: Plan, share_of_slot: Sequence[float] | None
) -> Shares:
    """Return the share of every expert's rows on each rank, [experts, ranks]."""
    shares = np.zeros((plan.model.num_experts, plan.world_size))
    for slot, expert in enumerate(slots):
        if expert is not None:
            shares[expert, slot // plan.slots_per_rank] = (
                1.0 if share_of_slot is None else share_of_slot[slot]
            )
    return shares


def _no_costs(plan: Plan, why: str) -> list[LayerCost]:
    return [
        LayerCost(
            layer=layer,
            dispatch_s=0.0,
            compute_s=0.0,
            combine_s=0.0,
            total_s=0.0,
            bound_s=0.0,
            binding=_NOT_PRICED,
            verdict=f"{_NOT_PRICED}: {why}",
        )
        for layer in plan.model.moe_layers
    ]


def _with_costs(plan: Plan, costs: Sequence[LayerCost], contiguous_s: float) -> Plan:
    slowest = max(costs, key=lambda cost: cost.total_s)
    certificate = Certificate(
        status="limit",
        objective_s=sum(cost.total_s for cost in costs),
        bound_s=0.0,
        gap=1.0,
        seconds=0.0,
        binding=f"layer {slowest.layer}: {slowest.binding}",
        contiguous_s=contiguous_s,
        solver=_SOLVER,
        scope="nothing is proven: made by `epplan rebalance`, which evens out rows of GPUs",
    )
    return plan.model_copy(update={"cost": tuple(costs), "certificate": certificate})
