"""What fabric sources have in common: hosts, NIC ports, switches, cables and NVLink domains.

These sources do not look inside a host. A host with NIC ports is cabled port by port, so that rails
are kept; a host without (Slurm, cloud APIs, labels) is cabled as a whole.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from epplan.errors import InputError
from epplan.topologies.graph import (
    ClusterBuilder,
    Host,
    Link,
    NetworkSwitch,
    Nic,
    Plane,
)
from epplan.topologies.hardware import hardware

_ASSUMED_NIC = "connectx-7"  # for cables whose source gives no speed


class Fabric:
    """Writes hosts, switches and cables into a builder; naming one twice means the same one."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.builder = ClusterBuilder(what)

    def host(self, name: str) -> str:
        """Return the id of a host."""
        return self._once(Host(id=f"{self._named(name, 'host')}/host", host=name))

    def switch(self, name: str) -> str:
        """Return the id of a network switch."""
        return self._once(NetworkSwitch(id=self._named(name, "switch")))

    def nic(self, host: str, name: str, rate: float | None, guid: str | None = None) -> str:
        """Return the id of a new NIC port; its host becomes known with it."""
        self._named(host, "host")
        nic = Nic(
            id=f"{host}/{name}", host=host, name=name, rated_bytes_per_s=rate, guid=guid or None
        )
        return self.builder.add(nic).id

    def cable(self, one: str, other: str, rate: float | None = None, count: int = 1) -> None:
        """Add `count` cables of `rate` bytes/s each (None: not told) between two ids."""
        known = self.builder.graph.edges.get((one, other))
        link = _cable(rate, count)
        if known is not None:
            before: Link = known["link"]
            link = Link(
                kind="net",
                rated_bytes_per_s=before.rated_bytes_per_s + link.rated_bytes_per_s,
                efficiency=link.efficiency,
                provenance=before.provenance,
                count=before.count + count,
            )
        if rate is None:
            self.builder.assumed.append(
                "the source gives no link speeds: every network cable is taken as "
                f"{hardware().nics[_ASSUMED_NIC].rate * 8 / 1e9:g} Gb/s (profile {_ASSUMED_NIC})"
            )
        self.builder.connect(one, other, link)

    def domain(self, name: str, hosts: Iterable[str]) -> None:
        """Join hosts in an NVLink domain; what a port of it carries is the GPUs' to say."""
        plane = self._once(Plane(id=self._named(name, "NVLink domain")))
        link = Link(
            kind="nvlink", rated_bytes_per_s=0.0, efficiency=1.0, provenance="read", count=0
        )
        for host in hosts:
            self.builder.connect(self.host(host), plane, link)

    def tree(self, levels: Sequence[str], host: str) -> None:
        """Cable a host below a chain of switches, root first; known cables stay single."""
        ids = [self.switch(level) for level in levels] + [self.host(host)]
        for upper, lower in pairwise(ids):
            if upper == lower:
                raise InputError(f"{self.what}: switch {upper} is below itself")
            if not self.builder.graph.has_edge(upper, lower):
                self.cable(upper, lower)

    def finish(self) -> ClusterBuilder:
        """Return the builder.

        Raises:
            InputError: nothing was found.
        """
        if not self.builder.graph:
            raise InputError(f"{self.what} names no host and no switch")
        return self.builder

    def _once(self, node: Host | NetworkSwitch | Plane) -> str:
        known = self.builder.graph.nodes.get(node.id)
        if known is None:
            self.builder.add(node)
        elif known["node"] != node:
            kinds = f"{type(known['node']).__name__} and {type(node).__name__}"
            raise InputError(f"{self.what}: {node.id} is the name of two things: {kinds}")
        return node.id

    def _named(self, name: str, kind: str) -> str:
        if not name.strip():
            raise InputError(f"{self.what}: a {kind} has no name")
        return name


def _cable(rate: float | None, count: int) -> Link:
    """Return network cables; what the NIC loses, its cables lose too."""
    each = hardware().nics[_ASSUMED_NIC].rate if rate is None else rate
    return Link(
        kind="net",
        rated_bytes_per_s=each * count,
        efficiency=hardware().efficiency["nic"],
        provenance="profile" if rate is None else "read",
        count=count,
    )
