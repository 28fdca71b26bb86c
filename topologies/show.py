"""A cluster for people (tables) and for programs (one object)."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epplan.errors import EpplanError

from .graph import Cluster, Gpu, Link, NetworkSwitch, Nic, Node, Numa, PcieSwitch, Plane
from .host_paths import PATH_TYPES
from .routes import Routes, find_routes
from .show_tree import host_trees
from .units import format_bandwidth, format_bytes

_LEGEND = (
    "X self, NV# that many NVLinks (a switch shares them between all pairs), NVB NVLink through "
    "one GPU, PIX one PCIe switch, PXB several, PHB the host bridge, SYS between NUMA nodes, "
    "SHM shared memory; hosts reach each other over the network unless a domain joins them"
)


def summary(cluster: Cluster) -> dict[str, Any]:
    """Return hosts, counts, assumptions and warnings as JSON values.

    `nvlinks` is the sum over GPUs of the NVLink or xGMI links their source states; links that had
    to be assumed are not counted, and named in `assumed`. `switches` are network switches.
    """
    hosts = [_host(name, nodes) for name, nodes in cluster.by_host().items()]
    return {
        "name": cluster.name,
        "hosts": hosts,
        "counts": {
            "hosts": len(hosts),
            "gpus": len(cluster.gpus()),
            "nics": len(cluster.nodes(Nic)),
            "nvlinks": sum(gpu.links for gpu in cluster.gpus()),
            "switches": len(cluster.nodes(NetworkSwitch)),
            "pcie_switches": len(cluster.nodes(PcieSwitch)),
            "nvlink_planes": sum(plane.host != "" for plane in cluster.nodes(Plane)),
            "numa_nodes": len(cluster.nodes(Numa)),
        },
        "links": [_link(tail, head, link) for tail, head, link in cluster.links()],
        "assumed": list(cluster.assumed),
        "warnings": list(cluster.warnings),
    }


def _host(name: str, nodes: list[Node]) -> dict[str, Any]:
    return {
        "name": name,
        "gpus": [
            {
                "index": node.index,
                "model": node.profile.name if node.profile else None,
                "memory_bytes": node.memory_bytes or None,
                "nvlinks": node.links,
                "numa": node.numa,
                "pci_bus_id": node.pci_bus_id,
                "uuid": node.uuid,
            }
            for node in nodes
            if isinstance(node, Gpu)
        ],
        "nics": [
            {
                "name": node.name,
                "rated_bytes_per_s": node.rated_bytes_per_s,
                "numa": node.numa,
                "pci_bus_id": node.pci_bus_id,
            }
            for node in nodes
            if isinstance(node, Nic)
        ],
        "numa_nodes": [node.index for node in nodes if isinstance(node, Numa)],
    }


def _link(tail: str, head: str, link: Link) -> dict[str, Any]:
    return {
        "from": tail,
        "to": head,
        "kind": link.kind,
        "count": link.count,
        "rated_bytes_per_s": link.rated_bytes_per_s,
        "efficiency": link.efficiency,
        "provenance": link.provenance,
    }


def tables(cluster: Cluster) -> RenderableType:
    """Return hosts, their insides as trees, the GPU matrix, assumptions and warnings."""
    parts: list[RenderableType] = [_hosts_table(cluster)]
    if cluster.nodes(NetworkSwitch):
        parts.append(_switch_table(cluster))
    parts += host_trees(cluster)
    parts += _matrices(cluster)
    for heading, lines in (("assumed", cluster.assumed), ("warnings", cluster.warnings)):
        if lines:
            parts.append(Text("\n".join([f"{heading}:", *(f"  - {line}" for line in lines)])))
    return Group(*(item for part in parts for item in (part, "")))


def _hosts_table(cluster: Cluster) -> Table:
    table = Table(title=cluster.name, title_justify="left")
    for heading in ("host", "GPUs", "memory each", "NVLinks each", "NUMA nodes", "NICs"):
        table.add_column(heading)
    for name, nodes in cluster.by_host().items():
        gpus = [node for node in nodes if isinstance(node, Gpu)]
        nics = [node for node in nodes if isinstance(node, Nic)]
        rates = {nic.rated_bytes_per_s for nic in nics}
        table.add_row(
            name,
            _counted(gpu.profile.name if gpu.profile else "unknown model" for gpu in gpus),
            ", ".join(sorted({format_bytes(gpu.memory_bytes) for gpu in gpus if gpu.memory_bytes})),
            ", ".join(str(links) for links in sorted({gpu.links for gpu in gpus})),
            str(sum(isinstance(node, Numa) for node in nodes)),
            f"{len(nics)} ({', '.join(sorted(map(_rate, rates)))})" if nics else "none",
        )
    return table


def _counted(names: Any) -> str:
    names = list(names)
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _rate(bytes_per_s: float | None) -> str:
    return "speed unknown" if bytes_per_s is None else f"{bytes_per_s * 8 / 1e9:g} Gb/s"


def _switch_table(cluster: Cluster) -> Table:
    table = Table(title="network", title_justify="left")
    for heading in ("switch", "NIC ports", "to other switches (one direction)"):
        table.add_column(heading)
    for switch in cluster.nodes(NetworkSwitch):
        below = [name for name in cluster.graph[switch.id] if isinstance(cluster.node(name), Nic)]
        others = [
            f"{name}: {link.count} cables, {format_bandwidth(link.rated_bytes_per_s)}"
            for name in cluster.graph[switch.id]
            if isinstance(cluster.node(name), NetworkSwitch)
            for link in [cluster.link(switch.id, name)]
        ]
        table.add_row(switch.id, str(len(below)), "; ".join(others) or "-")
    return table


def _matrices(cluster: Cluster) -> list[RenderableType]:
    """Return one GPU matrix for every set of hosts that are alike inside."""
    try:
        routes = find_routes(cluster)
    except EpplanError as error:
        return [Text(str(error))]
    gpus = cluster.gpus()
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for host in cluster.by_host():
        members = [number for number, gpu in enumerate(gpus) if gpu.host == host]
        rows = tuple(tuple(_cell(routes, row, column) for column in members) for row in members)
        if len(members) > 1:
            alike.setdefault(rows, []).append(host)
    return [_matrix(rows, hosts) for rows, hosts in alike.items()]


def _matrix(rows: tuple[tuple[str, ...], ...], hosts: list[str]) -> Table:
    table = Table(
        title=f"GPU to GPU on {', '.join(hosts)}",
        title_justify="left",
        caption=_LEGEND,
        caption_justify="left",
    )
    table.add_column("")
    for number in range(len(rows)):
        table.add_column(f"GPU{number}", justify="center")
    for number, row in enumerate(rows):
        table.add_row(f"GPU{number}", *row)
    return table


def _cell(routes: Routes, row: int, column: int) -> str:
    kind = PATH_TYPES[routes.path_type[row, column]]
    if kind == "LOC":
        return "X"
    if kind != "NVL":
        return kind
    ports = [
        resource
        for resource in routes.resources
        if resource.tail == routes.gpus[row] and resource.link.kind == "nvlink"
    ]
    direct = [port for port in ports if port.head == routes.gpus[column]]
    return f"NV{(direct or ports)[0].link.count}"
