"""Discovered hosts and a fabric to one cluster: joined NIC port by NIC port, by GUID.

    node01/mlx5_0 (b8ce..01)  +  port b8ce..01 -- leaf1 -- spine1

A host's name in the fabric need not be its own; a port's GUID is the same in both. Rails are kept,
because every port gets its own leaf. Where a GUID is missing, nothing is guessed.
"""

from collections.abc import Iterable, Sequence

from epplan.errors import InputError

from .graph import Cluster, ClusterBuilder, Gpu, NetworkSwitch, Nic, Node, Plane
from .host_paths import leaf_of

_NAMED_AT_MOST = 5


def merge(name: str, hosts: Sequence[Cluster], fabric: Cluster | None) -> Cluster:
    """Return the hosts of several clusters on the switches of a fabric.

    Args:
        name: of the cluster.
        hosts: what was discovered; a domain that several name is one domain.
        fabric: names port GUIDs and their leafs; None keeps the hosts unconnected.

    Raises:
        InputError: a host comes twice, or hosts and fabric have no port in common.
    """
    builder = ClusterBuilder(name)
    _add_hosts(builder, hosts)
    if fabric is not None:
        _add_switches(builder, fabric)
        _cable(builder, fabric)
    return builder.build("")


def _add_hosts(builder: ClusterBuilder, clusters: Sequence[Cluster]) -> None:
    taken: set[str] = set()
    for cluster in clusters:
        twice = sorted(taken & cluster.by_host().keys())
        if twice:
            raise InputError(
                f"host {twice[0]} is in two of the files",
                hints=["were they taken on hosts of the same name? Rename one in its file"],
            )
        taken |= cluster.by_host().keys()
        for node in cluster.nodes(Node):
            if not (isinstance(node, Plane) and node.id in builder.graph):
                builder.add(node)
        for tail, head, link in cluster.links():
            builder.graph.add_edge(tail, head, link=link)
        builder.assumed += cluster.assumed
        builder.warnings += cluster.warnings
    if not any(isinstance(data["node"], Gpu) for _, data in builder.graph.nodes(data=True)):
        raise InputError("none of the files describes a GPU", hints=["epplan topo discover"])


def _add_switches(builder: ClusterBuilder, fabric: Cluster) -> None:
    switches = fabric.nodes(NetworkSwitch)
    for switch in switches:
        builder.add(switch)
    names = {switch.id for switch in switches}
    for tail, head, link in fabric.links():
        if {tail, head} <= names:
            builder.graph.add_edge(tail, head, link=link)
    builder.assumed += fabric.assumed
    builder.warnings += fabric.warnings


def _cable(builder: ClusterBuilder, fabric: Cluster) -> None:
    nodes = [data["node"] for _, data in builder.graph.nodes(data=True)]
    own = {nic.guid: nic for nic in nodes if isinstance(nic, Nic) and nic.guid}
    ports = {nic.guid: nic for nic in fabric.nodes(Nic) if nic.guid}
    _check_common(fabric, own.keys(), ports.keys())
    for guid, nic in own.items():
        port = ports.get(guid)
        leaf = leaf_of(fabric, port.id) if port else None
        if port is None or leaf is None:
            where = "is not in" if port is None else "has no cable in"
            builder.warnings.append(f"port {nic.id} ({guid}) {where} {fabric.name}; left uncabled")
            continue
        builder.connect(nic.id, leaf, fabric.link(port.id, leaf))
    _say_what_was_left(builder, fabric, set(own))


def _check_common(fabric: Cluster, own: Iterable[str], ports: Iterable[str]) -> None:
    own, ports = set(own), set(ports)
    if not ports:
        raise InputError(
            f"{fabric.name} names no port GUID, so that no rail can be told",
            hints=["give the output of ibnetdiscover or iblinkinfo as --fabric"],
        )
    if not own:
        raise InputError(
            "no host file has an InfiniBand port GUID",
            hints=["run `epplan topo discover` where /sys/class/infiniband can be read"],
        )
    if not own & ports:
        raise InputError(
            f"none of the {len(own)} port GUIDs of the hosts is among the {len(ports)} of "
            f"{fabric.name}",
            problems=[f"a host's: {min(own)}", f"the fabric's: {min(ports)}"],
            hints=["is the fabric file of this cluster?"],
        )


def _say_what_was_left(builder: ClusterBuilder, fabric: Cluster, own: set[str]) -> None:
    """Name the fabric's hosts of which no port was joined; they are left out."""
    left = [
        host
        for host, nodes in fabric.by_host().items()
        if not any(isinstance(node, Nic) and node.guid in own for node in nodes)
    ]
    if left:
        more = f" and {len(left) - _NAMED_AT_MOST} more" if len(left) > _NAMED_AT_MOST else ""
        builder.warnings.append(
            f"{fabric.name} has {len(left)} hosts without a host file, left out: "
            f"{', '.join(left[:_NAMED_AT_MOST])}{more}"
        )
