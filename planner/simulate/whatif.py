"""Another cluster than the one there is: a host less, other NICs, fewer uplinks."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, Link, NetworkSwitch, Nic


def without_hosts(cluster: Cluster, hosts: Sequence[str]) -> Cluster:
    """Return the cluster without some hosts.

    Raises:
        InputError: unknown hosts, with the known ones.
    """
    known = cluster.by_host()
    unknown = [host for host in hosts if host not in known]
    if unknown:
        raise InputError(
            f"{cluster.name} has no host {', '.join(unknown)}",
            hints=[f"hosts: {', '.join(list(known)[:16])}{', ...' if len(known) > 16 else ''}"],
        )
    gone = {node.id for host in hosts for node in known[host]}
    graph = cluster.graph.copy()
    graph.remove_nodes_from(gone)
    return replace(cluster, graph=graph, name=f"{cluster.name} without {', '.join(hosts)}")


def with_nics(cluster: Cluster, bytes_per_s: float) -> Cluster:
    """Return the cluster with every NIC port and its cable at another rated speed.

    Raises:
        InputError: the cluster has no NIC.
    """
    nics = {nic.id for nic in cluster.nodes(Nic)}
    if not nics:
        raise InputError(f"{cluster.name} has no NIC to change")

    def changed(tail: str, head: str, link: Link) -> Link:
        if (tail in nics or head in nics) and link.kind in ("nic", "net"):
            return replace(link, rated_bytes_per_s=bytes_per_s)
        return link

    name = f"{cluster.name} with NICs of {bytes_per_s * 8 / 1e9:g}Gb/s"
    return replace(_relinked(cluster, changed), name=name)


def with_oversubscription(cluster: Cluster, ratio: float) -> Cluster:
    """Return the cluster with leafs of 1/ratio of their NICs' bandwidth towards the spines.

    Raises:
        InputError: no leaf has an uplink.
    """
    switches = {switch.id for switch in cluster.nodes(NetworkSwitch)}
    nics = {nic.id for nic in cluster.nodes(Nic)}
    below = {
        switch: sum(
            cluster.link(switch, node).rated_bytes_per_s
            for node in cluster.graph[switch]
            if node in nics
        )
        for switch in switches
    }
    leafs = {switch for switch, rate in below.items() if rate}
    up = {
        leaf: sum(
            cluster.link(leaf, node).rated_bytes_per_s
            for node in cluster.graph[leaf]
            if node in switches
        )
        for leaf in leafs
    }
    if not any(up.values()):
        raise InputError(
            f"no leaf of {cluster.name} has an uplink: there is nothing to oversubscribe",
            hints=["clusters with more than one leaf have uplinks, for example 4x8:h100,leafs=2"],
        )

    def changed(tail: str, head: str, link: Link) -> Link:
        leaf = tail if tail in leafs else head
        if leaf in leafs and {tail, head} <= switches and up[leaf]:
            return replace(
                link, rated_bytes_per_s=link.rated_bytes_per_s * below[leaf] / ratio / up[leaf]
            )
        return link

    return replace(
        _relinked(cluster, changed), name=f"{cluster.name} with leafs {ratio:g}:1 oversubscribed"
    )


def _relinked(cluster: Cluster, change: Callable[[str, str, Link], Link]) -> Cluster:
    graph = cluster.graph.copy()
    for tail, head, link in cluster.links():
        graph.edges[tail, head]["link"] = change(tail, head, link)
    return replace(cluster, graph=graph)
