"""What NCCL has to be told about a cluster, because it would choose wrongly by itself.

NCCL finds NICs and their distance alone and does it well, so that a variable is set only for what
it cannot see: which NICs lead nowhere or to another network (`NCCL_IB_HCA`), and that rails are
not joined (`NCCL_CROSS_NIC`). NCCL_IB_HCA is per host, never per rank: PXN uses other ranks' NICs.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

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


def choose_network(
    cluster: Cluster, used: Mapping[str, Collection[str]], folder: str, made_by: str
) -> Network:
    """Return what the cluster's network and hosts make necessary.

    Args:
        cluster: has these hosts.
        used: by host, as planned, the names of the NICs that its ranks are to use; none where the
            plan does not tell.
        folder: absolute path of the job's files.
        made_by: for the head of files.

    Raises:
        InputError: the cluster does not have a host.
    """
    members = cluster.by_host()
    missing = [host for host in used if host not in members]
    if missing:
        raise InputError(
            f"topology {cluster.name} has no host {', '.join(missing)}",
            hints=[f"its hosts are {', '.join(members)}; give the one the plan was made from"],
        )
    parts = _networks(cluster)
    hosts = {host: _host_nics(cluster, host, used[host], parts) for host in used}
    files: dict[str, File] = {}
    notes: list[str] = []
    of_host = {
        host: (*_adapters(host, nics, notes), *_paths(cluster, host, folder, made_by, files, notes))
        for host, nics in hosts.items()
    }
    return Network(
        variables=_rails(hosts.values()),
        of_host=of_host,
        files=tuple(files.values()),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostNics:
    """The NICs of a host: those fit for the ranks' traffic, the others, and the networks in use."""

    fit: tuple[str, ...]
    unfit: tuple[str, ...]
    networks: frozenset[int]


def _networks(cluster: Cluster) -> dict[str, int]:
    """Return the number of every switch's network; switches that cables join have the same."""
    switches = [node.id for node in cluster.nodes(NetworkSwitch)]
    fabric = cluster.graph.subgraph(switches).to_undirected()
    parts = enumerate(nx.connected_components(fabric))
    return {name: number for number, part in parts for name in part}


def _host_nics(
    cluster: Cluster, host: str, used: Collection[str], parts: Mapping[str, int]
) -> _HostNics:
    nics = [node for node in cluster.by_host()[host] if isinstance(node, Nic)]
    leafs = {nic.name: leaf for nic in nics if (leaf := leaf_of(cluster, nic.id))}
    networks = frozenset(parts[leaf] for name, leaf in leafs.items() if not used or name in used)
    joined = [nic for nic in nics if nic.name in leafs and parts[leafs[nic.name]] in networks]
    fastest = max((nic.rated_bytes_per_s or 0.0 for nic in joined), default=0.0)
    fit = tuple(nic.name for nic in joined if (nic.rated_bytes_per_s or fastest) > _SLOW * fastest)
    unfit = tuple(nic.name for nic in nics if nic.name not in fit)
    return _HostNics(fit=fit, unfit=unfit, networks=networks)


def _adapters(host: str, nics: _HostNics, notes: list[str]) -> list[Variable]:
    """Return NCCL_IB_HCA where some NICs of a host cannot carry the ranks' traffic."""
    if not nics.fit or not nics.unfit:
        return []
    unfit, fit = ", ".join(nics.unfit), ", ".join(nics.fit)
    if any(_NO_DEVICE.match(name) for name in nics.fit):
        notes.append(
            f"{host}: {unfit} should not carry traffic, but NCCL_IB_HCA needs RDMA devices, and "
            f"the source names {fit}"
        )
        return []
    return [
        Variable(
            name="NCCL_IB_HCA",
            value="=" + ",".join(nics.fit),
            reason=f"NCCL would use {unfit} of {host}: no cable, another or a much slower network",
        )
    ]


def _paths(
    cluster: Cluster,
    host: str,
    folder: str,
    made_by: str,
    files: dict[str, File],
    notes: list[str],
) -> list[Variable]:
    """Return NCCL_TOPO_FILE where the source tells bus ids; equal hosts share a file."""
    text = nccl_topology(cluster, host, made_by)
    if text is None:
        notes.append(f"{host}: no NCCL topology file: the source has no PCI bus ids")
        return []
    file = files.setdefault(text, File(name=f"nccl-topology-{len(files)}.xml", text=text))
    return [
        Variable(
            name="NCCL_TOPO_FILE",
            value=f"{folder}/{file.name}",
            reason="PCI paths as in --topology; NCCL adds what it finds itself",
        )
    ]


def _rails(hosts: Iterable[_HostNics]) -> tuple[Variable, ...]:
    """Return NCCL_CROSS_NIC=0 where NICs of one host hang on networks that nothing joins."""
    if all(len(nics.networks) < 2 for nics in hosts):
        return ()
    return (
        Variable(
            name="NCCL_CROSS_NIC",
            value="0",
            reason="no switch joins the rails: a NIC reaches only NICs of its own rail",
        ),
    )
