"""The cluster graph: one networkx digraph, whatever it was read from.

Nodes are GPUs, NVSwitch planes, PCIe switches, NUMA nodes, NIC ports and network switches, and bare
hosts where the source does not look inside; every edge is one direction of a link with a capacity
and where that number came from.

    host a                                      network
      gpu0 == nvswitch (plane) == gpu1
        |                          |
      pcie0 -- nic0 ----------- leaf1 -- spine1
        |
      numa0 -- numa1

A switched NVLink fabric is a plane with a capacity per port; a mesh is edges between GPUs. The
links of a GPU to a plane are never pairwise capacity.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import networkx as nx

from epplan.errors import InputError

from .hardware import GpuProfile

Graph: TypeAlias = "nx.DiGraph[str]"  # generic in its type stubs only, hence the quotes
LinkKind = Literal["nvlink", "pcie", "numa", "nic", "net", "shm"]
Provenance = Literal["measured", "read", "profile"]
AnyNode = TypeVar("AnyNode", bound="Node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Anything with links. `host` is empty for what belongs to no host."""

    id: str
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host(Node):
    """A host as its network sees it, from a source that does not look inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu(Node):
    """One GPU. `links` is the number of NVLink or xGMI links its source states."""

    index: int  # among the host's GPUs
    profile: GpuProfile | None  # None: the source does not tell the model
    memory_bytes: int
    links: int = 0
    numa: int | None = None
    pci_bus_id: str | None = None
    uuid: str | None = None
    mig: bool | None = None  # None: the source does not tell
    faults: tuple[str, ...] | None = None  # of its NVLink fabric; None: nobody watches it


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic(Node):
    """One NIC port."""

    name: str
    rated_bytes_per_s: float | None  # None: the source does not tell
    numa: int | None = None
    pci_bus_id: str | None = None
    guid: str | None = None  # of the InfiniBand port, 16 hex digits: joins a host to its fabric


@dataclass(frozen=True, slots=True, kw_only=True)
class Numa(Node):
    """One NUMA node (a CPU socket or a part of it)."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane(Node):
    """What joins GPUs with a capacity per port: the NVSwitches of a domain, or shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PcieSwitch(Node):
    """One PCIe switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSwitch(Node):
    """One InfiniBand or Ethernet switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a link; parallel cables between the same two ends are one link."""

    kind: LinkKind
    rated_bytes_per_s: float
    efficiency: float
    provenance: Provenance
    count: int = 1

    @property
    def capacity_bytes_per_s(self) -> float:
        """What large transfers reach: rated x efficiency."""
        return self.rated_bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster and what had to be assumed to describe it.

    Attributes:
        name: how the user called it, or what it was read from.
        graph: node ids with the attribute `node`, directed edges with the attribute `link`.
        sha256: hash of the text it was read from.
        latency_s: measured, by path type, of a whole transfer; what is missing is a profile's.
        assumed: numbers that were not in the source, and where they came from.
        warnings: contradictions in the source, and what was made of them.
    """

    name: str
    graph: Graph
    sha256: str = ""
    latency_s: dict[str, float] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def nodes(self, kind: type[AnyNode]) -> list[AnyNode]:
        """Return all nodes of one kind, in the order they were added."""
        nodes = (data["node"] for _, data in self.graph.nodes(data=True))
        return [node for node in nodes if isinstance(node, kind)]

    def gpus(self) -> list[Gpu]:
        """Return all GPUs, contiguous per host, in index order."""
        return [
            node for nodes in self.by_host().values() for node in nodes if isinstance(node, Gpu)
        ]

    def node(self, name: str) -> Node:
        """Return the node with this id."""
        found: Node = self.graph.nodes[name]["node"]
        return found

    def link(self, tail: str, head: str) -> Link:
        """Return the link from `tail` to `head`."""
        found: Link = self.graph.edges[tail, head]["link"]
        return found

    def by_host(self) -> dict[str, list[Node]]:
        """Return the nodes of every host, hosts in order."""
        hosts: dict[str, list[Node]] = {}
        for node in self.nodes(Node):
            if node.host:
                hosts.setdefault(node.host, []).append(node)
        return hosts

    def links(self) -> Iterator[tuple[str, str, Link]]:
        """Yield every directed link."""
        for tail, head, data in self.graph.edges(data=True):
            yield tail, head, data["link"]


@dataclass(slots=True)
class ClusterBuilder:
    """Collects nodes, links and remarks; readers write into it, `build` freezes it."""

    name: str
    graph: Graph = field(default_factory=nx.DiGraph)
    latency_s: dict[str, float] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, node: AnyNode) -> AnyNode:
        """Add a node.

        Raises:
            InputError: the id is taken.
        """
        if node.id in self.graph:
            raise InputError(f"{self.name}: {node.id} appears twice")
        self.graph.add_node(node.id, node=node)
        return node

    def connect(self, tail: str, head: str, link: Link) -> None:
        """Join two nodes in both directions."""
        self.graph.add_edge(tail, head, link=link)
        self.graph.add_edge(head, tail, link=link)

    def build(self, sha256: str) -> Cluster:
        """Return the finished cluster."""
        return Cluster(
            name=self.name,
            graph=self.graph,
            sha256=sha256,
            latency_s=self.latency_s,
            assumed=tuple(dict.fromkeys(self.assumed)),
            warnings=tuple(dict.fromkeys(self.warnings)),
        )
