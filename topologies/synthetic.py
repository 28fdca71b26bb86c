"""Clusters in a line: `2x8:h100,nic=8x400Gb/s` is two hosts of eight H100 with eight NICs each.

CLUSTER  = GROUP { "+" GROUP } ; mixed hosts: 1x8:h100,nic=8x400Gb/s+1x8:h200,nic=8x400Gb/s
GROUP    = HOSTS "x" GPUS ":" MODEL { "," OPTION }
OPTION   = nic=NUMBERxRATE | numa=NODES | links=NVLINKS         of the group's hosts
         | domain=HOSTS     NVLink domains of that many hosts   of the whole cluster
         | leafs=NUMBER     hosts spread over leaf switches
         | rails=NUMBER     NIC i of every host on leaf i mod NUMBER
         | over=RATIO       a leaf has 1/RATIO of its NICs' bandwidth towards the spine
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from epplan.errors import InputError

from .graph import ClusterBuilder, Link, NetworkSwitch, Nic
from .hardware import NicProfile, gpu_profile, hardware
from .host import HostType, add_host, add_plane, spread
from .units import parse_bandwidth

MAX_GPUS = 16384
_MAX_PARTS = 256  # GPUs, NICs or NUMA nodes of a host
_GROUP = re.compile(r"([0-9]{1,5})x([0-9]{1,3}):([A-Za-z0-9.-]+)((?:,[^,+]*)*)")
_SHORT = {
    "a100": "a100-sxm-80gb",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "h800": "h800-sxm",
    "v100": "v100-sxm2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Hosts of one type."""

    hosts: int
    gpus: int
    model: str
    nics: int = 0
    rate: str = ""
    numa: int = 2
    links: int | None = None

    def __str__(self) -> str:
        """Return the group as it is written."""
        parts = [f"{self.hosts}x{self.gpus}:{self.model}"]
        if self.nics:
            parts.append(f"nic={self.nics}x{self.rate}")
        if self.numa != 2:
            parts.append(f"numa={self.numa}")
        if self.links is not None:
            parts.append(f"links={self.links}")
        return ",".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """A cluster in a line."""

    groups: tuple[Group, ...]
    domain: int = 1
    leafs: int = 1
    rails: int = 0
    over: float = 1.0

    def __str__(self) -> str:
        """Return the canonical line, which parses to the same cluster."""
        parts = ["+".join(map(str, self.groups))]
        if self.domain != 1:
            parts.append(f"domain={self.domain}")
        if self.leafs != 1:
            parts.append(f"leafs={self.leafs}")
        if self.rails:
            parts.append(f"rails={self.rails}")
        if self.over != 1.0:
            parts.append(f"over={self.over:g}")
        return ",".join(parts)


def is_synthetic(source: str) -> bool:
    """Tell whether a source begins like a cluster in a line: `2x8:`."""
    return re.match(r"[0-9]+x[0-9]+:", source) is not None


def read_synthetic(source: str) -> ClusterBuilder:
    """Return the cluster a line describes.

    Raises:
        InputError: what does not fit the grammar, or a size beyond the limits.
    """
    spec = parse_synthetic(source)
    builder = ClusterBuilder(str(spec))
    for short in re.findall(r":([A-Za-z0-9.-]+)", source):
        if short.lower() in _SHORT:
            builder.assumed.append(f"{short} is taken as {_SHORT[short.lower()]}")
    hosts = _add_hosts(builder, spec)
    _add_network(builder, spec, hosts)
    return builder


def parse_synthetic(source: str) -> Synthetic:
    """Return a line as data.

    Raises:
        InputError: what does not fit the grammar, or a size beyond the limits.
    """
    shared: dict[str, Any] = {}
    groups = tuple(_group(text.strip(), shared, source) for text in source.split("+"))
    spec = Synthetic(groups=groups, **shared)
    gpus = sum(group.hosts * group.gpus for group in groups)
    hosts = sum(group.hosts for group in groups)
    problems = []
    if gpus > MAX_GPUS:
        problems.append(f"{gpus} GPUs; {MAX_GPUS} are the most")
    unswitched = [x.model for x in groups if gpu_profile(x.model).fabric != "switch"]
    if spec.domain > 1 and unswitched:
        problems.append(f"{unswitched[0]} has no NVSwitches for domains of {spec.domain}")
    if hosts % spec.domain:
        problems.append(f"{hosts} hosts do not fill domains of {spec.domain}")
    if spec.leafs > 1 and spec.rails:
        problems.append("leafs and rails exclude each other")
    if spec.leafs > hosts:
        problems.append(f"{spec.leafs} leafs for {hosts} hosts")
    if spec.rails > max(group.nics for group in groups):
        problems.append(f"{spec.rails} rails, and no host has that many NICs")
    if problems:
        raise InputError(f"cluster {source} is not valid", problems=problems)
    return spec


def _group(text: str, shared: dict[str, Any], source: str) -> Group:
    match = _GROUP.fullmatch(text)
    if not match:
        raise InputError(
            f"cluster {source} is not valid: {text!r} is no HOSTSxGPUS:MODEL[,option...]",
            hints=["for example 2x8:h100,nic=8x400Gb/s"],
        )
    hosts, gpus = int(match[1]), int(match[2])
    if not hosts > 0 or not 0 < gpus <= _MAX_PARTS:
        raise InputError(f"cluster {source}: {hosts} hosts of {gpus} GPUs; both are at least 1")
    profile = gpu_profile(_SHORT.get(match[3].lower(), match[3].lower()))
    group = Group(hosts=hosts, gpus=gpus, model=profile.name)
    seen: set[str] = set()
    for option in filter(None, match[4].split(",")):
        name, _, value = option.strip().partition("=")
        if name in seen or name in shared:
            raise InputError(f"cluster {source}: {name} is given twice")
        seen.add(name)
        if name == "nic":
            group = _with_nics(group, value, source)
        elif name == "numa":
            group = replace(group, numa=_number(value, name, source, _MAX_PARTS))
        elif name == "links":
            group = replace(group, links=_number(value, name, source, profile.links, least=0))
        elif name in ("domain", "leafs", "rails"):
            shared[name] = _number(value, name, source, MAX_GPUS)
        elif name == "over":
            shared[name] = _ratio(value, source)
        else:
            raise InputError(
                f"cluster {source}: unknown option {name!r}",
                hints=["known: nic, numa, links, domain, leafs, rails, over"],
            )
    return group


def _with_nics(group: Group, value: str, source: str) -> Group:
    count, _, rate = value.partition("x")
    try:
        if parse_bandwidth(rate) <= 0:
            raise ValueError(f"{rate!r} is no bandwidth above zero")
    except ValueError as error:
        raise InputError(f"cluster {source}: nic={value}: {error}") from None
    return replace(group, nics=_number(count, "nic", source, _MAX_PARTS), rate=rate.strip())


def _number(value: str, name: str, source: str, most: int, least: int = 1) -> int:
    if not re.fullmatch("[0-9]{1,6}", value) or not least <= int(value) <= most:
        raise InputError(f"cluster {source}: {name}={value} is no number from {least} to {most}")
    return int(value)


def _ratio(value: str, source: str) -> float:
    """Return 2 for `2`, `2:1` or `2.0`."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)(?::1)?", value)
    if not match or float(match[1]) < 1:
        raise InputError(f"cluster {source}: over={value} is no ratio from 1, such as 2 or 2:1")
    return float(match[1])


def _add_hosts(builder: ClusterBuilder, spec: Synthetic) -> list[list[Nic]]:
    """Add all hosts and return their NICs."""
    nics: list[list[Nic]] = []
    plane: str | None = None
    for group in spec.groups:
        host_type = _host_type(builder, group)
        for _ in range(group.hosts):
            number = len(nics)
            if spec.domain > 1 and number % spec.domain == 0:
                plane = add_plane(builder, f"domain{number // spec.domain + 1}")
            nics.append(add_host(builder, f"host{number + 1}", host_type, plane))
    return nics


def _host_type(builder: ClusterBuilder, group: Group) -> HostType:
    profile = gpu_profile(group.model)
    nic = _nic_profile(parse_bandwidth(group.rate)) if group.nics else None
    if nic is not None:
        builder.assumed.append(f"NICs of {group.rate} sit in PCIe slots of {nic.pcie:g} GT/s x16")
    return HostType(
        gpu=profile,
        gpus=group.gpus,
        numa_nodes=group.numa,
        nic=nic,
        nics=group.nics,
        links=profile.links if group.links is None else group.links,
        memory_bytes=profile.memory,
    )


def _nic_profile(rate: float) -> NicProfile:
    """Return a NIC of that rate in the slot of the slowest known NIC that reaches it."""
    known = sorted(hardware().nics.values(), key=lambda nic: (nic.rate, nic.pcie))
    near = next((nic for nic in known if nic.rate >= rate), known[-1])
    return near.model_copy(update={"name": f"nic-{rate * 8 / 1e9:g}g", "rate": rate})


def _add_network(builder: ClusterBuilder, spec: Synthetic, hosts: Sequence[list[Nic]]) -> None:
    """Cable NICs to leafs, and leafs to one spine that stands for all."""
    if not any(hosts):
        return
    number = spec.rails or spec.leafs
    leafs = [builder.add(NetworkSwitch(id=f"leaf{index + 1}")).id for index in range(number)]
    below = dict.fromkeys(leafs, 0.0)
    for place, nics in enumerate(hosts):
        for index, nic in enumerate(nics):
            rail = index % number if spec.rails else spread(place, len(hosts), number)
            assert nic.rated_bytes_per_s is not None
            builder.connect(nic.id, leafs[rail], _net_link(nic.rated_bytes_per_s))
            below[leafs[rail]] += nic.rated_bytes_per_s
    if number > 1:
        spine = builder.add(NetworkSwitch(id="spine1")).id
        for leaf, rate in below.items():
            builder.connect(leaf, spine, _net_link(rate / spec.over))


def _net_link(rate: float) -> Link:
    return Link(
        kind="net",
        rated_bytes_per_s=rate,
        efficiency=hardware().efficiency["nic"],
        provenance="read",
    )
