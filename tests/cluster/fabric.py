"""What an emulated cluster looks like, and the cluster file that describes it to epplan.

              spine
      uplink /     \\ uplink          uplinks are rate limited in each direction,
         leaf1     leaf2              and so is every host's cable to its leaf
         /  \\       /  \\
        a    b     c    d             hosts of some ranks each

All rates are what the shaper lets through: Ethernet frames with all their headers.
"""

from dataclasses import dataclass, replace
from typing import Any

import yaml

RANK_MEMORY = "1GiB"
# Inside a host nothing is shaped; `topo measure` finds what memory carries, and no more than this.
MEMORY_RATE = "10GB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedHost:
    """One host: its ranks share one NIC of `mbit_per_s`, in and out."""

    name: str
    ranks: int
    mbit_per_s: int
    leaf: str = "leaf1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """Hosts on leafs; `uplinks` are the leafs' cables to the spine, in Mbit/s.

    Without uplinks there is one leaf and no spine.
    """

    name: str
    description: str
    hosts: tuple[EmulatedHost, ...]
    uplinks: dict[str, int]

    @property
    def num_ranks(self) -> int:
        """Ranks of all hosts."""
        return sum(host.ranks for host in self.hosts)

    @property
    def host_of_rank(self) -> list[str]:
        """Name of every rank's host, in rank order."""
        return [host.name for host in self.hosts for _ in range(host.ranks)]

    @property
    def leafs(self) -> list[str]:
        """Names of the leafs in use."""
        return list(dict.fromkeys(host.leaf for host in self.hosts))

    def scaled(self, factor: int) -> "Fabric":
        """Return the fabric with all rates `factor` times as high."""
        hosts = tuple(replace(host, mbit_per_s=host.mbit_per_s * factor) for host in self.hosts)
        uplinks = {leaf: rate * factor for leaf, rate in self.uplinks.items()}
        return replace(self, hosts=hosts, uplinks=uplinks)


def cluster_document(fabric: Fabric) -> str:
    """Return the fabric as a cluster file."""
    switches = [*fabric.leafs, *(["spine"] if fabric.uplinks else [])]
    cables = [_link(f"{host.name}/eth0", host.leaf, host.mbit_per_s) for host in fabric.hosts]
    uplinks = [_link(leaf, "spine", rate) for leaf, rate in fabric.uplinks.items()]
    document = {
        "schema_version": 1,
        "name": fabric.name,
        "description": fabric.description,
        "explicit_hosts": [_host(host) for host in fabric.hosts],
        "switches": [{"names": name} for name in switches],
        "links": [*cables, *uplinks],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _host(host: EmulatedHost) -> dict[str, Any]:
    gpus = [f"gpu{index}" for index in range(host.ranks)]
    inside = {"kind": "shm", "rate": MEMORY_RATE, "efficiency": 1.0}
    return {
        "name": host.name,
        "numa_nodes": [{"id": "numa0", "index": 0}],
        "planes": ["memory"],
        "gpus": [
            {"id": gpu, "index": index, "model": "cpu-rank", "memory": RANK_MEMORY}
            for index, gpu in enumerate(gpus)
        ],
        "nics": [{"id": "eth0", "name": "eth0", "rate": f"{host.mbit_per_s}Mb/s"}],
        "links": [
            *({"ends": [gpu, "memory"], **inside} for gpu in gpus),
            *({"ends": [gpu, "numa0"], **inside} for gpu in gpus),
            {"ends": ["eth0", "numa0"], **inside},
        ],
    }


def _link(tail: str, head: str, mbit_per_s: int) -> dict[str, Any]:
    rate = f"{mbit_per_s}Mb/s"
    return {"ends": [tail, head], "kind": "net", "rate": rate, "efficiency": 1.0}
