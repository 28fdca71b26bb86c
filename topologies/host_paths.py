"""Paths inside one host: GPU to GPU without a plane, and from every GPU to the NICs it uses.

Path types are NCCL's (src/graph/topo.h): NVL one NVLink, NVB two with a GPU between, PIX at most
one PCIe switch, PXB several, PHB through a host bridge, SYS between NUMA nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from .graph import Cluster, Gpu, Graph, NetworkSwitch, Nic, Node, Numa, PcieSwitch, Plane

PATH_TYPES = ("LOC", "NVL", "NVB", "PIX", "PXB", "PHB", "SYS", "SHM", "NET", "DIS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """Node ids from end to end, and the path's type."""

    nodes: tuple[str, ...]
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPaths:
    """Best paths inside one host.

    Attributes:
        gpu_to_gpu: by pair of GPU ids, both directions, what is reachable without a plane.
        gpu_to_nic: for every GPU its NICs' paths with the share of its traffic on each.
    """

    gpu_to_gpu: dict[tuple[str, str], Path]
    gpu_to_nic: dict[str, list[tuple[Path, float]]]


def host_paths(cluster: Cluster, members: Sequence[Node]) -> HostPaths:
    """Return the paths between the nodes of one host."""
    gpus = [node.id for node in members if isinstance(node, Gpu)]
    nics = [node.id for node in members if isinstance(node, Nic) and leaf_of(cluster, node.id)]
    mesh = _subgraph(cluster, gpus, nvlink=True)
    inside = [node.id for node in members if not isinstance(node, Plane)]
    pcie = _subgraph(cluster, inside, nvlink=False)
    to_gpu: dict[tuple[str, str], Path] = {}
    to_nic: dict[str, dict[str, Path]] = {}
    for gpu in gpus:
        found = nx.single_source_shortest_path(pcie, gpu)
        for other in gpus:
            path = _over_nvlink(cluster, mesh, gpu, other) or _over_pcie(cluster, found.get(other))
            if path and other != gpu:
                to_gpu[gpu, other] = path
        paths = {nic: _over_pcie(cluster, found.get(nic)) for nic in nics}
        to_nic[gpu] = {nic: path for nic, path in paths.items() if path}
    return HostPaths(gpu_to_gpu=to_gpu, gpu_to_nic=_share_nics(to_nic))


def leaf_of(cluster: Cluster, nic: str) -> str | None:
    """Return the network switch a NIC is cabled to, if any."""
    for neighbour in cluster.graph[nic]:
        if isinstance(cluster.node(neighbour), NetworkSwitch):
            return neighbour
    return None


def _subgraph(cluster: Cluster, members: list[str], *, nvlink: bool) -> Graph:
    """Return the part of a host with only NVLink edges, or only the others."""
    part: Graph = nx.DiGraph(cluster.graph.subgraph(members))
    part.remove_edges_from(
        [
            (a, b)
            for a, b, data in part.edges(data=True)
            if (data["link"].kind == "nvlink") != nvlink
        ]
    )
    return part


def _over_nvlink(cluster: Cluster, mesh: Graph, gpu: str, other: str) -> Path | None:
    if mesh.has_edge(gpu, other):
        return Path(nodes=(gpu, other), type="NVL")

    def width(middle: str) -> float:
        first, second = cluster.link(gpu, middle), cluster.link(middle, other)
        return min(first.capacity_bytes_per_s, second.capacity_bytes_per_s)

    between = [middle for middle in mesh[gpu] if mesh.has_edge(middle, other)]
    if not between:
        return None
    return Path(nodes=(gpu, max(between, key=width), other), type="NVB")


def _over_pcie(cluster: Cluster, nodes: list[str] | None) -> Path | None:
    """Return the PCIe path with its type; the PCIe tree has only one."""
    if nodes is None:
        return None
    kinds = [type(cluster.node(name)) for name in nodes]
    if kinds.count(Numa):
        path_type = "PHB" if kinds.count(Numa) == 1 else "SYS"
    else:
        path_type = "PIX" if kinds.count(PcieSwitch) <= 1 else "PXB"
    return Path(nodes=tuple(nodes), type=path_type)


def _share_nics(to_nic: dict[str, dict[str, Path]]) -> dict[str, list[tuple[Path, float]]]:
    """Give every GPU its share of the NICs nearest to it.

    GPUs that are equally near to the same NICs share them out: one each in turn, or several each
    when there are more NICs than GPUs.
    """
    nearest: dict[str, tuple[str, ...]] = {}
    for gpu, paths in to_nic.items():
        best = min((_distance(path) for path in paths.values()), default=None)
        nearest[gpu] = tuple(nic for nic, path in paths.items() if _distance(path) == best)
    shares: dict[str, list[tuple[Path, float]]] = {}
    for gpu, nics in nearest.items():
        if not nics:
            shares[gpu] = []
            continue
        sharers = [other for other, theirs in nearest.items() if theirs == nics]
        place = sharers.index(gpu)
        many = len(nics) >= len(sharers)
        mine = nics[place :: len(sharers)] if many else nics[place % len(nics) :][:1]
        shares[gpu] = [(to_nic[gpu][nic], 1 / len(mine)) for nic in mine]
    return shares


def _distance(path: Path) -> tuple[int, int]:
    return PATH_TYPES.index(path.type), len(path.nodes)
