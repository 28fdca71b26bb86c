"""A new plan after hosts were lost: for the ranks that are left, moving as little as possible.

The survivors keep their order and get new numbers; each keeps its own tokens, so that the traffic
is the old one without the rows of the lost ranks. The certificate is for the survivors' problem:
its bound holds for every placement on them, whatever it moves.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from epplan.errors import InfeasibleError, InputError
from epplan.topologies.graph import Cluster, Gpu

from .assemble import assemble_plan
from .cost import Placement, evaluate_layer, one_copy
from .levels import OPTIMAL_GAP
from .objective import Objective
from .plan import Plan, Status
from .problem import Problem, make_problem
from .repair import Held, align, improve, least_moved
from .solve import Progress, Solution, solve_placement
from .traffic import Traffic, make_traffic, with_sets
from .transfers import Transfer

LEAST = "least moved"
_SURVIVORS = re.compile(r"(?P<source>.*)@(?P<ranks>[\d,-]+)/(?P<total>\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to go on: what it moves and how fast it is."""

    name: str
    placements: tuple[Placement, ...]
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
    """How the solver proves the bound."""

    gap: float
    time_limit_s: float
    progress: Progress


def surviving_ranks(plan: Plan, lost_hosts: Sequence[str], cluster: Cluster) -> list[int]:
    """Return the ranks on the plan's other hosts, in the cluster's order of their GPUs.

    Raises:
        InputError: hosts the plan does not have, no rank is left, or the cluster lacks some.
    """
    hosts = list(dict.fromkeys(rank.host for rank in plan.ranks))
    unknown = [host for host in dict.fromkeys(lost_hosts) if host not in hosts]
    if unknown:
        raise InputError(
            f"the plan has no host {', '.join(unknown)}",
            hints=[f"its hosts are {', '.join(hosts)}"],
        )
    left = [rank for rank in plan.ranks if rank.host not in lost_hosts]
    if not left:
        raise InputError(f"no rank is left without {', '.join(lost_hosts)}: these are all hosts")
    number = {(gpu.host, gpu.index): number for number, gpu in enumerate(cluster.gpus())}
    places = {rank.rank: (rank.host, rank.gpu_index) for rank in left}
    missing = [
        f"{host}/gpu{index}" for host, index in places.values() if (host, index) not in number
    ]
    if missing:
        raise InputError(
            f"{cluster.name} has no {', '.join(missing[:5])}, which ranks of the plan run on",
            hints=["give the topology the plan was made for with --topology SOURCE"],
        )
    return sorted(places, key=lambda rank: number[places[rank]])


def surviving_gpus(plan: Plan, survivors: Sequence[int], cluster: Cluster) -> tuple[Gpu, ...]:
    """Return the GPUs of the surviving ranks."""
    known = {(gpu.host, gpu.index): gpu for gpu in cluster.gpus()}
    return tuple(known[plan.ranks[rank].host, plan.ranks[rank].gpu_index] for rank in survivors)


def surviving_traffic(
    plan: Plan, survivors: Sequence[int], load: str | None, tokens: int | None
) -> Traffic:
    """Return the survivors' part of the plan's traffic, or other traffic.

    Args:
        plan: names its traffic.
        survivors: its ranks that are left.
        load: a rule or counts file for the survivors; None: what the plan was made for.
        tokens: a rank and step; None: as in the plan.

    Raises:
        InputError: the plan's traffic cannot be read or has changed.
    """
    if load is not None:
        traffic = make_traffic(load, plan.model, len(survivors), tokens, plan.inputs.seed)
        return _with_sets(traffic, plan)
    source, before, total = _traffic_source(plan)
    remedy = ["give traffic with --load (a rule, or counts of the surviving ranks)"]
    try:
        traffic = make_traffic(source, plan.model, total, None, plan.inputs.seed)
        wanted = tokens or plan.workload.tokens_per_rank
        if traffic.tokens_per_rank != wanted:
            traffic = make_traffic(source, plan.model, total, wanted, plan.inputs.seed)
    except InputError as error:
        raise InputError(
            f"the traffic the plan was made for ({source}) cannot be read: {error.message}",
            problems=error.problems,
            hints=remedy,
        ) from None
    if traffic.sha256 != plan.inputs.traffic.sha256:
        raise InputError(
            f"{source} was changed since the plan was made from it: its sha256 was "
            f"{plan.inputs.traffic.sha256[:12]}, it is {traffic.sha256[:12]}",
            hints=remedy,
        )
    kept = [before[rank] for rank in survivors]
    traffic = _with_sets(traffic, plan)
    return replace(
        traffic.from_ranks(kept),
        source=f"{source}@{_ranges(kept)}/{total}",
        assumptions=(
            *traffic.assumptions,
            "every surviving rank keeps its own tokens; nobody takes over those of lost ranks",
        ),
    )


def _with_sets(traffic: Traffic, plan: Plan) -> Traffic:
    """Return the traffic with token sets if the plan's transfers may need them."""
    if plan.workload.transfer == "per-choice":
        return traffic
    return with_sets(traffic, plan.model, plan.inputs.seed)


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
    held = _held(plan, survivors)
    solution = solve_placement(
        problem,
        gap=effort.gap,
        time_limit_s=effort.time_limit_s,
        seed=plan.inputs.seed,
        progress=effort.progress,
    )
    options = _options(problem, held, solution, extra_loads)
    chosen = options[0] if len(options) == 1 else _choose(options, extra_loads)
    transfers = _transfers(plan, held, chosen.placements)
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
            reasons=_reasons(plan, lost, transfers, options, chosen),
        ),
        transfers=transfers,
        options=options,
        chosen=chosen,
        limit_reached=solution.status == "limit",
    )


def _traffic_source(plan: Plan) -> tuple[str, list[int], int]:
    """Return the plan's traffic source, and which of how many source ranks its ranks are."""
    match = _SURVIVORS.fullmatch(plan.inputs.traffic.source)
    if match is None:
        return plan.inputs.traffic.source, list(range(plan.world_size)), plan.world_size
    ranks: list[int] = []
    for part in match["ranks"].split(","):
        first, _, last = part.partition("-")
        ranks += range(int(first), int(last or first) + 1)
    return match["source"], ranks, int(match["total"])


def _ranges(ranks: Sequence[int]) -> str:
    """Return numbers as `0-3,8-15`, in their order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


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


def _held(plan: Plan, survivors: Sequence[int]) -> Held:
    """Return the copies that are left, [layers, experts, new ranks]."""
    held = np.zeros((len(plan.expert_of_slot), plan.model.num_experts, len(survivors)), dtype=bool)
    for layer, of_layer in enumerate(held):
        for new, old in enumerate(survivors):
            of_layer[plan.experts_of_rank(layer, old), new] = True
    return held


def _options(
    problem: Problem, held: Held, solution: Solution, extra_loads: int | None
) -> tuple[Option, ...]:
    """Return the choices by bytes moved: the least, within the budget, and the fastest found."""
    fastest = [layer.shares.argmax(axis=1) for layer in solution.layers]
    named = [("fastest found", align(problem, held, improve(problem, held, fastest, 0)))]
    least = least_moved(problem, held)
    if least is not None:
        if extra_loads:
            named.insert(0, ("within the budget", improve(problem, held, least, extra_loads)))
        named.insert(0, (LEAST, least))
    return tuple(_option(problem, held, name, placements) for name, placements in named)


def _option(problem: Problem, held: Held, name: str, placements: Sequence[Placement]) -> Option:
    seconds = [
        evaluate_layer(problem, layer, one_copy(placement, problem.num_ranks)).seconds
        for layer, placement in enumerate(placements)
    ]
    return Option(
        name=name,
        placements=tuple(placements),
        loads=sum(
            int((~copies[np.arange(len(placement)), placement]).sum())
            for copies, placement in zip(held, placements, strict=True)
        ),
        seconds=sum(seconds),
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
    for number, (layer, placement) in enumerate(
        zip(solution.layers, chosen.placements, strict=True)
    ):
        shares = one_copy(placement, problem.num_ranks)
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


def _transfers(plan: Plan, held: Held, placements: Sequence[Placement]) -> tuple[Transfer, ...]:
    transfers = []
    for number, (copies, placement) in enumerate(zip(held, placements, strict=True)):
        for expert, rank in enumerate(placement.tolist()):
            if not copies[expert, rank]:
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


def _reasons(
    plan: Plan,
    lost: Sequence[str],
    transfers: Sequence[Transfer],
    options: Sequence[Option],
    chosen: Option,
) -> list[str]:
    stored = sum(transfer.source is None for transfer in transfers)
    copies = plan.model.num_moe_layers * plan.model.num_experts
    reasons = [
        f"replanned from {plan.sha256()[:12]} without {', '.join(lost)}",
        f"{chosen.name}: of {copies} experts {copies - len(transfers)} stay, {stored} come from "
        f"the checkpoint, {len(transfers) - stored} from other ranks",
    ]
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
    if plan.share_of_slot is not None:
        reasons.append("one copy of every expert is kept: replicas are not planned again")
    return reasons
