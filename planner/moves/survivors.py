"""What is left when hosts are lost: ranks, GPUs, and their part of the traffic."""

import re
from collections.abc import Sequence
from dataclasses import replace

from epplan.errors import InputError
from epplan.planner.plan import Plan
from epplan.planner.traffic import Traffic, make_traffic, with_sets
from epplan.topologies.graph import Cluster, Gpu

_SURVIVORS = re.compile(r"(?P<source>.*)@(?P<ranks>[\d,-]+)/(?P<total>\d+)", re.DOTALL)


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
