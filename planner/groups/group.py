"""Which GPUs form the EP group, or several equal groups, and why."""

from collections import Counter
from dataclasses import dataclass

from epplan.errors import InfeasibleError, InputError
from epplan.planner.model import ModelSpec
from epplan.planner.problem import fixed_memory, slots_left
from epplan.planner.traffic import Traffic
from epplan.topologies.graph import Cluster, Gpu
from epplan.topologies.hardware import hardware
from epplan.topologies.units import format_time

from .choice_bound import choice_bound
from .group_price import Pricer
from .group_search import Found, gpus_of, search_groups
from .group_trial import try_groups
from .pool import Pool, make_pool

_SAME = 1 + 1e-3  # prices closer than this are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The chosen groups.

    Attributes:
        gpus: of every group, in rank order.
        reason: why these, in words.
        bound_s: no other choice of GPUs allows a faster group; None where there is no choice.
    """

    gpus: tuple[tuple[Gpu, ...], ...]
    reason: str
    bound_s: float | None = None


def group_size(
    cluster: Cluster,
    model: ModelSpec,
    ep: int | None,
    experts_per_gpu: int,
    num_groups: int = 1,
    replicas: int = 0,
) -> int:
    """Return the number of GPUs of one group.

    Raises:
        InputError: more GPUs wanted than there are, or GPUs of unknown model.
        InfeasibleError: a group has fewer slots than experts.
    """
    gpus = cluster.gpus()
    if not gpus:
        raise InputError(f"{cluster.name} has no GPU to plan for")
    copies = model.num_experts + replicas
    size = max(1, min(len(gpus) // num_groups, copies)) if ep is None else ep
    if size * num_groups > len(gpus):
        most = len(gpus) // num_groups
        wanted = f"EP={size} needs" if num_groups == 1 else f"{num_groups} groups of EP={size} need"
        raise InputError(
            f"{wanted} {size * num_groups} GPUs, {cluster.name} has {len(gpus)}",
            hints=[f"take --ep {most} or less, or a larger cluster"]
            if most
            else [f"take --groups {len(gpus)} or less, or a larger cluster"],
        )
    unknown = [gpu.id for gpu in gpus if gpu.profile is None]
    if len(gpus) - len(unknown) < size * num_groups:
        raise InputError(
            f"{cluster.name} does not tell the model of GPUs {', '.join(unknown[:8])}",
            hints=[f"give it with --gpu MODEL ({', '.join(sorted(hardware().gpus))})"],
        )
    if size * experts_per_gpu < copies:
        needed = -(-copies // experts_per_gpu)
        what = f"{model.num_experts} experts" + (f" and {replicas} replicas" if replicas else "")
        raise InfeasibleError(
            f"{what} a layer do not fit on {size} GPUs with at most "
            f"{experts_per_gpu} expert{'s' * (experts_per_gpu > 1)} of a layer on a GPU: "
            f"{size * experts_per_gpu} slots",
            hints=[
                f"allow --experts-per-gpu {-(-copies // size)}",
                f"use {needed} GPUs or more"
                + (f" (--ep {needed})" if needed <= len(gpus) else f" ({len(gpus)} are there)"),
                f"plan for {size * experts_per_gpu - replicas} experts or fewer (--experts)",
            ],
        )
    return size


def choose_groups(
    cluster: Cluster,
    model: ModelSpec,
    traffic: Traffic,
    experts_per_gpu: int,
    *,
    num_groups: int = 1,
    bounded: bool = True,
) -> Groups:
    """Return groups of as many GPUs as `traffic` has ranks, so that the slowest is fast.

    Args:
        cluster: the cluster; `group_size` has checked that it has enough GPUs.
        model: the model.
        traffic: of one group; all have the same.
        experts_per_gpu: most experts of one layer on a GPU.
        num_groups: how many groups.
        bounded: whether the bound over all choices holds: for one copy of each expert and phases
            that are added.
    """
    size = traffic.counts.shape[2]
    gpus = cluster.gpus()
    if size == len(gpus):
        return Groups(gpus=(tuple(gpus),), reason=f"EP={size}: all GPUs of the cluster")
    pool = make_pool(cluster)
    slots = slots_left(fixed_memory(pool.gpus, model, traffic, experts_per_gpu), model)
    pricer = Pricer(pool, model, traffic.counts.mean(axis=0), experts_per_gpu, slots)
    *found, in_order = search_groups(pricer, size, num_groups)
    best = try_groups(cluster, pricer, model, traffic, experts_per_gpu, found)
    return Groups(
        gpus=gpus_of(pool, best),
        reason=_reason(pool, best, in_order),
        bound_s=_bound(pool, model, traffic, experts_per_gpu) if bounded else None,
    )


def _bound(pool: Pool, model: ModelSpec, traffic: Traffic, experts_per_gpu: int) -> float:
    """Return the mean of all windows' bounds; a mean over the worst windows is not below it."""
    bounds = [choice_bound(pool, model, counts, experts_per_gpu) for counts in traffic.counts]
    return sum(bounds) / len(bounds)


def _reason(pool: Pool, best: Found, in_order: Found) -> str:
    """Say which GPUs were taken, and what that gains on the first ones in cluster order."""
    size, num_groups = len(best.groups[0].gpus), len(best.groups)
    hosts = len({gpu.host for gpu in pool.gpus})
    taken = [pool.gpus[number] for group in best.groups for number in group.gpus.tolist()]
    per_host = Counter(gpu.host for gpu in taken)
    counts = sorted(set(per_host.values()))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    what = f"EP={size}" if num_groups == 1 else f"{num_groups} groups of EP={size}"
    text = (
        f"{what}: {len(taken)} of {len(pool.gpus)} GPUs, {each} on each of {len(per_host)} of "
        f"{hosts} hosts ({best.found_by}), for {format_time(best.price.seconds)} a step under even "
        "traffic"
    )
    if best.price.shortage < in_order.price.shortage:
        return f"{text}; the first GPUs in cluster order would not do"
    gain = in_order.price.seconds / best.price.seconds
    if gain <= _SAME:
        return f"{text}, like the first GPUs in cluster order"
    return f"{text}, {gain:.2f}x faster than the first GPUs in cluster order"
