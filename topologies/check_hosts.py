"""What is wrong inside hosts: lost NVLinks, MIG, fabric health, far and shared NICs, slow slots."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal

import networkx as nx

from .check_report import Problem
from .graph import Cluster, Gpu, Graph, Link, NetworkSwitch, Nic, Numa, PcieSwitch
from .host_paths import HostPaths, host_paths, leaf_of
from .units import format_bandwidth

_FAR: tuple[tuple[str | None, Literal["warn", "fail"], str], ...] = (
    (None, "fail", "no way to a NIC: traffic cannot leave the host"),
    ("PHB", "warn", "nearest NIC is behind the host bridge (PHB)"),
    ("SYS", "fail", "nearest NIC is on another NUMA node (SYS)"),
)


def find_lost_links(cluster: Cluster) -> Iterator[Problem]:
    """Yield GPUs with fewer NVLinks than others of their model, and models short of links."""
    remedy = "look at `nvidia-smi nvlink -s` and the kernel log, reset or replace the GPU"
    for gpus in _by_model(cluster).values():
        most = max(gpu.links for gpu in gpus)
        telling = {gpu.host for gpu in gpus if gpu.links}
        profile = gpus[0].profile
        for gpu in gpus:
            is_told = gpu.host in telling or not _nvlinks(cluster, gpu)  # else they are assumed
            if gpu.links < most and is_told and not gpu.mig:
                yield "fail", gpu.id, f"{gpu.links} NVLinks, its twins have {most}", remedy
        if profile and 0 < most < profile.links:
            hosts = ", ".join(dict.fromkeys(gpu.host for gpu in gpus))
            message = f"all {profile.name} have {most} NVLinks, the model has {profile.links}"
            yield "warn", hosts, message, "check the board and the fabric manager"


def _nvlinks(cluster: Cluster, gpu: Gpu) -> list[Link]:
    """Return the GPU's NVLinks in the graph, which may be assumed ones."""
    links = [cluster.link(gpu.id, other) for other in cluster.graph[gpu.id]]
    return [link for link in links if link.kind == "nvlink"]


def _by_model(cluster: Cluster) -> dict[str, list[Gpu]]:
    models: dict[str, list[Gpu]] = defaultdict(list)
    for gpu in cluster.gpus():
        models[gpu.profile.name if gpu.profile else "unknown"].append(gpu)
    return models


def find_mig(cluster: Cluster) -> Iterator[Problem]:
    """Yield GPUs in MIG mode."""
    for gpu in cluster.gpus():
        if gpu.mig:
            message = "MIG is on: its instances have no NVLink and no topology"
            yield "fail", gpu.id, message, "`nvidia-smi -mig 0` on a drained host"


def find_fabric_faults(cluster: Cluster) -> Iterator[Problem]:
    """Yield what the fabric manager reports."""
    for gpu in cluster.gpus():
        for fault in gpu.faults or ():
            remedy = "look at `nvidia-smi -q` (Fabric) and the fabric manager's log"
            yield "fail", gpu.id, fault, remedy


def _paths_with_all_nics(cluster: Cluster) -> Iterator[tuple[str, list[Gpu], HostPaths]]:
    """Yield every host's paths; where no NIC is cabled, as if all were."""
    for host, members in cluster.by_host().items():
        nics = [node.id for node in members if isinstance(node, Nic)]
        gpus = [node for node in members if isinstance(node, Gpu)]
        view = cluster
        if not any(leaf_of(cluster, nic) for nic in nics):
            leaf = NetworkSwitch(id="any leaf")
            graph = cluster.graph.subgraph([node.id for node in members]).copy()
            graph.add_node(leaf.id, node=leaf)
            link = Link(kind="net", rated_bytes_per_s=1.0, efficiency=1.0, provenance="profile")
            graph.add_edges_from([(nic, leaf.id) for nic in nics], link=link)
            view = Cluster(name=cluster.name, graph=graph)
        yield host, gpus, host_paths(view, members)


def find_far_nics(cluster: Cluster) -> Iterator[Problem]:
    """Yield GPUs without a NIC behind their PCIe switch."""
    remedy = "move the NIC to a slot under the GPU's PCIe switch, or give the host more NICs"
    for host, gpus, paths in _paths_with_all_nics(cluster):
        ways = {
            gpu.id: paths.gpu_to_nic[gpu.id][0][0] if paths.gpu_to_nic[gpu.id] else None
            for gpu in gpus
        }
        for kind, level, message in _FAR:
            far = [name for name, path in ways.items() if (path.type if path else None) == kind]
            if far:
                yield level, host, f"{_tails(far)}: {message}", remedy


def find_shared_nics(cluster: Cluster) -> Iterator[Problem]:
    """Yield hosts whose GPUs share NICs."""
    for host, _, paths in _paths_with_all_nics(cluster):
        users: dict[str, list[str]] = defaultdict(list)
        for gpu, ways in paths.gpu_to_nic.items():
            for path, _ in ways:
                users[path.nodes[-1]].append(gpu)
        shared = {nic: gpus for nic, gpus in users.items() if len(gpus) > 1}
        if shared:
            pairs = [f"{_tail(nic)} by {_tails(gpus)}" for nic, gpus in shared.items()]
            message = f"{len(shared)} NICs are shared: {'; '.join(pairs)}"
            yield "warn", host, message, "such GPUs get a part of the port; plans count with it"


def find_slow_slots(cluster: Cluster) -> Iterator[Problem]:
    """Yield slots and bridges slower than their device, and GPUs in slower slots than twins."""
    remedy = "compare `lspci -vv` LnkCap and LnkSta; reseat the card or use a wider slot"
    fastest: dict[str, float] = {}
    for model, gpus in _by_model(cluster).items():
        fastest[model] = max((_slot(cluster, gpu.id) or 0.0 for gpu in gpus), default=0.0)
        for gpu in gpus:
            slot = _slot(cluster, gpu.id)
            if slot and slot < fastest[model]:
                message = (
                    f"PCIe {format_bandwidth(slot)}, its twins {format_bandwidth(fastest[model])}"
                )
                yield "fail", gpu.id, message, remedy
    for nic in cluster.nodes(Nic):
        slot, rate = _slot(cluster, nic.id), nic.rated_bytes_per_s
        if slot and rate and slot < rate:
            message = f"port of {format_bandwidth(rate)} in a slot of {format_bandwidth(slot)}"
            yield "warn", nic.id, message, remedy
    yield from _find_slow_bridges(cluster)


def _find_slow_bridges(cluster: Cluster) -> Iterator[Problem]:
    remedy = "check the bridge's LnkSta; in a virtual machine ask for the host's topology"
    pcie: Graph = nx.DiGraph()
    pcie.add_edges_from((a, b) for a, b, link in cluster.links() if link.kind == "pcie")
    roots = [numa.id for numa in cluster.nodes(Numa) if numa.id in pcie]
    depth = nx.multi_source_dijkstra_path_length(pcie, roots) if roots else {}
    for switch in cluster.nodes(PcieSwitch):
        own = depth.get(switch.id)
        rates = {x: cluster.link(switch.id, x).rated_bytes_per_s for x in pcie[switch.id]}
        up = max((rates[x] for x in rates if own and depth[x] < own), default=None)
        below = [x for x in rates if own and depth[x] > own]
        fastest = max(below, key=lambda name: rates[name], default=None)
        if up and fastest and up < rates[fastest]:
            device = f"{fastest} ({format_bandwidth(rates[fastest])})"
            message = f"bridge of {format_bandwidth(up)}, slower than {device} below it"
            yield "warn", switch.id, message, remedy


def _slot(cluster: Cluster, node: str) -> float | None:
    """Return the rated bytes/s of a device's PCIe link."""
    links = [cluster.link(node, other) for other in cluster.graph[node]]
    return max((link.rated_bytes_per_s for link in links if link.kind == "pcie"), default=None)


def _tail(name: str) -> str:
    """Return an id without its host."""
    return name.rpartition("/")[2]


def _tails(names: Iterable[str]) -> str:
    return ", ".join(map(_tail, names))
