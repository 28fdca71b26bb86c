"""A new plan after hosts were lost: for the ranks that are left, moving as little as possible.

The survivors keep their order and get new numbers; each keeps its own tokens, so that the traffic
is the old one without the rows of the lost ranks. The certificate is for the survivors' problem:
its bound holds for every placement on them, whatever it moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from epplan.errors import InfeasibleError
from epplan.planner.assemble import assemble_plan
from epplan.planner.cost import Placement, Shares, evaluate_layer, one_copy
from epplan.planner.objective import Objective
from epplan.planner.placement.levels import OPTIMAL_GAP
from epplan.planner.plan import Plan, Status
from epplan.planner.problem import Problem, Replication, even_capacity, make_problem
from epplan.planner.solve import Progress, Solution, solve_placement
from epplan.planner.traffic import Traffic
from epplan.topologies.graph import Cluster

from .recopy import least_moved_copies, more_copies
from .repair import align, improve, least_moved
from .room import Held
from .survivors import surviving_gpus
from .transfers import Transfer

LEAST = "least moved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to go on: what it moves and how fast it is."""

    name: str
    layers: tuple[Shares, ...]
    loads: int  # experts that are loaded
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """The new plan, what has to be loaded for it, and what else could have been chosen."""

    plan: Plan
    transfers: tuple[Transfer, ...]
    options: tuple[Option, ...]
    chosen: Option
    limit_reached: bool  # of the solver; a wider gap may also be what moving little costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How the solver proves the bound; looking for steps within a budget takes as long at most."""

    gap: float
    time_limit_s: float
    progress: Progress


def replan(
    plan: Plan,
    cluster: Cluster,
    topology_source: str,
    traffic: Traffic,
    survivors: Sequence[int],
    *,
    experts_per_gpu: int,
    extra_loads: int | None,
    objective: Objective,
    effort: Effort,
    command: str,
) -> Replanned:
    """Return the plan for the survivors.

    Args:
        plan: the plan that lost hosts.
        cluster: with the survivors' GPUs.
        topology_source: what it was loaded from.
        traffic: of the survivors.
        survivors: ranks of `plan`, as `surviving_ranks` orders them.
        experts_per_gpu: most experts of one layer on a GPU.
        extra_loads: experts that may be loaded beyond the least number; None: any.
        objective: what is minimised.
        effort: of the solver.
        command: the command line that makes the new plan.

    Raises:
        InfeasibleError: the survivors have too few slots or too little memory.
    """
    _check_slots(plan, survivors, experts_per_gpu)
    gpus = surviving_gpus(plan, survivors, cluster)
    problem = make_problem(
        cluster,
        gpus,
        plan.model,
        traffic,
        experts_per_gpu,
        objective,
        transfer=plan.workload.transfer,
    )
    problem = _with_replicas(problem, plan)
    before = _shares(plan, survivors)
    held = np.array([shares > 0 for shares in before])
    solution = solve_placement(
        problem,
        gap=effort.gap,
        time_limit_s=effort.time_limit_s,
        seed=plan.inputs.seed,
        progress=effort.progress,
    )
    options = _options(problem, held, before, solution, extra_loads, effort.time_limit_s)
    chosen = options[0] if len(options) == 1 else _choose(options, extra_loads)
    transfers = _transfers(plan, held, chosen.layers)
    lost = sorted({rank.host for rank in plan.ranks} - {gpu.host for gpu in gpus})
    return Replanned(
        plan=assemble_plan(
            cluster=cluster,
            problem=problem,
            traffic=traffic,
            solution=_certified(problem, solution, chosen, effort.gap),
            topology_source=topology_source,
            model_source=plan.inputs.model.source,
            seed=plan.inputs.seed,
            command=command,
            reasons=_reasons(plan, lost, transfers, options, chosen, problem),
        ),
        transfers=transfers,
        options=options,
        chosen=chosen,
        limit_reached=solution.status == "limit",
    )


def _check_slots(plan: Plan, survivors: Sequence[int], experts_per_gpu: int) -> None:
    experts, ranks = plan.model.num_experts, len(survivors)
    slots = ranks * experts_per_gpu
    if slots >= experts:
        return
    needed = -(-experts // ranks)
    raise InfeasibleError(
        f"{experts} experts a layer do not fit on the {ranks} ranks that are left with at most "
        f"{experts_per_gpu} expert{'s' * (experts_per_gpu > 1)} of a layer on a GPU: {slots} "
        f"slots, {experts - slots} too few",
        hints=[
            f"allow --experts-per-gpu {needed}",
            f"replace the lost GPUs: {-(-experts // experts_per_gpu)} are needed, then solve again",
        ],
    )


def _shares(plan: Plan, survivors: Sequence[int]) -> list[Shares]:
    """Return the shares of the copies that are left, [experts, new ranks] by layer."""
    layers = []
    for number, experts in enumerate(plan.expert_of_slot):
        shares = np.zeros((plan.model.num_experts, plan.world_size))
        for slot, (expert, share) in enumerate(zip(experts, plan.shares(number), strict=True)):
            if expert is not None:
                shares[expert, slot // plan.slots_per_rank] = share
        layers.append(shares[:, list(survivors)])
    return layers


def _num_copies(plan: Plan) -> list[int]:
    """Return the copies of every layer."""
    return [sum(expert is not None for expert in slots) for slots in plan.expert_of_slot]


def _with_replicas(problem: Problem, plan: Plan) -> Problem:
    """Return the problem with as many replicas as the plan has, or as many as there is room for."""
    experts, ranks = problem.model.num_experts, problem.num_ranks
    places = ranks * min(problem.experts_per_gpu, experts)
    most = min(max(_num_copies(plan)) - experts, places - experts)
    equal = all(
        np.allclose(of_expert[of_expert > 0], 1 / np.count_nonzero(of_expert))
        for shares in _shares(plan, range(plan.world_size))
        for of_expert in shares
    )
    low, high = 0, most  # memory of all layers has room for `low`
    while low < high:
        middle = (low + high + 1) // 2
        rule = Replication(extra=middle, equal_shares=equal)
        if _fits(replace(problem, replication=rule)):
            low = middle
        else:
            high = middle - 1
    return replace(problem, replication=Replication(extra=low, equal_shares=equal and low > 0))


def _fits(problem: Problem) -> bool:
    try:
        even_capacity(problem)
    except InfeasibleError:
        return False
    return True


def _options(
    problem: Problem,
    held: Held,
    before: list[Shares],
    solution: Solution,
    extra_loads: int | None,
    time_limit_s: float,
) -> tuple[Option, ...]:
    """Return the choices by bytes moved: the least, within the budget, and the fastest found."""
    if problem.replication.extra:
        fastest = [layer.shares for layer in solution.layers]
        least = least_moved_copies(problem, held, before)
        budget = problem.model.num_moe_layers * problem.copies_per_layer
        budget = budget if extra_loads is None else extra_loads
        more = more_copies(problem, held, least, budget, time_limit_s) if least and budget else None
    else:
        single = [layer.shares.argmax(axis=1) for layer in solution.layers]
        fastest = _one_copy_each(problem, improve(problem, held, single, 0))
        kept = least_moved(problem, held)
        least = _one_copy_each(problem, kept) if kept else None
        more = (
            _one_copy_each(problem, improve(problem, held, kept, extra_loads))
            if kept and extra_loads
            else None
        )
    named = [
        (LEAST, least),
        ("within the budget", more),
        ("fastest found", align(problem, held, fastest)),
    ]
    return tuple(_option(problem, held, name, layers) for name, layers in named if layers)


def _one_copy_each(problem: Problem, placements: Sequence[Placement]) -> list[Shares]:
    return [one_copy(placement, problem.num_ranks) for placement in placements]


def _option(problem: Problem, held: Held, name: str, layers: Sequence[Shares]) -> Option:
    return Option(
        name=name,
        layers=tuple(layers),
        loads=sum(
            int(np.count_nonzero((shares > 0) & ~copies))
            for copies, shares in zip(held, layers, strict=True)
        ),
        seconds=sum(
            evaluate_layer(problem, layer, shares).seconds for layer, shares in enumerate(layers)
        ),
    )


def _choose(options: Sequence[Option], extra_loads: int | None) -> Option:
    """Return the fastest option the budget allows."""
    least = min(option.loads for option in options)
    limit = None if extra_loads is None else least + extra_loads
    able = [option for option in options if limit is None or option.loads <= limit]
    return min(able, key=lambda option: (option.seconds, option.loads))


def _certified(problem: Problem, solution: Solution, chosen: Option, gap: float) -> Solution:
    """Return the chosen placement with the bound of the solver."""
    layers = []
    for number, (layer, shares) in enumerate(zip(solution.layers, chosen.layers, strict=True)):
        evaluation = evaluate_layer(problem, number, shares)
        layers.append(
            replace(
                layer,
                shares=shares,
                evaluation=evaluation,
                bound_s=min(layer.bound_s, evaluation.seconds),
                found_by=f"replan, {chosen.name}",
            )
        )
    bound = min(solution.bound_s, chosen.seconds)
    reached = 1 - bound / chosen.seconds if chosen.seconds else 0.0
    unproven: Status = "feasible" if reached <= gap else "limit"
    status: Status = "optimal" if reached <= OPTIMAL_GAP else unproven
    return replace(solution, layers=tuple(layers), bound_s=bound, status=status)


def _transfers(plan: Plan, held: Held, layers: Sequence[Shares]) -> tuple[Transfer, ...]:
    transfers = []
    for number, (copies, shares) in enumerate(zip(held, layers, strict=True)):
        for expert, rank in np.argwhere((shares > 0) & ~copies).tolist():
            holders = np.flatnonzero(copies[expert])
            transfers.append(
                Transfer(
                    layer=plan.model.moe_layers[number],
                    expert=expert,
                    rank=rank,
                    source=int(holders[0]) if holders.size else None,
                )
            )
    return tuple(transfers)


def _on_one_host(layers: Sequence[Shares], hosts: Sequence[str]) -> int:
    """Return how many experts, of all layers, have their copies on one host."""
    names = sorted(set(hosts))
    on_host = np.array([[host == name for name in names] for host in hosts], dtype=int)
    return sum(
        int((np.count_nonzero((shares > 0) @ on_host, axis=1) == 1).sum()) for shares in layers
    )


def _reasons(
    plan: Plan,
    lost: Sequence[str],
    transfers: Sequence[Transfer],
    options: Sequence[Option],
    chosen: Option,
    problem: Problem,
) -> list[str]:
    stored = sum(transfer.source is None for transfer in transfers)
    copies = sum(int(np.count_nonzero(shares)) for shares in chosen.layers)
    planned = sum(_num_copies(plan))
    has_replicas = planned > plan.model.num_moe_layers * plan.model.num_experts
    what = "copies of experts" if has_replicas else "experts"
    reasons = [
        f"replanned from {plan.sha256()[:12]} without {', '.join(lost)}",
        f"{chosen.name}: of {copies} {what} {copies - len(transfers)} stay, {stored} come from "
        f"the checkpoint, {len(transfers) - stored} from other ranks",
    ]
    if copies < planned:
        reasons.append(
            f"{planned - copies} of {planned} copies are not made again: to have more costs bytes "
            "(--extra) or room (--experts-per-gpu)"
        )
    hosts_before = [rank.host for rank in plan.ranks]
    fragile = _on_one_host(chosen.layers, [gpu.host for gpu in problem.gpus])
    if fragile and not _on_one_host(_shares(plan, range(plan.world_size)), hosts_before):
        reasons.append(
            f"{fragile} experts have copies on one host only now: before, none was lost with any "
            "one host"
        )
    best = min(options, key=lambda option: option.seconds)
    if best.seconds < chosen.seconds:
        reasons.append(
            f"{best.name} loads {best.loads} experts instead of {chosen.loads} and takes "
            f"{1 - best.seconds / chosen.seconds:.1%} less"
        )
    if options[0].name != LEAST:
        reasons.append(
            "the survivors cannot keep all they hold and find room for the lost experts too"
        )
    if plan.workload.transfer != "per-choice":
        reasons.append(
            "lost experts were placed as if every choice travelled by itself; costs and bound are "
            f"those of transfer {plan.workload.transfer}"
        )
    if plan.workload.keep_groups:
        reasons.append("routing groups are not kept whole: lost experts go where they cost least")
    return reasons
