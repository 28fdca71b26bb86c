"""epplan's own cluster file: YAML with templates (host types, hosts by range, switches).

schema_version: 1
name: two-dgx
host_types:
  dgx: {gpu: h100-sxm, gpus: 8, numa_nodes: 2, nic: connectx-7, nics: 8}
hosts:
  - {names: "dgx[01-02]", type: dgx, leafs: [leaf1]}   # NIC i on leafs[i mod len(leafs)]
switches:
  - {names: leaf1, uplinks: [{to: spine1, count: 4, rate: 400Gb/s}]}
  - {names: spine1}
nvlink_domains:                                        # only when a domain spans hosts
  - {name: rack1, hosts: "tray[01-18]"}

Hosts that were discovered are written out part by part (explicit_hosts.py), transfers that were
timed are rows of `measured` (measured.py).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import validate

from .explicit_hosts import (
    ExplicitHostRecord,
    LinkRecord,
    add_explicit,
    add_links,
    explicit_problems,
)
from .graph import ClusterBuilder, Link, NetworkSwitch, Nic
from .hardware import Bandwidth, Memory, gpu_profile, hardware
from .host import HostType, add_host, add_plane
from .hostlist import expand
from .measured import MeasuredRecord, apply_measured

MAX_HOSTS = 20_000  # a typing error in a range should not fill the memory


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HostTypeRecord(_Record):
    """One kind of host; `links` and `memory` override the GPU model's."""

    gpu: str
    gpus: int = Field(gt=0, le=256)
    numa_nodes: int = Field(default=1, gt=0, le=256)
    nic: str | None = None
    nics: int = Field(default=0, ge=0, le=256)
    nic_rate: Bandwidth | None = None
    links: int | None = Field(default=None, ge=0)
    memory: Memory | None = None


class HostsRecord(_Record):
    """Hosts of one type on the same leaf switches."""

    names: str
    type: str
    leafs: tuple[str, ...] = ()


class UplinkRecord(_Record):
    """Cables from a switch to one above it; `rate` is one cable's."""

    to: str
    count: int = Field(default=1, gt=0)
    rate: Bandwidth


class SwitchesRecord(_Record):
    """Network switches with the same uplinks."""

    names: str
    uplinks: tuple[UplinkRecord, ...] = ()


class DomainRecord(_Record):
    """An NVLink domain that spans several hosts."""

    name: str
    hosts: str


class ClusterFile(_Record):
    """The whole file."""

    schema_version: int = Field(ge=1, le=1)
    name: str
    description: str = ""
    host_types: dict[str, HostTypeRecord] = {}
    hosts: tuple[HostsRecord, ...] = ()
    switches: tuple[SwitchesRecord, ...] = ()
    nvlink_domains: tuple[DomainRecord, ...] = ()
    explicit_hosts: tuple[ExplicitHostRecord, ...] = ()
    planes: tuple[str, ...] = ()
    links: tuple[LinkRecord, ...] = ()
    measured: tuple[MeasuredRecord, ...] = ()
    assumed: tuple[str, ...] = ()  # remarks of the sources it was made from
    warnings: tuple[str, ...] = ()


def is_cluster_file(document: Any) -> bool:
    """Tell whether a parsed document is a cluster file."""
    if not isinstance(document, dict):
        return False
    return {"host_types", "hosts"} <= document.keys() or "explicit_hosts" in document


def read_cluster_file(document: Any, what: str) -> ClusterBuilder:
    """Return the cluster a parsed cluster file describes.

    Raises:
        InputError: all problems of the file at once.
    """
    file = validate(ClusterFile, document, what)
    problems = list(_problems(file))
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    builder = ClusterBuilder(file.name)
    types = {name: _host_type(record) for name, record in file.host_types.items()}
    domain_of = {
        host: domain.name for domain in file.nvlink_domains for host in expand(domain.hosts)
    }
    for domain in file.nvlink_domains:
        add_plane(builder, domain.name)
    _add_switches(builder, file.switches)
    for group in file.hosts:
        for host in expand(group.names):
            nics = add_host(builder, host, types[group.type], domain_of.get(host))
            _cable(builder, nics, group.leafs)
    add_explicit(builder, file.explicit_hosts, file.planes)
    add_links(builder, file.links)
    apply_measured(builder, file.measured)
    builder.assumed += file.assumed
    builder.warnings += file.warnings
    return builder


def _problems(file: ClusterFile) -> Iterator[str]:
    hosts = [host for group in file.hosts for host in expand(group.names)]
    switches = [name for record in file.switches for name in expand(record.names)]
    everyone = [*hosts, *(host.name for host in file.explicit_hosts)]
    if not everyone:
        yield "no hosts: give hosts or explicit_hosts"
    for kind, names in (("host", everyone), ("switch", switches)):
        for name, count in sorted(Counter(names).items()):
            if count > 1:
                yield f"{kind} {name} is defined {count} times"
    if len(hosts) > MAX_HOSTS:
        yield f"{len(hosts)} hosts; {MAX_HOSTS} are the most"
    for name, record in file.host_types.items():
        yield from _host_type_problems(name, record)
    for group in file.hosts:
        if group.type not in file.host_types:
            known = ", ".join(file.host_types)
            yield f"hosts {group.names}: unknown type {group.type}; host_types has {known}"
        for leaf in group.leafs:
            if leaf not in switches:
                yield f"hosts {group.names}: leaf {leaf} is not among the switches"
    for switch in file.switches:
        for uplink in switch.uplinks:
            if uplink.to not in switches:
                yield f"switches {switch.names}: uplink to {uplink.to}, which is not defined"
    for domain in file.nvlink_domains:
        for host in expand(domain.hosts):
            if host not in hosts:
                yield f"nvlink_domains {domain.name}: host {host} is not defined"
    others = {*switches, *(domain.name for domain in file.nvlink_domains)}
    yield from explicit_problems(file.explicit_hosts, file.planes, file.links, others)


def _host_type_problems(name: str, record: HostTypeRecord) -> Iterator[str]:
    profile = hardware().gpus.get(record.gpu)
    if profile is None:
        known = ", ".join(sorted(hardware().gpus))
        yield f"host_types.{name}.gpu: unknown model {record.gpu}; known are {known}"
    elif record.links is not None and record.links > profile.links:
        yield f"host_types.{name}.links: {record.links}, but {record.gpu} has {profile.links}"
    if record.nics and record.nic not in hardware().nics:
        known = ", ".join(sorted(hardware().nics))
        yield f"host_types.{name}.nic: unknown model {record.nic}; known are {known}"


def _host_type(record: HostTypeRecord) -> HostType:
    gpu = gpu_profile(record.gpu)
    nic = hardware().nics[record.nic] if record.nics and record.nic else None
    if nic and record.nic_rate:
        nic = nic.model_copy(update={"rate": record.nic_rate})
    return HostType(
        gpu=gpu,
        gpus=record.gpus,
        numa_nodes=record.numa_nodes,
        nic=nic,
        nics=record.nics,
        links=gpu.links if record.links is None else record.links,
        memory_bytes=record.memory or gpu.memory,
    )


def _add_switches(builder: ClusterBuilder, records: tuple[SwitchesRecord, ...]) -> None:
    for record in records:
        for name in expand(record.names):
            builder.add(NetworkSwitch(id=name))
    for record in records:
        for name in expand(record.names):
            for uplink in record.uplinks:
                builder.connect(name, uplink.to, _net_link(uplink.rate, uplink.count))


def _net_link(rate: float, count: int = 1) -> Link:
    """Return `count` network cables; what the NIC loses, its cables lose too."""
    return Link(
        kind="net",
        rated_bytes_per_s=rate * count,
        efficiency=hardware().efficiency["nic"],
        provenance="read",
        count=count,
    )


def _cable(builder: ClusterBuilder, nics: list[Nic], leafs: tuple[str, ...]) -> None:
    """Cable NIC i to leafs[i mod len(leafs)]: one leaf for all, or one leaf a rail."""
    for index, nic in enumerate(nics if leafs else ()):
        assert nic.rated_bytes_per_s is not None
        link = _net_link(nic.rated_bytes_per_s)
        builder.connect(nic.id, leafs[index % len(leafs)], link)
