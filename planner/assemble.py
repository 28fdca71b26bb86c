"""From a solution to the plan document: ranks, slots, costs, certificate, reasons in words."""

from collections.abc import Sequence

import numpy as np

import epplan
from epplan.planner.placement.row_builder import RowBuilder
from epplan.topologies.graph import Cluster, Nic
from epplan.topologies.units import format_time

from .cost import Floats, LayerEvaluation, Phase, Shares
from .plan import (
    Certificate,
    Inputs,
    LayerCost,
    Plan,
    Rank,
    RankMemory,
    Source,
    Workload,
    content_hash,
)
from .problem import MEMORY_HEADROOM, Problem
from .solve import LayerSolution, Solution
from .traffic import Traffic

_SAME = 1 + 1e-6  # times closer than this are equal
_TRANSFERS = {
    "per-choice": "one row per (token, expert) crosses the network",
    "direct": "one row per (token, rank) travels, however many of its experts are there",
    "node-dedup": "one row per (token, host or NVLink domain) crosses the network, to the GPU with "
    "the sender's number, which forwards it inside; combine is the mirror image",
}


def assemble_plan(
    *,
    cluster: Cluster,
    problem: Problem,
    traffic: Traffic,
    solution: Solution,
    topology_source: str,
    model_source: str,
    seed: int,
    command: str,
    reasons: Sequence[str],
    choice_bound_s: float | None = None,
    assumptions: Sequence[str] = (),
) -> Plan:
    """Return the plan.

    Args:
        cluster: what was planned for.
        problem: the problem solved.
        traffic: what it was solved for.
        solution: its solution.
        topology_source: SOURCE as the user gave it.
        model_source: MODEL as the user gave it.
        seed: of traffic and solver.
        command: the command line that makes this plan.
        reasons: automatic choices made before the problem, in words.
        choice_bound_s: no choice of GPUs allows less; None where there was no choice.
        assumptions: what was assumed before the problem, in words.
    """
    layers = solution.layers
    slots_per_rank = max(int(np.count_nonzero(layer.shares, axis=0).max()) for layer in layers)
    costs = [_layer_cost(problem, number, layer) for number, layer in enumerate(layers)]
    return Plan(
        epplan_version=epplan.__version__,
        command=command,
        inputs=Inputs(
            topology=Source(source=topology_source, sha256=cluster.sha256),
            model=Source(
                source=model_source, sha256=content_hash(problem.model.model_dump(mode="json"))
            ),
            traffic=Source(source=traffic.source, sha256=traffic.sha256),
            seed=seed,
        ),
        model=problem.model,
        workload=Workload(
            tokens_per_rank=traffic.tokens_per_rank,
            source_ranks=traffic.source_ranks,
            windows=traffic.windows,
            transfer=problem.transfer,
            keep_groups=problem.keep_groups,
        ),
        ranks=_ranks(cluster, problem),
        slots_per_rank=slots_per_rank,
        expert_of_slot=tuple(
            tuple(slot for slot, _ in _slots(layer.shares, slots_per_rank)) for layer in layers
        ),
        share_of_slot=_shares(layers, slots_per_rank),
        cost=tuple(costs),
        memory=_memory(problem, layers),
        certificate=_certificate(problem, solution, costs, choice_bound_s),
        assumptions=(
            *cluster.assumed,
            *traffic.assumptions,
            *assumptions,
            *_assumptions(problem),
        ),
        reasons=tuple(reasons),
    )


def _ranks(cluster: Cluster, problem: Problem) -> tuple[Rank, ...]:
    ranks = []
    for number, gpu in enumerate(problem.gpus):
        assert gpu.profile is not None  # planner.group refuses unknown models
        nics = [cluster.node(name) for name in problem.routes.nics[number]]
        ranks.append(
            Rank(
                rank=number,
                host=gpu.host,
                island=int(problem.routes.island[number]),
                gpu_index=gpu.index,
                gpu_model=gpu.profile.name,
                gpu_uuid=gpu.uuid,
                pci_bus_id=gpu.pci_bus_id,
                numa=gpu.numa,
                nics=tuple(nic.name for nic in nics if isinstance(nic, Nic)),
                memory_bytes=gpu.memory_bytes,
            )
        )
    return tuple(ranks)


def _slots(shares: Shares, per_rank: int) -> list[tuple[int | None, float]]:
    """Return expert and share of every slot, in rank order."""
    slots: list[tuple[int | None, float]] = []
    for of_rank in shares.T:
        experts: list[int | None] = [*np.flatnonzero(of_rank).tolist()]
        slots += zip(experts, of_rank[of_rank > 0].tolist(), strict=True)
        slots += [(None, 0.0)] * (per_rank - len(experts))
    return slots


def _shares(layers: Sequence[LayerSolution], per_rank: int) -> tuple[tuple[float, ...], ...] | None:
    if all(np.count_nonzero(layer.shares) == len(layer.shares) for layer in layers):
        return None  # one copy of each expert takes all of its rows
    return tuple(tuple(share for _, share in _slots(layer.shares, per_rank)) for layer in layers)


def _memory(problem: Problem, layers: Sequence[LayerSolution]) -> tuple[RankMemory, ...]:
    held = sum(np.count_nonzero(layer.shares, axis=0) for layer in layers)
    return tuple(
        use.model_copy(update={"experts": int(count) * problem.model.expert_bytes})
        for use, count in zip(problem.fixed, np.asarray(held), strict=True)
    )


def _layer_cost(problem: Problem, number: int, layer: LayerSolution) -> LayerCost:
    dispatch_s, compute_s, combine_s = layer.evaluation.phase_seconds()
    return LayerCost(
        layer=problem.model.moe_layers[number],
        dispatch_s=dispatch_s,
        compute_s=compute_s,
        combine_s=combine_s,
        total_s=layer.evaluation.seconds,
        bound_s=layer.bound_s,
        binding=_binding(problem, number, layer),
        verdict=_verdict(problem, number, layer),
    )


def _binding(problem: Problem, number: int, layer: LayerSolution) -> str:
    phase = _longest(layer.evaluation)
    if problem.transfer == "node-dedup" and phase.name != "compute":
        return f"{phase.name}: {phase.worst}"  # its rows are for a whole island's experts
    return f"{phase.name}: {phase.worst}{_whose(problem, number, layer, phase)}"


def _longest(evaluation: LayerEvaluation) -> Phase:
    return max(evaluation.worst.phases, key=lambda phase: phase.seconds)


def _whose(problem: Problem, number: int, layer: LayerSolution, phase: Phase) -> str:
    """Name the expert with most rows of the rank that loads the resource most, if it stands out."""
    rows = _rows_of_expert(problem, number)
    there = rows * layer.shares[:, phase.rank]
    if not there.any() or 2 * there.max() < there.sum():
        return ""
    expert = int(there.argmax())
    return f" (expert {expert}, {rows[expert] / rows.sum():.1%} of the layer's rows)"


def _rows_of_expert(problem: Problem, number: int) -> Floats:
    """Return the rows of every expert of a layer, mean over windows, [experts]."""
    rows: Floats = problem.counts[:, number].sum(axis=1).mean(axis=0)
    return rows


def _verdict(problem: Problem, number: int, layer: LayerSolution) -> str:
    """Say how good the layer is, and whether placement can help at all."""
    seconds = layer.evaluation.seconds
    gain = layer.contiguous_s / seconds
    found = (
        f"{gain:.2f}x contiguous, found by {layer.found_by}"
        if gain > _SAME
        else "no better than contiguous"
    )
    if layer.free_bound_s is not None:
        found += f"; without whole groups the bound is {format_time(layer.free_bound_s)}"
    if seconds > layer.bound_s * _SAME:
        return f"within {1 - layer.bound_s / seconds:.2%} of any placement; {found}"
    special = problem.replication.extra or problem.sets is not None or problem.keep_groups
    if seconds > layer.floor_s * _SAME or special:
        return f"no placement is faster; {found}"
    hot, bound = _with_a_replica(problem, number)
    text = f"no placement is faster: one expert alone takes this long anywhere; {found}"
    if bound * _SAME < seconds:
        text += f"; a second copy of expert {hot} would lower the bound to {format_time(bound)}"
    return text


def _with_a_replica(problem: Problem, number: int) -> tuple[int, float]:
    """Return the hottest expert, and the floor if its rows were split over two copies.

    However they are split, one copy keeps at least half of every row's share: a true lower bound.
    """
    layer = RowBuilder(problem).layer(number)
    rows = _rows_of_expert(problem, number)
    hot = int(rows.argmax())
    share = np.where(np.arange(len(rows)) == hot, 0.5, 1.0)
    return hot, layer.total(
        [float((phase.alone.min(axis=1) * share).max()) for phase in layer.phases]
    )


def _certificate(
    problem: Problem,
    solution: Solution,
    costs: Sequence[LayerCost],
    choice_bound_s: float | None,
) -> Certificate:
    slowest = max(costs, key=lambda cost: cost.total_s)
    objective = solution.objective_s
    if choice_bound_s is not None:
        choice_bound_s = min(choice_bound_s, objective)
    return Certificate(
        status=solution.status,
        objective_s=solution.objective_s,
        bound_s=solution.bound_s,
        gap=solution.gap,
        seconds=solution.seconds,
        binding=f"layer {slowest.layer}: {slowest.binding}",
        contiguous_s=sum(layer.contiguous_s for layer in solution.layers),
        solver=solution.solver,
        scope=(
            f"all placements with {_copies(problem)} and at most {problem.experts_per_gpu} "
            f"of a layer on a GPU, on these {problem.num_ranks} GPUs and this traffic"
            f"{_transfer_in_scope(problem)}"
        ),
        choice_bound_s=choice_bound_s,
        choice_gap=None if choice_bound_s is None else (objective - choice_bound_s) / objective,
    )


def _transfer_in_scope(problem: Problem) -> str:
    return "" if problem.transfer == "per-choice" else f", with transfer {problem.transfer}"


def _copies(problem: Problem) -> str:
    extra = problem.replication.extra
    if not extra:
        groups = ", whole routing groups on a host" if problem.keep_groups else ""
        return f"one copy of each expert{groups}"
    groups = " whole routing groups with all their copies on a host," if problem.keep_groups else ""
    return f"{extra} replicas or fewer of any experts, with any shares of their traffic,{groups}"


def _objective(problem: Problem) -> str:
    """Say how phases and windows become the objective."""
    objective, windows = problem.objective, len(problem.counts)
    text = (
        "a layer takes the longer of transfers and experts, which overlap"
        if objective.overlap
        else "phases are added, not overlapped"
    )
    if windows > 1:
        worst = objective.num_worst(windows)
        which = f"the worst {worst} of {windows}" if worst < windows else f"{windows}"
        text += f"; a time is the mean over {which} windows of traffic"
    return text


def _replication(problem: Problem) -> tuple[str, ...]:
    rule = problem.replication
    if not rule.extra:
        return ()
    shares = "equal shares" if rule.equal_shares else "the plan's shares"
    text = f"every source rank spreads an expert's tokens over its copies in {shares}"
    if problem.sets is not None:
        text += (
            ": each of a token's choices goes to one of its expert's copies at random, nearer ones "
            "or not and whatever its other choices do; a token's hosts are all those that its "
            "copies are on, and rows are what is expected then"
        )
    return (text, "every expert has copies on two hosts") if rule.survive_hosts else (text,)


def _transfer(problem: Problem) -> str:
    text = _TRANSFERS[problem.transfer]
    if problem.transfer == "direct" and problem.sets is None:
        text += ": with one expert a GPU, one per (token, expert)"
    return text


def _assumptions(problem: Problem) -> tuple[str, ...]:
    links = [resource.link for resource in problem.routes.resources]
    unmeasured = sorted({link.kind for link in links if link.provenance != "measured"})
    rates = [
        "compute rates",
        *([f"capacities of {', '.join(unmeasured)} links"] if unmeasured else []),
    ]
    return (
        *_replication(problem),
        f"{_transfer(problem)}; {_objective(problem)}",
        "attention, shared experts and dense layers are left out: placement does not change them",
        f"{' and '.join(rates)} are rated x efficiency of hardware profiles, not measured here",
        f"{MEMORY_HEADROOM:.0%} of every GPU's memory is kept free",
    )
