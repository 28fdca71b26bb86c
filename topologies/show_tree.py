"""Hosts as trees, the way `lstopo` shows them: host, NUMA node, PCIe switch, GPU or NIC."""

from collections import defaultdict

from rich.tree import Tree

from .graph import Cluster, Gpu, Nic, Node, Numa, PcieSwitch, Plane
from .units import format_bandwidth, format_bytes


def host_trees(cluster: Cluster) -> list[Tree]:
    """Return one tree for every set of hosts that are alike inside."""
    alike: dict[tuple[str, ...], tuple[list[str], Tree]] = {}
    for host, members in cluster.by_host().items():
        tree = Tree(host)
        shape = tuple(_grow(cluster, host, members, tree))
        if shape:
            alike.setdefault(shape, ([], tree))[0].append(host)
    for hosts, tree in alike.values():
        tree.label = ", ".join(hosts)
    return [tree for _, tree in alike.values()]


def _grow(cluster: Cluster, host: str, members: list[Node], tree: Tree) -> list[str]:
    """Fill a host's tree; return its lines, by which alike hosts are known."""
    inside = {node.id for node in members}
    pcie: dict[str, list[str]] = defaultdict(list)
    for tail, head, link in cluster.links():
        if link.kind == "pcie" and {tail, head} <= inside:
            pcie[tail].append(head)
    lines: list[str] = []
    placed: set[str] = set()

    def grow(node: str, parent: Tree, depth: int) -> None:
        placed.add(node)
        label = _label(cluster, node)
        lines.append(f"{depth} {label}")
        branch = parent.add(label)
        for child in pcie[node]:
            if child not in placed and not isinstance(cluster.node(child), Numa):
                grow(child, branch, depth + 1)

    for node in members:
        if isinstance(node, Numa):
            grow(node.id, tree, 1)
    for node in members:
        if isinstance(node, Gpu | Nic) and node.id not in placed:
            grow(node.id, tree, 1)
    for node in members:
        if isinstance(node, Plane):
            grow(node.id, tree, 1)
    return lines


def _label(cluster: Cluster, name: str) -> str:
    node = cluster.node(name)
    own = name.removeprefix(f"{node.host}/")
    if isinstance(node, Gpu):
        model = node.profile.name if node.profile else "unknown model"
        memory = [format_bytes(node.memory_bytes)] if node.memory_bytes else []
        links = [f"{node.links} NVLinks"] if node.links else []
        bus = [node.pci_bus_id] if node.pci_bus_id else []
        return " ".join([own, ", ".join([model, *memory, *links, *bus])])
    if isinstance(node, Nic):
        rate = node.rated_bytes_per_s
        speed = "speed unknown" if rate is None else f"{rate * 8 / 1e9:g} Gb/s"
        bus = [node.pci_bus_id] if node.pci_bus_id else []
        return " ".join([own, ", ".join([speed, *bus])])
    if isinstance(node, PcieSwitch):
        return f"PCIe switch {own}{_slowest(cluster, name)}"
    if isinstance(node, Plane):
        ports = [cluster.node(other) for other in cluster.graph[name]]
        return f"{own}, joins {sum(isinstance(port, Gpu) for port in ports)} GPUs"
    return f"NUMA node {node.index}" if isinstance(node, Numa) else own


def _slowest(cluster: Cluster, switch: str) -> str:
    """Return the slowest PCIe link of a switch, which is the one that matters."""
    links = [cluster.link(switch, other) for other in cluster.graph[switch]]
    rates = [link.rated_bytes_per_s for link in links if link.kind == "pcie"]
    return f", {format_bandwidth(min(rates))}" if rates else ""
