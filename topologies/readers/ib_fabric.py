"""An InfiniBand fabric from its nodes and cables, in whatever format they were dumped.

Every cable is listed from both ends unless one end is cut off or filtered away. Adapters become NIC
ports of the hosts their descriptions name, so that rails are kept.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric
from .ib_names import host_and_device, is_aggregation_node, switch_names

End = tuple[str, int]  # node key, port number


MAX_LINE = 4096  # longer ones are no line of these formats, and slow to match


def lines_of(text: str) -> list[str]:
    """Return the lines, cut to the length a line of these formats can have."""
    return [line[:MAX_LINE] for line in text.splitlines()]


@dataclass(slots=True)
class IbNode:
    """A switch or a channel adapter; `key` is what the format knows it by."""

    key: str
    is_switch: bool
    description: str
    recorded: bool = True  # false: only neighbours tell of it
    ports: dict[int, str] = field(default_factory=dict)  # port GUIDs where told


@dataclass(slots=True)
class IbFabric:
    """Nodes and cables, written by the readers of each format."""

    what: str
    nodes: dict[str, IbNode] = field(default_factory=dict)
    cables: dict[tuple[End, End], float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loops: int = 0

    def node(self, key: str, is_switch: bool, description: str, *, recorded: bool) -> IbNode:
        """Return a node; its own record beats what neighbours say."""
        known = self.nodes.get(key)
        if known is None:
            known = self.nodes[key] = IbNode(key, is_switch, description, recorded)
        elif recorded and not known.recorded:
            known.is_switch, known.recorded = is_switch, True
            known.description = description or known.description
        elif not known.description:
            known.description = description
        return known

    def cable(self, one: End, other: End, rate: float | None) -> None:
        """Add a cable, or the same one seen from its other end."""
        if one[0] == other[0]:
            self.loops += 1
            return
        ends = (one, other) if one < other else (other, one)
        if ends not in self.cables:
            self.cables[ends] = rate
            return
        before = self.cables[ends]
        if rate is not None and before is not None and rate != before:
            self.warnings.append(
                f"cable {ends[0][0]}[{ends[0][1]}] - {ends[1][0]}[{ends[1][1]}] is "
                f"{before * 8 / 1e9:g} Gb/s at one end and {rate * 8 / 1e9:g} Gb/s at the other; "
                "the slower is taken"
            )
            self.cables[ends] = min(rate, before)
        elif before is None:
            self.cables[ends] = rate

    def build(self) -> ClusterBuilder:
        """Return hosts, NIC ports, switches and cables."""
        writer = _Writer(self)
        writer.add_nodes()
        writer.add_cables()
        writer.say()
        return writer.fabric.finish()


class _Writer:
    def __init__(self, source: IbFabric) -> None:
        self.source = source
        self.fabric = Fabric(source.what)
        self.sharp = {
            key
            for key, node in source.nodes.items()
            if not node.is_switch and is_aggregation_node(node.description)
        }
        self.names = switch_names(
            {key: node.description for key, node in source.nodes.items() if node.is_switch}
        )
        self.rates: dict[End, float | None] = {}
        self.ports: dict[str, set[int]] = defaultdict(set)
        for ends, rate in source.cables.items():
            for end in ends:
                self.rates[end] = rate
                self.ports[end[0]].add(end[1])
        self.id_of: dict[End, str] = {}
        self.unnamed: set[str] = set()

    def add_nodes(self) -> None:
        for key, node in self.source.nodes.items():
            if node.is_switch:
                self.fabric.switch(self.names[key])
            elif key not in self.sharp:
                self._add_ports(node)

    def _add_ports(self, node: IbNode) -> None:
        """Add an adapter's cabled ports, or its first where none is cabled."""
        host, device, named = host_and_device(node.description, node.key)
        if not named:
            self.unnamed.add(node.key)
        ports = sorted(self.ports[node.key] or node.ports or {1})
        for port in ports:
            name = device if len(ports) == 1 else f"{device}:{port}"
            if f"{host}/{name}" in self.fabric.builder.graph:
                self.source.warnings.append(
                    f"host {host} has several adapters called {device}; told apart by id"
                )
                name = f"{name}-{node.key}"
            end = (node.key, port)
            guid = node.ports.get(port)
            self.id_of[end] = self.fabric.nic(host, name, self.rates.get(end), guid)

    def add_cables(self) -> None:
        for (one, other), rate in self.source.cables.items():
            if not {one[0], other[0]} & self.sharp:
                self.fabric.cable(self._id(one), self._id(other), rate)

    def _id(self, end: End) -> str:
        return self.id_of.get(end) or self.names[end[0]]

    def say(self) -> None:
        builder = self.fabric.builder
        builder.warnings += self.source.warnings
        unrecorded = sum(not node.recorded for node in self.source.nodes.values())
        for count, text in (
            (len(self.sharp), "SHARP aggregation nodes are engines inside switches; left out"),
            (self.source.loops, "cables join a node to itself; left out"),
            (unrecorded, "nodes have no record of their own, only their neighbours name them"),
            (len(self.unnamed), "adapters do not name their host; each is a host named by its id"),
        ):
            if count:
                builder.warnings.append(f"{count} {text}")
