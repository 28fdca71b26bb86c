"""Routes: which resources the bytes from one GPU to another use up.

A resource is one direction of a link. Traffic T [gpus, gpus] puts on a resource the sum over its
flows of (source weights) . T . (destination weights): a flow is a rectangle of pairs, so that a
cluster needs some flows per link and never a path per pair.

    NVLink port out of g     {g}                x  its domain
    NIC out                  GPUs on that NIC   x  all GPUs of other islands
    leaf uplink              GPUs under it      x  GPUs elsewhere
    mesh edge g -> h         {g}                x  {h}

An island is what is joined without the network: a host, or the hosts of one NVLink domain. Between
islands a GPU takes its nearest NICs, and switches share traffic equally over all shortest paths.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from epplan.errors import InputError

from .graph import Cluster, Gpu, Graph, Link, NetworkSwitch, Plane
from .hardware import hardware
from .host_paths import PATH_TYPES, HostPaths, host_paths, leaf_of

Floats = npt.NDArray[np.float64]
Weights = dict[int, float]  # GPU number -> share of its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One direction of a link."""

    tail: str
    head: str
    link: Link

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.link.kind} {self.tail} -> {self.head}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    """All routes between GPUs 0..G-1.

    Attributes:
        gpus: ids in rank order, G of them.
        resources: the R links that some pair uses.
        capacity: bytes/s, [R].
        resource_of_flow: [F].
        sources: share of a source's bytes in each flow, sparse [F, G].
        destinations: the same for destinations, sparse [F, G].
        path_type: index into PATH_TYPES, [G, G].
        latency_s: of a path, without the constant of starting a transfer, [G, G].
        nics: ids of the NICs of every GPU.
        island: number of every GPU's island, [G].
    """

    gpus: tuple[str, ...]
    resources: tuple[Resource, ...]
    capacity: Floats
    resource_of_flow: npt.NDArray[np.intp]
    sources: csr_array
    destinations: csr_array
    path_type: npt.NDArray[np.int8]
    latency_s: Floats
    nics: tuple[tuple[str, ...], ...]
    island: npt.NDArray[np.intp]

    def bytes_per_resource(self, traffic: Floats) -> Floats:
        """Return the bytes on every resource, [R], for `traffic` [G, G] in bytes (from, to)."""
        return _rectangles_of(self).bytes_per_resource(traffic)


@dataclass(frozen=True, slots=True)
class _Rectangles:
    """The different rectangles among the flows: links in a row carry the same ones."""

    sources: csr_array  # [different sources, G]
    destinations: csr_array  # of every rectangle, [rectangles, G]
    source_of: npt.NDArray[np.intp]  # [rectangles]
    on_resource: csr_array  # how often a resource carries a rectangle, [R, rectangles]

    def bytes_per_resource(self, traffic: Floats) -> Floats:
        """Return the bytes on every resource, [R]."""
        sent = (self.sources @ traffic)[self.source_of]
        total: Floats = self.on_resource @ self.destinations.multiply(sent).sum(axis=1)
        return total


@lru_cache(maxsize=8)  # a step prices hundreds of traffics on the same routes
def _rectangles_of(routes: Routes) -> _Rectangles:
    first_source, source = _different_rows(routes.sources)
    _, destination = _different_rows(routes.destinations)
    pairs, first, pair = np.unique(
        np.stack([source, destination]), axis=1, return_index=True, return_inverse=True
    )
    ones = np.ones(len(routes.resource_of_flow))
    shape = (len(routes.capacity), pairs.shape[1])
    return _Rectangles(
        sources=routes.sources[first_source],
        destinations=routes.destinations[first],
        source_of=pairs[0],
        on_resource=csr_array((ones, (routes.resource_of_flow, pair.ravel())), shape=shape),
    )


def _different_rows(matrix: csr_array) -> tuple[list[int], npt.NDArray[np.intp]]:
    """Return the first of every different row, and which of them each row equals."""
    number: dict[bytes, int] = {}
    first: list[int] = []
    of_row = np.empty(matrix.shape[0], dtype=np.intp)
    for row in range(matrix.shape[0]):
        here = slice(matrix.indptr[row], matrix.indptr[row + 1])
        key = matrix.indices[here].tobytes() + b"|" + matrix.data[here].tobytes()
        of_row[row] = number.setdefault(key, len(number))
        if len(first) < len(number):
            first.append(row)
    return first, of_row


def find_routes(
    cluster: Cluster, gpus: Iterable[str] | None = None, *, allow_unreachable: bool = False
) -> Routes:
    """Return the routes between `gpus` (all by default), in cluster order.

    Args:
        cluster: the cluster.
        gpus: ids.
        allow_unreachable: leave pairs without a path with path type DIS.

    Raises:
        InputError: some GPUs cannot reach each other.
    """
    wanted = set(gpus) if gpus is not None else None
    members = [gpu for gpu in cluster.gpus() if wanted is None or gpu.id in wanted]
    router = _Router(cluster, members)
    router.route_planes()
    router.route_hosts()
    router.route_network()
    if not allow_unreachable:
        router.check_reachable()
    return router.routes()


@dataclass(frozen=True, slots=True)
class _Flow:
    tail: str
    head: str
    sources: Weights
    destinations: Weights


class _Router:
    """Collects flows, path types and latencies for one group of GPUs."""

    def __init__(self, cluster: Cluster, gpus: list[Gpu]) -> None:
        self.cluster = cluster
        self.gpus = gpus
        self.number = {gpu.id: number for number, gpu in enumerate(gpus)}
        self.island = _islands(cluster, gpus)
        self.path_type = np.full((len(gpus), len(gpus)), PATH_TYPES.index("DIS"), dtype=np.int8)
        self.latency = np.zeros((len(gpus), len(gpus)))
        self.flows: list[_Flow] = []
        self.nics: list[tuple[str, ...]] = [() for _ in gpus]
        self.leafs: list[dict[str, float]] = [{} for _ in gpus]  # share of a GPU's bytes
        np.fill_diagonal(self.path_type, PATH_TYPES.index("LOC"))

    def route_planes(self) -> None:
        """Every GPU of a plane reaches every other through its own port."""
        for plane in self.cluster.nodes(Plane):
            members = [
                self.number[gpu] for gpu in self.cluster.graph[plane.id] if gpu in self.number
            ]
            members = [gpu for gpu in members if self._port(gpu, plane).rated_bytes_per_s]
            for gpu in members:
                others = {other: 1.0 for other in members if other != gpu}
                if others:
                    name = self.gpus[gpu].id
                    self.flows.append(_Flow(name, plane.id, {gpu: 1.0}, others))
                    self.flows.append(_Flow(plane.id, name, others, {gpu: 1.0}))
                kind = "SHM" if self._port(gpu, plane).kind == "shm" else "NVL"
                for other in others:
                    self._set_type(gpu, other, kind)

    def route_hosts(self) -> None:
        """Pairs of one host without a plane, and every GPU's way to its NICs."""
        for members in self.cluster.by_host().values():
            paths = host_paths(self.cluster, members)
            pairs: dict[tuple[str, str], dict[int, Weights]] = defaultdict(dict)
            for (tail, head), path in paths.gpu_to_gpu.items():
                here, there = self.number.get(tail), self.number.get(head)
                if here is None or there is None or self._is_routed(here, there):
                    continue
                self._set_type(here, there, path.type)
                for edge in pairwise(path.nodes):
                    pairs[edge].setdefault(here, {})[there] = 1.0
            for (tail, head), use in pairs.items():
                self.flows += _rectangles(tail, head, use)
            self._route_to_nics(paths)

    def route_network(self) -> None:
        """Everything between islands: the switches on all shortest paths, in equal shares."""
        switches = [switch.id for switch in self.cluster.nodes(NetworkSwitch)]
        network: Graph = nx.DiGraph(self.cluster.graph.subgraph(switches))
        under: dict[str, Weights] = defaultdict(dict)  # leaf -> GPUs with their share on it
        for gpu, leafs in enumerate(self.leafs):
            for leaf, share in leafs.items():
                under[leaf][gpu] = share
        for destination in under:
            distance = nx.single_source_shortest_path_length(network, destination)
            for source in under:
                if source in distance:
                    self._connect_leafs(under[source], under[destination], distance[source])
                    shares = _ecmp(network, distance, source)
                    for (tail, head), share in shares.items():
                        self._add_network_flow(tail, head, under[source], under[destination], share)

    def routes(self) -> Routes:
        """Return the collected routes."""
        edges = list(dict.fromkeys((flow.tail, flow.head) for flow in self.flows))
        number = {edge: index for index, edge in enumerate(edges)}
        resources = tuple(
            Resource(tail=tail, head=head, link=self.cluster.link(tail, head))
            for tail, head in edges
        )
        return Routes(
            gpus=tuple(self.number),
            resources=resources,
            capacity=np.array([resource.link.capacity_bytes_per_s for resource in resources]),
            resource_of_flow=np.array(
                [number[flow.tail, flow.head] for flow in self.flows], dtype=np.intp
            ),
            sources=self._matrix([flow.sources for flow in self.flows]),
            destinations=self._matrix([flow.destinations for flow in self.flows]),
            path_type=self.path_type,
            latency_s=self.latency,
            nics=tuple(self.nics),
            island=self.island,
        )

    def _port(self, gpu: int, plane: Plane) -> Link:
        return self.cluster.link(self.gpus[gpu].id, plane.id)

    def _is_routed(self, here: int, there: int) -> bool:
        return bool(self.path_type[here, there] != PATH_TYPES.index("DIS"))

    def _set_type(self, here: int, there: int, path_type: str) -> None:
        self.path_type[here, there] = PATH_TYPES.index(path_type)
        self.latency[here, there] = self._path_latency(path_type)

    def _path_latency(self, path_type: str) -> float:
        """Return a path type's latency; a measured one contains the start of the transfer."""
        measured = self.cluster.latency_s.get(path_type)
        if measured is None:
            return hardware().latency[path_type]
        return max(0.0, measured - hardware().latency["base"])

    def _route_to_nics(self, paths: HostPaths) -> None:
        for name, nics in paths.gpu_to_nic.items():
            gpu = self.number.get(name)
            if gpu is None:
                continue
            self.nics[gpu] = tuple(path.nodes[-1] for path, _ in nics)
            remote = self._remote(gpu)
            for path, share in nics:
                leaf = leaf_of(self.cluster, path.nodes[-1])
                assert leaf is not None  # only cabled NICs have paths
                self.leafs[gpu][leaf] = self.leafs[gpu].get(leaf, 0.0) + share
                for tail, head in pairwise((*path.nodes, leaf)):
                    self.flows.append(_Flow(tail, head, {gpu: share}, remote))
                    self.flows.append(_Flow(head, tail, remote, {gpu: share}))

    def _remote(self, gpu: int) -> Weights:
        """Return the GPUs that `gpu` reaches over the network only."""
        there = np.flatnonzero(self.island != self.island[gpu])
        return dict.fromkeys(there.tolist(), 1.0)

    def _connect_leafs(self, sources: Weights, destinations: Weights, hops: int) -> None:
        latency = self._path_latency("NET") + hops * hardware().latency["switch_hop"]
        for here in sources:
            there = np.array([gpu for gpu in destinations if self.island[gpu] != self.island[here]])
            if there.size:
                self.path_type[here, there] = PATH_TYPES.index("NET")
                self.latency[here, there] = np.maximum(self.latency[here, there], latency)

    def _add_network_flow(
        self, tail: str, head: str, sources: Weights, destinations: Weights, share: float
    ) -> None:
        """Add all pairs of two leafs, then take out those of one island: they stay inside it."""
        self.flows.append(_Flow(tail, head, _scaled(sources, share), destinations))
        for island in {self.island[gpu] for gpu in sources}:
            here = {gpu: x for gpu, x in sources.items() if self.island[gpu] == island}
            there = {gpu: x for gpu, x in destinations.items() if self.island[gpu] == island}
            if there:
                self.flows.append(_Flow(tail, head, _scaled(here, -share), there))

    def check_reachable(self) -> None:
        """Refuse pairs without a path.

        Raises:
            InputError: some GPUs cannot reach each other.
        """
        lost = np.argwhere(self.path_type == PATH_TYPES.index("DIS"))
        if not lost.size:
            return
        first, second = (self.gpus[number].id for number in lost[0])
        cut = sorted({self.gpus[number].host for number in lost[:, 0]})
        raise InputError(
            f"{self.cluster.name}: {len(lost)} of {self.path_type.size} GPU pairs have no path, "
            f"first {first} to {second}; hosts concerned: {', '.join(cut)}",
            hints=["cable their NICs to switches that are connected, or take the hosts out"],
        )

    def _matrix(self, weights: list[Weights]) -> csr_array:
        row = np.repeat(np.arange(len(weights)), [len(entry) for entry in weights])
        column = np.array([gpu for entry in weights for gpu in entry], dtype=np.intp)
        value = np.array([share for entry in weights for share in entry.values()])
        return csr_array((value, (row, column)), shape=(len(weights), len(self.gpus)))


def _islands(cluster: Cluster, gpus: list[Gpu]) -> npt.NDArray[np.intp]:
    """Return the island number of every GPU, [G]: hosts, joined by NVLink domains over hosts."""
    joined: nx.Graph[str] = nx.Graph()
    for gpu in gpus:
        joined.add_edge(f"host {gpu.host}", gpu.id)
        for neighbour in cluster.graph[gpu.id]:
            if isinstance(cluster.node(neighbour), Plane):
                joined.add_edge(neighbour, gpu.id)
    number = {
        name: index for index, part in enumerate(nx.connected_components(joined)) for name in part
    }
    return np.array([number[gpu.id] for gpu in gpus], dtype=np.intp)


def _rectangles(tail: str, head: str, use: dict[int, Weights]) -> list[_Flow]:
    """Return one edge's pairs as flows: sources with equal destinations become one."""
    groups: dict[tuple[tuple[int, float], ...], Weights] = defaultdict(dict)
    for source, destinations in use.items():
        groups[tuple(sorted(destinations.items()))][source] = 1.0
    return [_Flow(tail, head, sources, dict(group)) for group, sources in groups.items()]


def _ecmp(network: Graph, distance: dict[str, int], source: str) -> dict[tuple[str, str], float]:
    """Return the share of the traffic from `source` on every edge towards the distance-0 switch."""
    shares: dict[tuple[str, str], float] = {}
    arriving = {source: 1.0}
    while arriving:
        following: dict[str, float] = defaultdict(float)
        for switch, share in arriving.items():
            nearer = [x for x in network[switch] if distance[x] == distance[switch] - 1]
            for neighbour in nearer:
                shares[switch, neighbour] = share / len(nearer)
                following[neighbour] += share / len(nearer)
        arriving = following
    return shares


def _scaled(weights: Weights, factor: float) -> Weights:
    return {gpu: share * factor for gpu, share in weights.items()}
