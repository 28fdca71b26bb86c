"""From a plan, or a cluster and a model, to the scene that is simulated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError
from epplan.planner.groups.group import choose_groups, group_size
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.planner.problem import needs_sets
from epplan.planner.rebalance import rebalance
from epplan.planner.token_sets import TokenSets
from epplan.planner.traffic import Traffic, make_traffic, with_sets
from epplan.topologies.graph import Cluster, Gpu
from epplan.topologies.routes import find_routes

from .device import Device, device
from .scene import Floats, Scene

Shares = tuple[Floats, ...]
Sets = tuple[tuple[TokenSets, ...], ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Which traffic is simulated."""

    source: str
    seed: int


def scene_of_plan(
    plan: Plan, cluster: Cluster, load: Load | None, devices: Mapping[str, Device]
) -> tuple[Scene, list[str]]:
    """Return a plan's scene, and what was changed because the cluster is not the planned one.

    Args:
        plan: the plan.
        cluster: where it runs; planned hosts may be missing, their experts move.
        load: other traffic than the plan's.
        devices: by GPU model; others are bundled or derived.

    Raises:
        InputError: GPUs are not in the plan's order, none is left, or its traffic has changed.
    """
    by_place = {(gpu.host, gpu.index): gpu for gpu in cluster.gpus()}
    kept = [r.rank for r in plan.ranks if (r.host, r.gpu_index) in by_place]
    if not kept:
        raise InputError(f"none of the plan's {plan.world_size} GPUs is in {cluster.name}")
    gpus = tuple(by_place[plan.ranks[rank].host, plan.ranks[rank].gpu_index] for rank in kept)
    traffic = _traffic(plan, load)
    scale = _tokens(traffic, plan.model)
    traffic = traffic.from_ranks(kept)
    counts = traffic.counts / scale
    planned = [_planned(plan, layer) for layer in range(plan.model.num_moe_layers)]
    shares, moved = [], 0
    for layer, of_layer in enumerate(planned):
        lost = np.setdiff1d(np.arange(plan.world_size), kept)
        new, number = _without(of_layer, kept, lost, counts[:, layer].mean(axis=0))
        shares.append(new)
        moved += number
    remarks = []
    if len(kept) < plan.world_size:
        gone = sorted({r.host for r in plan.ranks} - {gpu.host for gpu in gpus})
        remarks.append(
            f"without {', '.join(gone)}: {plan.world_size - len(kept)} GPUs fewer, {moved} expert "
            "copies moved to the GPUs with fewest rows"
        )
    scene = _scene(cluster, gpus, plan.model, counts, tuple(shares), devices)
    sets = _sets_per_token(traffic, scale)
    return replace(scene, sets=sets, planned=plan.workload.transfer), remarks


def _traffic(plan: Plan, load: Load | None) -> Traffic:
    planned = plan.inputs.traffic
    asked = load or Load(source=planned.source, seed=plan.inputs.seed)
    traffic = make_traffic(asked.source, plan.model, plan.world_size, None, asked.seed)
    if load is None and traffic.sha256 != planned.sha256:
        raise InputError(
            f"the plan's traffic {planned.source} was changed after planning",
            hints=[
                "make the plan again with `epplan solve`",
                f"or say that this is meant: --load {planned.source}",
            ],
        )
    if needs_sets(plan.workload.transfer, plan.slots_per_rank):
        return with_sets(traffic, plan.model, asked.seed)
    return traffic


def scene_of_cluster(
    cluster: Cluster,
    model: ModelSpec,
    size: int,
    load: Load,
    devices: Mapping[str, Device],
    *,
    replicas: int = 0,
) -> Scene:
    """Return the scene of a cluster's first GPUs, with experts in id order.

    Args:
        cluster: the cluster.
        model: the model.
        size: number of GPUs.
        load: traffic.
        devices: by GPU model; others are bundled or derived.
        replicas: extra copies of experts a layer, placed by the fast rebalance.

    Raises:
        InputError: more GPUs than there are, or replicas that do not fill the GPUs' slots.
    """
    per_gpu = -(-(model.num_experts + replicas) // size)
    group_size(cluster, model, size, per_gpu)  # refuses what does not fit
    traffic = make_traffic(load.source, model, size, None, load.seed)
    gpus = choose_groups(cluster, model, traffic, per_gpu, bounded=False).gpus[0]
    counts = _per_token(traffic, model)
    shares = (
        with_replicas(counts, model, replicas)
        if replicas
        else (_in_order(model.num_experts, size),) * model.num_moe_layers
    )
    scene = _scene(cluster, gpus, model, counts, shares, devices)
    return replace(scene, sets=_sets_per_token(traffic, _tokens(traffic, model)))


def with_replicas(counts: Floats, model: ModelSpec, replicas: int) -> Shares:
    """Return the shares of the fast rebalance with extra copies, by layer.

    Raises:
        InputError: the copies do not fill the GPUs' slots.
    """
    ranks, slots = counts.shape[2], model.num_experts + replicas
    if slots % ranks:
        fill = -slots % ranks
        raise InputError(
            f"{model.num_experts} experts and {replicas} replicas do not fill {ranks} GPUs evenly",
            hints=[f"--replicas {replicas + fill} gives every GPU {-(-slots // ranks)} copies"],
        )
    found = rebalance(counts.mean(axis=0).sum(axis=1), slots, ranks)
    rank = np.arange(slots) // (slots // ranks)
    layers = []
    for experts, parts in zip(found.expert_of_slot, found.share_of_slot, strict=True):
        shares = np.zeros((model.num_experts, ranks))
        np.add.at(shares, (experts, rank), parts)
        layers.append(shares)
    return tuple(layers)


def _scene(
    cluster: Cluster,
    gpus: tuple[Gpu, ...],
    model: ModelSpec,
    counts: Floats,
    shares: Shares,
    devices: Mapping[str, Device],
) -> Scene:
    routes = find_routes(cluster, [gpu.id for gpu in gpus])
    if routes.gpus != tuple(gpu.id for gpu in gpus):
        raise InputError(
            f"the plan's ranks are not in the order of {cluster.name}'s GPUs",
            hints=["make the plan again with `epplan solve` from this topology"],
        )
    models = [gpu.profile.name if gpu.profile else "" for gpu in gpus]
    return Scene(
        model=model,
        gpus=gpus,
        devices=tuple(devices.get(name) or device(name) for name in models),
        routes=routes,
        counts=counts,
        shares=shares,
    )


def _per_token(traffic: Traffic, model: ModelSpec) -> Floats:
    """Return assignments of one token a rank, mean over ranks and layers."""
    per_token: Floats = traffic.counts / _tokens(traffic, model)
    return per_token


def _tokens(traffic: Traffic, model: ModelSpec) -> float:
    """Return the tokens of a rank and layer, mean over all."""
    windows, layers, ranks, _ = traffic.counts.shape
    tokens: float = traffic.counts.sum() / (windows * layers * ranks * model.top_k)
    return tokens


def _sets_per_token(traffic: Traffic, tokens: float) -> Sets:
    """Return the token sets of one token a rank, if they are known."""
    if traffic.sets is None:
        return None
    return tuple(tuple(layer.scaled(1.0 / tokens) for layer in window) for window in traffic.sets)


def _planned(plan: Plan, layer: int) -> Floats:
    shares = np.zeros((plan.model.num_experts, plan.world_size))
    slots = zip(plan.expert_of_slot[layer], plan.shares(layer), strict=True)
    for slot, (expert, share) in enumerate(slots):
        if expert is not None:
            shares[expert, slot // plan.slots_per_rank] += share
    return shares


def _without(
    shares: Floats, kept: list[int], lost: npt.NDArray[np.intp], counts: Floats
) -> tuple[Floats, int]:
    """Return the shares on the kept ranks, and how many copies moved.

    An expert with copies left spreads over them; the others go where fewest rows are, the busiest
    expert first.
    """
    rows = counts.sum(axis=0)  # [experts]
    new = shares[:, kept].copy()
    left = new.sum(axis=1)
    some = left > 0
    new[some] /= left[some, None]
    load = rows @ new
    homeless = np.flatnonzero(~some)
    for expert in homeless[np.argsort(-rows[homeless], kind="stable")].tolist():
        rank = int(load.argmin())
        new[expert, rank] = 1.0
        load[rank] += rows[expert]
    return new, len(homeless) if lost.size else 0


def _in_order(experts: int, ranks: int) -> Floats:
    """Return experts in id order, as evenly as they go."""
    return np.eye(ranks)[np.arange(experts) * ranks // experts]
