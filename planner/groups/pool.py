"""The GPUs an EP group can be chosen from: what limits each of them, and parts of the network.

The routes over all GPUs serve every group: which NICs a GPU uses and which switches its bytes take
depends on the cluster only, so a group's routes are these with all other GPUs silent.

    rate       most bytes/s between a GPU and other islands when nothing else moves
    port       most bytes/s that can leave or enter a GPU, over all its links together
    level      regions: the islands; what hangs on the same leafs; the same with the switches above
    cut        bytes/s of the links that everything leaving or entering a region must take
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt

from epplan.topologies.graph import Cluster, Gpu, NetworkSwitch
from epplan.topologies.hardware import hardware
from epplan.topologies.host_paths import PATH_TYPES, leaf_of
from epplan.topologies.routes import Routes, find_routes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What limits bytes one way, out of GPUs or into them, in bytes/s."""

    rate: Floats  # [gpus]; 0 for a GPU without a way to other islands
    port: Floats  # [gpus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Regions: disjoint unions of islands, with what joins each to the others."""

    region: Ints  # of every GPU, [gpus]
    cut_out: Floats  # bytes/s, [regions]
    cut_in: Floats

    @property
    def contiguous(self) -> bool:
        """Whether every region's GPUs follow each other in cluster order."""
        return int(np.count_nonzero(np.diff(self.region))) == len(self.cut_out) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All GPUs of known model, in cluster order.

    Attributes:
        gpus: the GPUs.
        routes: between all of them; pairs that cannot reach each other have the path type DIS.
        out: limits of bytes leaving.
        into: limits of bytes entering.
        levels: regions, from islands upwards; none where one island holds everything.
        leafs: switches that each GPU's NICs hang on.
        flops_per_s: reached in matrix products, [gpus].
        hbm_bytes_per_s: reached reading weights, [gpus].
    """

    gpus: tuple[Gpu, ...]
    routes: Routes
    out: Direction
    into: Direction
    levels: tuple[Level, ...]
    leafs: tuple[tuple[str, ...], ...]
    flops_per_s: Floats
    hbm_bytes_per_s: Floats

    @property
    def unreachable(self) -> npt.NDArray[np.bool_]:
        """Pairs without a path, [gpus, gpus]."""
        lost: npt.NDArray[np.bool_] = self.routes.path_type == PATH_TYPES.index("DIS")
        return lost


def make_pool(cluster: Cluster) -> Pool:
    """Return the GPUs of known model with their limits."""
    gpus = tuple(gpu for gpu in cluster.gpus() if gpu.profile is not None)
    profiles = [gpu.profile for gpu in gpus if gpu.profile is not None]
    routes = find_routes(cluster, [gpu.id for gpu in gpus], allow_unreachable=True)
    efficiency = hardware().efficiency
    return Pool(
        gpus=gpus,
        routes=routes,
        out=_direction(routes, outgoing=True),
        into=_direction(routes, outgoing=False),
        levels=tuple(_levels(cluster, routes)),
        leafs=tuple(tuple(_leafs(cluster, nics)) for nics in routes.nics),
        flops_per_s=np.array([profile.flops for profile in profiles]) * efficiency["flops"],
        hbm_bytes_per_s=np.array([profile.hbm for profile in profiles]) * efficiency["hbm"],
    )


def _direction(routes: Routes, *, outgoing: bool) -> Direction:
    number = {name: index for index, name in enumerate(routes.gpus)}
    port, slowest = np.zeros(len(number)), np.zeros(len(number))  # bytes/s, seconds per byte
    for resource, capacity in zip(routes.resources, routes.capacity.tolist(), strict=True):
        end = number.get(resource.tail if outgoing else resource.head)
        if end is not None:
            port[end] += capacity
    for (resource_number, gpu), share in _ways_to_network(routes, outgoing).items():
        slowest[gpu] = max(slowest[gpu], share / routes.capacity[resource_number])
    rate = np.divide(1.0, slowest, out=np.zeros(len(number)), where=slowest > 0)
    return Direction(rate=rate, port=port)


def _ways_to_network(routes: Routes, outgoing: bool) -> dict[tuple[int, int], float]:
    """Return which share of a GPU's bytes to (or from) every other island each resource carries.

    Those are the flows between one GPU and, with weight 1, all GPUs of all other islands.
    """
    here, there = routes.sources, routes.destinations
    if not outgoing:
        here, there = there, here
    island = routes.island
    num_remote = len(island) - np.bincount(island)[island]
    ways: dict[tuple[int, int], float] = defaultdict(float)
    for flow in np.flatnonzero(np.diff(here.indptr) == 1).tolist():
        gpu, share = int(here.indices[here.indptr[flow]]), float(here.data[here.indptr[flow]])
        ends = slice(there.indptr[flow], there.indptr[flow + 1])
        others = there.indices[ends]
        if (
            len(others) == num_remote[gpu] > 0
            and (there.data[ends] == 1).all()
            and (island[others] != island[gpu]).all()
        ):
            ways[int(routes.resource_of_flow[flow]), gpu] += share
    # What other flows of the same link carry adds to it, except where islands are taken out.
    negative = {
        int(routes.resource_of_flow[flow])
        for flow in np.flatnonzero(here.min(axis=1).toarray().ravel() < 0)
    }
    return {way: share for way, share in ways.items() if way[0] not in negative}


def _leafs(cluster: Cluster, nics: tuple[str, ...]) -> Iterator[str]:
    leafs = (leaf_of(cluster, nic) for nic in nics)
    yield from dict.fromkeys(leaf for leaf in leafs if leaf is not None)


def _levels(cluster: Cluster, routes: Routes) -> Iterator[Level]:
    """Yield regions from islands upwards, until one region holds everything or nothing joins.

    A path from one region to another leaves the first over one of the links counted in its cut: a
    cable of its NICs on the level of islands, else a link from one of its switches to another
    switch. So the cut carries every byte that leaves, whatever the routing.
    """
    island = routes.island
    switches = {switch.id for switch in cluster.nodes(NetworkSwitch)}
    inside: dict[str, set[str]] = {}  # by island
    for gpu, nics in enumerate(routes.nics):
        inside.setdefault(f"island {island[gpu]}", set()).update(nics)
    joined: nx.Graph[str] = nx.Graph()
    for name, nics_of in inside.items():
        joined.add_node(name)
        joined.add_edges_from((name, nic) for nic in nics_of)
    previous = 0
    while True:
        parts = list(nx.connected_components(joined))
        of = {name: number for number, part in enumerate(parts) for name in part}
        region = np.array([of[f"island {number}"] for number in island], dtype=np.intp)
        num_regions = len(set(region.tolist()))
        if num_regions < 2:
            return
        if num_regions != previous:
            yield _level(cluster, region, of, switches, num_regions)
        previous = num_regions
        above = [
            (name, neighbour)
            for name in of
            if name in cluster.graph
            for neighbour in cluster.graph[name]
            if neighbour in switches and neighbour not in of
        ]
        if not above:
            return
        joined.add_edges_from(above)


def _level(
    cluster: Cluster, region: Ints, of: dict[str, int], switches: set[str], num_regions: int
) -> Level:
    cut_out, cut_in = np.zeros(num_regions), np.zeros(num_regions)
    names = sorted(set(region.tolist()))  # components of GPUs, renumbered without gaps
    place = {number: index for index, number in enumerate(names)}
    for name, number in of.items():
        if name not in cluster.graph or number not in place:
            continue
        for neighbour in cluster.graph[name]:
            if neighbour in switches and of.get(neighbour) != number:
                cut_out[place[number]] += cluster.link(name, neighbour).capacity_bytes_per_s
                cut_in[place[number]] += cluster.link(neighbour, name).capacity_bytes_per_s
    return Level(
        region=np.array([place[number] for number in region.tolist()], dtype=np.intp),
        cut_out=cut_out,
        cut_in=cut_in,
    )
