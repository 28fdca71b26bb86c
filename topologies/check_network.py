"""What is wrong between hosts: leafs cut off, faults of one rail, sources that disagree."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import networkx as nx

from .check_report import Problem
from .graph import Cluster, NetworkSwitch, Nic
from .host_paths import leaf_of
from .units import format_bandwidth

Leafs = dict[str, frozenset[str]]  # by host
_LOOK_AT_PORT = "check cable and port: `ibstat`, `iblinkinfo`"
_MAJORITY_HOSTS = 3  # fewer cannot outvote one


def find_cut_leafs(cluster: Cluster) -> Iterator[Problem]:
    """Yield the groups of leafs that do not reach the one with the most hosts."""
    switches = [switch.id for switch in cluster.nodes(NetworkSwitch)]
    hosts = Counter(leaf for leafs in leafs_of(cluster).values() for leaf in leafs)
    network = cluster.graph.subgraph(switches).to_undirected()
    parts = [sorted(hosts.keys() & part) for part in nx.connected_components(network)]
    parts = [part for part in parts if part]
    parts.sort(key=lambda part: (-sum(hosts[leaf] for leaf in part), part))
    for part in parts[1:]:
        message = f"no path to {', '.join(parts[0][:3])}{' ...' if len(parts[0]) > 3 else ''}"
        yield "fail", ", ".join(part), message, "check the uplinks of these leafs"


def find_rail_faults(cluster: Cluster) -> Iterator[Problem]:
    """Yield ports without a cable, slow ports, ports on the wrong leaf and thin uplinks."""
    hosts = {host: nics for host, nics in _fabric_nics(cluster).items() if nics}
    gpus = Counter(gpu.host for gpu in cluster.gpus())
    yield from _uncabled(cluster, hosts)
    yield from _lost_ports(cluster, {host: nics for host, nics in hosts.items() if gpus[host]})
    twins: dict[tuple[int, int], list[Nic]] = defaultdict(list)  # by number of GPUs and NICs
    for host, nics in hosts.items():
        twins[gpus[host], len(nics)] += nics
    for nics in twins.values():
        yield from _slow_ports(nics)
    yield from _wrong_leafs(cluster, hosts)
    yield from _thin_uplinks(cluster)


def leafs_of(cluster: Cluster) -> Leafs:
    """Return the switches every host is cabled to, by its NICs or as a whole."""
    return {
        host: frozenset(leaf for node in nodes if (leaf := leaf_of(cluster, node.id)))
        for host, nodes in cluster.by_host().items()
    }


def compare_leafs(cluster: Cluster, other: Cluster) -> Iterator[Problem]:
    """Yield hosts that the two sources put on different leafs.

    By name where the sources name leafs alike; otherwise by which hosts are together. A scheduler
    knows one leaf a host, a fabric one a rail: sharing any leaf is agreement.
    """
    here, there = leafs_of(cluster), leafs_of(other)
    hosts = [host for host in here if here[host] and there.get(host)]
    same_names = frozenset().union(*here.values()) & frozenset().union(*there.values())
    remedy = f"correct {cluster.name}, or the cabling"
    if same_names:
        for host in hosts:
            if not here[host] & there[host]:
                one, two = ", ".join(sorted(here[host])), ", ".join(sorted(there[host]))
                message = f"on {one} in {cluster.name}, on {two} in {other.name}"
                yield "fail", host, message, remedy
        return
    for leafs, group in _groups(here, hosts).items():
        split = Counter(there[host] for host in group)
        usual = split.most_common(1)[0][0]
        for host in group:
            if not there[host] & usual:
                message = (
                    f"on {', '.join(sorted(leafs))} with {_others(group, host)} in {cluster.name}, "
                    f"on other leafs than they ({', '.join(sorted(there[host]))}) in {other.name}"
                )
                yield "fail", host, message, remedy


def _groups(leafs: Leafs, hosts: list[str]) -> dict[frozenset[str], list[str]]:
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for host in hosts:
        groups[leafs[host]].append(host)
    return groups


def _others(group: list[str], host: str) -> str:
    others = [name for name in group if name != host]
    return ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")


def _fabric_nics(cluster: Cluster) -> dict[str, list[Nic]]:
    """Return every host's NICs that belong to the fabric: with GUIDs, where any has one."""
    with_guid = any(nic.guid for nic in cluster.nodes(Nic))
    return {
        host: [node for node in nodes if isinstance(node, Nic) and (node.guid or not with_guid)]
        for host, nodes in cluster.by_host().items()
    }


def _uncabled(cluster: Cluster, hosts: dict[str, list[Nic]]) -> Iterator[Problem]:
    """Yield ports without a cable on hosts that have cabled ones."""
    for nics in hosts.values():
        loose = [nic for nic in nics if leaf_of(cluster, nic.id) is None]
        for nic in loose if len(loose) < len(nics) else ():
            yield "fail", nic.id, "no cable to a leaf", _LOOK_AT_PORT


def _lost_ports(cluster: Cluster, hosts: dict[str, list[Nic]]) -> Iterator[Problem]:
    """Yield hosts with fewer NIC ports than others with as many GPUs."""
    size = Counter(gpu.host for gpu in cluster.gpus())
    most: dict[int, int] = defaultdict(int)
    for host, nics in hosts.items():
        most[size[host]] = max(most[size[host]], len(nics))
    for host, nics in hosts.items():
        twins = most[size[host]]
        if len(nics) < twins:
            yield "fail", host, f"{len(nics)} NIC ports, its twins have {twins}", _LOOK_AT_PORT


def _slow_ports(nics: list[Nic]) -> Iterator[Problem]:
    """Yield ports slower than those of the same name on hosts alike."""
    fastest: dict[str, float] = defaultdict(float)
    for nic in nics:
        fastest[nic.name] = max(fastest[nic.name], nic.rated_bytes_per_s or 0.0)
    for nic in nics:
        rate, twins = nic.rated_bytes_per_s, fastest[nic.name]
        if rate and rate < twins:
            message = f"{format_bandwidth(rate)}, {nic.name} elsewhere {format_bandwidth(twins)}"
            yield "fail", nic.id, message, "replace the cable or reset the port"


def _wrong_leafs(cluster: Cluster, hosts: dict[str, list[Nic]]) -> Iterator[Problem]:
    """Yield NICs on another leaf than most hosts' NIC of that place, where hosts have rails."""
    by_count: dict[int, list[list[Nic]]] = defaultdict(list)
    for nics in hosts.values():
        if len({leaf_of(cluster, nic.id) for nic in nics} - {None}) > 1:
            by_count[len(nics)].append(nics)
    for count, group in by_count.items():
        for place in range(count if len(group) >= _MAJORITY_HOSTS else 0):
            leafs = Counter(leaf_of(cluster, nics[place].id) for nics in group)
            usual, votes = leafs.most_common(1)[0]
            if usual is None or votes <= len(group) / 2:
                continue
            for nics in group:
                leaf = leaf_of(cluster, nics[place].id)
                if leaf not in (usual, None):
                    message = f"on {leaf}; this rail is {usual} on {votes} of {len(group)} hosts"
                    yield "fail", nics[place].id, message, "swap the cables"


def _thin_uplinks(cluster: Cluster) -> Iterator[Problem]:
    """Yield leafs with less to the switches above than leafs with as many ports below."""
    up: dict[str, float] = {}
    below: dict[str, int] = {}
    for switch in cluster.nodes(NetworkSwitch):
        neighbours = list(cluster.graph[switch.id])
        below[switch.id] = sum(isinstance(cluster.node(x), Nic) for x in neighbours)
        if below[switch.id]:
            up[switch.id] = sum(
                cluster.link(switch.id, x).rated_bytes_per_s
                for x in neighbours
                if isinstance(cluster.node(x), NetworkSwitch)
            )
    most: dict[int, float] = defaultdict(float)
    for leaf, rate in up.items():
        most[below[leaf]] = max(most[below[leaf]], rate)
    for leaf, rate in up.items():
        twins = most[below[leaf]]
        if rate < twins:
            message = f"uplinks of {format_bandwidth(rate)}, its twins' {format_bandwidth(twins)}"
            yield "warn", leaf, message, "check for uplinks that are down: `iblinkinfo`"
