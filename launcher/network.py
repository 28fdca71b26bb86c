"""What NCCL has to be told about a cluster, because it would choose wrongly by itself.

NCCL finds NICs and their distance alone and does it well, so that a variable is set only for what
it cannot see: which NICs lead nowhere or to a slower network (`NCCL_IB_HCA`), and that rails are
not joined (`NCCL_CROSS_NIC`). NCCL_IB_HCA is per host, never per rank: PXN uses other ranks' NICs.
"""

import re
from collections.abc import Sequence

import networkx as nx

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, NetworkSwitch, Nic
from epplan.topologies.host_paths import leaf_of

from .environment import Variable
from .job import File, Network
from .nccl_topology import nccl_topology

# Names of network interfaces, and those that epplan gives to NICs it knows from a profile alone:
# neither is the name of an RDMA device, which NCCL_IB_HCA takes.
_NO_DEVICE = re.compile(r"(eth|en[opsxP]|ib|bond|nic)[0-9]")
_SLOW = 0.5  # of the host's fastest NIC: another network, for storage or management


def choose_network(cluster: Cluster, hosts: Sequence[str], folder: str, made_by: str) -> Network:
    """Return what the cluster's network and hosts make necessary.

    Args:
        cluster: has these hosts.
        hosts: of the plan, by their planned names.
        folder: absolute path of the job's files.
        made_by: for the head of files.

    Raises:
        InputError: the cluster does not have a host.
    """
    members = cluster.by_host()
    missing = [host for host in hosts if host not in members]
    if missing:
        raise InputError(
            f"topology {cluster.name} has no host {', '.join(missing)}",
            hints=[f"its hosts are {', '.join(members)}; give the one the plan was made from"],
        )
    of_host: dict[str, tuple[Variable, ...]] = {}
    files: dict[str, File] = {}
    notes: list[str] = []
    for host in hosts:
        nics = [node for node in members[host] if isinstance(node, Nic)]
        variables = list(_adapters(cluster, host, nics, notes))
        text = nccl_topology(cluster, host, made_by)
        if text is None:
            notes.append(f"{host}: no NCCL topology file: the source has no PCI bus ids")
        else:
            file = files.setdefault(text, File(name=f"nccl-topology-{len(files)}.xml", text=text))
            variables.append(
                Variable(
                    name="NCCL_TOPO_FILE",
                    value=f"{folder}/{file.name}",
                    reason="PCI paths as in --topology; NCCL adds what it finds itself",
                )
            )
        of_host[host] = tuple(variables)
    return Network(
        variables=_rails(cluster, hosts),
        of_host=of_host,
        files=tuple(files.values()),
        notes=tuple(notes),
    )


def _adapters(cluster: Cluster, host: str, nics: Sequence[Nic], notes: list[str]) -> list[Variable]:
    """Return NCCL_IB_HCA where some NICs of a host cannot carry the ranks' traffic."""
    cabled = [nic for nic in nics if leaf_of(cluster, nic.id)]
    fastest = max((nic.rated_bytes_per_s or 0.0 for nic in cabled), default=0.0)
    fit = [nic for nic in cabled if (nic.rated_bytes_per_s or fastest) > _SLOW * fastest]
    if not fit or len(fit) == len(nics):
        return []
    unfit = ", ".join(nic.name for nic in nics if nic not in fit)
    if any(_NO_DEVICE.match(nic.name) for nic in fit):
        notes.append(
            f"{host}: {unfit} should not carry traffic, but NCCL_IB_HCA needs RDMA devices, and "
            f"the source names {', '.join(nic.name for nic in fit)}"
        )
        return []
    return [
        Variable(
            name="NCCL_IB_HCA",
            value="=" + ",".join(nic.name for nic in fit),
            reason=f"{unfit} of {host}: no cable, or a much slower network; NCCL would use them",
        )
    ]


def _rails(cluster: Cluster, hosts: Sequence[str]) -> tuple[Variable, ...]:
    """Return NCCL_CROSS_NIC=0 where NICs of one host hang on networks that nothing joins."""
    switches = [node.id for node in cluster.nodes(NetworkSwitch)]
    fabric = cluster.graph.subgraph(switches).to_undirected()
    parts = {
        name: number for number, part in enumerate(nx.connected_components(fabric)) for name in part
    }
    for host in hosts:
        nics = [node for node in cluster.by_host()[host] if isinstance(node, Nic)]
        leafs = {leaf for nic in nics if (leaf := leaf_of(cluster, nic.id))}
        if len({parts[leaf] for leaf in leafs}) > 1:
            return (
                Variable(
                    name="NCCL_CROSS_NIC",
                    value="0",
                    reason="no switch joins the rails: a NIC reaches only NICs of its own rail",
                ),
            )
    return ()
