"""Hosts written out part by part in a cluster file, as discovery found them.

explicit_hosts:
  - name: node01
    numa_nodes: [{id: numa0, index: 0}]
    pcie_switches: ["0000:11:00.0"]
    planes: [nvswitch]
    gpus: [{id: gpu0, index: 0, model: h100-sxm, memory: 81559MiB, links: 18, ...}]
    nics: [{id: mlx5_0, name: mlx5_0, rate: 400Gb/s, guid: b8cef60300000000, ...}]
    links:
      - {ends: [gpu0, nvswitch], kind: nvlink, count: 18, rate: 450GB/s, efficiency: 0.82, ...}
      - {ends: [gpu0, "0000:11:00.0"], kind: pcie, rate: 63.008GB/s, efficiency: 0.76, ...}
planes: [rack1]            # NVLink domains over several hosts
links:                     # between hosts, switches and domains, by whole ids
  - {ends: [node01/mlx5_0, leaf1], kind: net, rate: 400Gb/s, efficiency: 0.88, ...}

Nothing is completed from a template: what is read back is the graph that was written.
"""

from collections import Counter
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from .graph import (
    ClusterBuilder,
    Gpu,
    Link,
    LinkKind,
    Nic,
    Numa,
    PcieSwitch,
    Plane,
    Provenance,
)
from .hardware import Bandwidth, Memory, hardware


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumaRecord(_Record):
    """One NUMA node."""

    id: str
    index: int


class GpuPartRecord(_Record):
    """One GPU; without `model` the source did not tell it."""

    id: str
    index: int = Field(ge=0)
    model: str | None = None
    memory: Memory
    links: int = Field(default=0, ge=0)
    numa: int | None = None
    pci_bus_id: str | None = None
    uuid: str | None = None
    mig: bool | None = None
    faults: tuple[str, ...] | None = None


class NicPartRecord(_Record):
    """One NIC port; without `rate` the source did not tell it."""

    id: str
    name: str
    rate: Bandwidth | None = None
    numa: int | None = None
    pci_bus_id: str | None = None
    guid: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")


class LinkRecord(_Record):
    """One link, the same in both directions unless `one_way`; `rate` is the whole link's."""

    ends: tuple[str, str]
    kind: LinkKind
    rate: Bandwidth
    efficiency: float = Field(gt=0)
    provenance: Provenance = "read"
    count: int = Field(default=1, ge=0)
    one_way: bool = False


class ExplicitHostRecord(_Record):
    """One host; ids are its own, `node01/gpu0` elsewhere in the file."""

    name: str = Field(min_length=1)
    numa_nodes: tuple[NumaRecord, ...] = ()
    pcie_switches: tuple[str, ...] = ()
    planes: tuple[str, ...] = ()
    gpus: tuple[GpuPartRecord, ...] = ()
    nics: tuple[NicPartRecord, ...] = ()
    links: tuple[LinkRecord, ...] = ()

    def ids(self) -> list[str]:
        """Return the ids of all parts."""
        numa = [node.id for node in self.numa_nodes]
        gpus = [gpu.id for gpu in self.gpus]
        nics = [nic.id for nic in self.nics]
        return [*numa, *gpus, *nics, *self.pcie_switches, *self.planes]


def explicit_problems(
    hosts: tuple[ExplicitHostRecord, ...],
    planes: tuple[str, ...],
    links: tuple[LinkRecord, ...],
    other_ids: set[str],
) -> Iterator[str]:
    """Yield everything wrong with these parts.

    Args:
        hosts: the hosts.
        planes: NVLink domains over hosts.
        links: between them.
        other_ids: switches and parts of hosts from templates.
    """
    for host in hosts:
        yield from _host_problems(host)
    known = {f"{host.name}/{part}" for host in hosts for part in host.ids()}
    known |= {*planes, *other_ids}
    for link in links:
        for end in link.ends:
            if end not in known:
                yield f"links {list(link.ends)}: {end} is not defined"
    guids = Counter(nic.guid for host in hosts for nic in host.nics if nic.guid)
    for guid, count in guids.items():
        if count > 1:
            yield f"port GUID {guid} is given to {count} NICs"


def _host_problems(host: ExplicitHostRecord) -> Iterator[str]:
    where = f"explicit_hosts {host.name}"
    for part, count in Counter(host.ids()).items():
        if count > 1:
            yield f"{where}: {part} is defined {count} times"
    for what, values in (
        ("GPU index", [gpu.index for gpu in host.gpus]),
        ("bus id", [gpu.pci_bus_id for gpu in host.gpus if gpu.pci_bus_id]),
    ):
        for value, count in Counter(map(str, values)).items():
            if count > 1:
                yield f"{where}: {what} {value} is given to {count} GPUs"
    for gpu in host.gpus:
        if gpu.model is not None and gpu.model not in hardware().gpus:
            known = ", ".join(sorted(hardware().gpus))
            yield f"{where}: {gpu.id}: unknown model {gpu.model}; known are {known}"
    parts = set(host.ids())
    for link in host.links:
        for end in link.ends:
            if end not in parts:
                yield f"{where}: links {list(link.ends)}: {end} is not defined"


def add_explicit(
    builder: ClusterBuilder, hosts: tuple[ExplicitHostRecord, ...], planes: tuple[str, ...]
) -> None:
    """Add hosts and the domains over them; links between them come later."""
    for plane in planes:
        builder.add(Plane(id=plane))
    for host in hosts:
        _add_parts(builder, host)
        add_links(builder, host.links, f"{host.name}/")


def add_links(builder: ClusterBuilder, links: tuple[LinkRecord, ...], prefix: str = "") -> None:
    """Add links whose ends lack `prefix`."""
    for record in links:
        tail, head = (f"{prefix}{end}" for end in record.ends)
        link = Link(
            kind=record.kind,
            rated_bytes_per_s=record.rate,
            efficiency=record.efficiency,
            provenance=record.provenance,
            count=record.count,
        )
        if record.one_way:
            builder.graph.add_edge(tail, head, link=link)
        else:
            builder.connect(tail, head, link)


def _add_parts(builder: ClusterBuilder, host: ExplicitHostRecord) -> None:
    for numa in host.numa_nodes:
        builder.add(Numa(id=f"{host.name}/{numa.id}", host=host.name, index=numa.index))
    for switch in host.pcie_switches:
        builder.add(PcieSwitch(id=f"{host.name}/{switch}", host=host.name))
    for plane in host.planes:
        builder.add(Plane(id=f"{host.name}/{plane}", host=host.name))
    for gpu in host.gpus:
        builder.add(
            Gpu(
                id=f"{host.name}/{gpu.id}",
                host=host.name,
                index=gpu.index,
                profile=hardware().gpus[gpu.model] if gpu.model else None,
                memory_bytes=gpu.memory,
                links=gpu.links,
                numa=gpu.numa,
                pci_bus_id=gpu.pci_bus_id,
                uuid=gpu.uuid,
                mig=gpu.mig,
                faults=gpu.faults,
            )
        )
    for nic in host.nics:
        builder.add(
            Nic(
                id=f"{host.name}/{nic.id}",
                host=host.name,
                name=nic.name,
                rated_bytes_per_s=nic.rate,
                numa=nic.numa,
                pci_bus_id=nic.pci_bus_id,
                guid=nic.guid,
            )
        )
