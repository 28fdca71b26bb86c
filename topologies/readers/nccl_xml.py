"""NCCL and RCCL topology XML: NCCL_TOPO_DUMP_FILE dumps and hand-made or cloud NCCL_TOPO_FILEs.

    <system><cpu numaid><pci busid class link_speed link_width>
      <gpu dev sm rank><nvlink target count tclass/></gpu> | <nic><net name speed/></nic> | <pci>...

Skeletons (only cpu and pci, because NCCL merges the file with what it finds itself) are legitimate:
what they leave out comes from hardware profiles and is said. Element meaning, PCI classes and the
bandwidth rule are those of nccl src/graph/{xml,topo}.cc.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder, Gpu, Link, Nic, Numa, PcieSwitch, Plane
from epplan.topologies.hardware import (
    GpuProfile,
    gpu_profile,
    gpu_profile_by_device,
    hardware,
)
from epplan.topologies.host import numa_link, nvlink

from .documents import MAX_NUMA_NODES, Element, whole_number
from .pci import DEFAULT_LANE_GT, nearest_generation, normalise_bus_id, pcie_link, pcie_rate

_BRIDGE_CLASSES = ("0x060400", "0x080100")
_GPU_CLASSES = ("0x03", "0x1200", "0x0380")
_NIC_CLASS = "0x02"
_NVSWITCH_CLASS = "0x068000"
_DEFAULT_NET_MBPS = 10000  # and for a net without a speed


def is_nccl_xml(root: Element) -> bool:
    """Tell whether an XML document is a NCCL or RCCL topology."""
    return root.tag == "system" or root.find("system") is not None


def read_nccl_xml(root: Element, what: str, gpu_model: str | None = None) -> ClusterBuilder:
    """Return the host (or the hosts of an NVLink domain) in a NCCL topology.

    Args:
        root: the document; its root or a child of it is <system>.
        what: names it in errors.
        gpu_model: the profile of GPUs whose model the file does not tell.

    Raises:
        InputError: no processor in it, or a number that is none.
    """
    system = root if root.tag == "system" else root.find("system")
    if system is None or system.find("cpu") is None:
        raise InputError(f"{what} is no NCCL topology: it has no <system><cpu>")
    if len(system.findall("cpu")) > MAX_NUMA_NODES:
        raise InputError(f"{what} has over {MAX_NUMA_NODES} <cpu>; no NVLink domain has so many")
    reader = _Reader(what, gpu_profile(gpu_model) if gpu_model else None)
    for cpu in system.findall("cpu"):
        reader.read_cpu(cpu)
    return reader.finish()


@dataclass(slots=True)
class _Host:
    name: str
    numa_nodes: list[str] = field(default_factory=list)
    numa_rate: float = 0.0
    gpus: list[tuple[Element, str, str]] = field(default_factory=list)  # pci, parent, numa
    cards: list[tuple[Element, str, str]] = field(default_factory=list)  # NICs without <net>


@dataclass(frozen=True, slots=True)
class _Joint:
    """A GPU with the <gpu> element that lists its links."""

    gpu: Gpu
    element: Element | None


class _Reader:
    """Reads the tree of cpu and pci first, then GPUs in order, then their links."""

    def __init__(self, what: str, fallback: GpuProfile | None) -> None:
        self.what = what
        self.fallback = fallback
        self.builder = ClusterBuilder(what)
        self.hosts: dict[str, _Host] = {}
        self.unclassed = 0

    def read_cpu(self, cpu: Element) -> None:
        key = cpu.get("host_hash", "")
        host = self.hosts.setdefault(key, _Host(name=f"host{len(self.hosts)}"))
        index = len(host.numa_nodes)
        number = whole_number(cpu, "numaid", -1, self.what)
        numa = Numa(id=f"{host.name}/numa{index}", host=host.name, index=max(number, 0))
        self.builder.add(numa)
        host.numa_nodes.append(numa.id)
        model = max(whole_number(cpu, "modelid", 0, self.what), 0)
        rate = hardware().numa_bytes_per_s(cpu.get("vendor", ""), model, cpu.get("arch", ""))
        host.numa_rate = rate if not host.numa_rate else min(host.numa_rate, rate)
        self._read_children(cpu, host, numa.id, numa.id, None)

    def finish(self) -> ClusterBuilder:
        for host in self.hosts.values():
            for index, numa in enumerate(host.numa_nodes):
                for other in host.numa_nodes[:index]:
                    self.builder.connect(other, numa, numa_link(host.numa_rate))
            joints = self._add_gpus(host)
            self._add_nvlinks(host, joints)
            self._add_cards(host)
        if len(self.hosts) == 1 and self.hosts:
            self._say_what_is_missing()
        return self.builder

    # --- the tree -------------------------------------------------------------------------------

    def _read_children(
        self, element: Element, host: _Host, parent: str, numa: str, card: Element | None
    ) -> None:
        for child in element:
            if child.tag == "pci":
                self._read_pci(child, host, parent, numa)
            elif child.tag == "nic":
                for net in child.iter("net"):
                    self._add_net(net, host, parent, numa, card)

    def _read_pci(self, pci: Element, host: _Host, parent: str, numa: str) -> None:
        device_class = pci.get("class", "").lower()
        if pci.find("gpu") is not None or device_class.startswith(_GPU_CLASSES):
            host.gpus.append((pci, parent, numa))
        elif pci.find("pci") is not None or device_class.startswith(_BRIDGE_CLASSES):
            switch = self._add_switch(pci, host, parent)
            self._read_children(pci, host, switch, numa, None)
        elif pci.find(".//net") is not None:
            self._read_children(pci, host, parent, numa, pci)
        elif device_class.startswith(_NIC_CLASS):
            host.cards.append((pci, parent, numa))
        elif not device_class:
            self.unclassed += 1

    def _add_switch(self, pci: Element, host: _Host, parent: str) -> str:
        switch = PcieSwitch(id=f"{host.name}/{_bus_id(pci)}", host=host.name)
        self.builder.add(switch)
        rate = self._pcie_rate(pci)
        below = max(
            (self._pcie_rate(child) for child in pci.iter("pci") if child is not pci), default=0
        )
        if rate < below and rate < hardware().pcie_bytes_per_s(DEFAULT_LANE_GT):
            self.builder.warnings.append(
                f"{host.name}: PCIe bridge {_bus_id(pci)} says {pci.get('link_speed')} x"
                f"{pci.get('link_width')}, slower than a device below it; taken as a virtual "
                "bridge with the device's speed"
            )
            rate = below
        self.builder.connect(parent, switch.id, pcie_link(rate))
        return switch.id

    # --- NICs -----------------------------------------------------------------------------------

    def _add_net(
        self, net: Element, host: _Host, parent: str, numa: str, card: Element | None
    ) -> None:
        name = net.get("name", "")
        if net.get("dev") is None or f"{host.name}/{name}" in self.builder.graph:
            return  # without dev NCCL ignores it; virtual devices are repeated under every cpu
        megabits = _megabits(net, self.what)
        if not megabits:
            megabits = _DEFAULT_NET_MBPS
            self.builder.assumed.append(f"{host.name}: NIC {name} has no speed; NCCL takes 10 Gb/s")
        bus_id = _bus_id(card) if card is not None else None
        rate = megabits * 1e6 / 8
        self._attach_nic(host, name, parent, numa, bus_id, rate, card)

    def _add_cards(self, host: _Host) -> None:
        for index, (pci, parent, numa) in enumerate(host.cards):
            self._attach_nic(host, f"nic{index}", parent, numa, _bus_id(pci), None, pci)
        if host.cards:
            self.builder.assumed.append(
                f"{host.name}: the file names {len(host.cards)} NIC cards without their ports; "
                "one port each, speed unknown"
            )

    def _attach_nic(
        self,
        host: _Host,
        name: str,
        parent: str,
        numa: str,
        bus_id: str | None,
        rate: float | None,
        card: Element | None,
    ) -> None:
        nic = Nic(
            id=f"{host.name}/{name}",
            host=host.name,
            name=name,
            rated_bytes_per_s=rate,
            numa=self._numa_index(numa),
            pci_bus_id=bus_id,
        )
        self.builder.add(nic)
        slot = self._pcie_rate(card) if card is not None else hardware().pcie_bytes_per_s(8.0)
        self.builder.connect(parent, nic.id, pcie_link(slot))

    # --- GPUs -----------------------------------------------------------------------------------

    def _add_gpus(self, host: _Host) -> dict[str, _Joint]:
        """Add GPUs in NVML's order (dev), else in the file's, and return them by bus id."""

        def order(entry: tuple[Element, str, str]) -> int:
            return _gpu_number(entry[0], "dev", self.what)

        joints: dict[str, _Joint] = {}
        for index, (pci, parent, numa) in enumerate(sorted(host.gpus, key=order)):
            element = pci.find("gpu")
            profile = self._profile(pci, host, index)
            gpu = Gpu(
                id=f"{host.name}/gpu{index}",
                host=host.name,
                index=index,
                profile=profile,
                memory_bytes=profile.memory if profile else 0,
                links=sum(count for _, count in _links(element, self.what)),
                numa=self._numa_index(numa),
                pci_bus_id=_bus_id(pci),
            )
            self.builder.add(gpu)
            self.builder.connect(parent, gpu.id, pcie_link(self._pcie_rate(pci)))
            joints[_bus_id(pci)] = _Joint(gpu, element)
        return joints

    def _profile(self, pci: Element, host: _Host, index: int) -> GpuProfile | None:
        device = f"{pci.get('vendor')}:{pci.get('device')}"
        profile = gpu_profile_by_device(device)
        if profile is None and self.fallback is not None:
            self.builder.assumed.append(
                f"{host.name}: GPU {index} is taken as {self.fallback.name}, as given: the file "
                f"says {device if pci.get('device') else 'no device id'}"
            )
            return self.fallback
        return profile

    # --- NVLink and xGMI ------------------------------------------------------------------------

    def _add_nvlinks(self, host: _Host, joints: dict[str, _Joint]) -> None:
        plane: str | None = None
        for joint in joints.values():
            gpu, rows = joint.gpu, list(_links(joint.element, self.what))
            if not rows:
                if self._assume_links(host, gpu):
                    plane = plane or self._add_plane(host)
                    assert gpu.profile is not None
                    self.builder.connect(gpu.id, plane, nvlink(gpu.profile, gpu.profile.links))
                continue
            if any(row.get("tclass") == _NVSWITCH_CLASS for row, _ in rows):
                plane = plane or self._add_plane(host)
                link = self._gpu_link(joint, self._capped(gpu))
                self.builder.connect(gpu.id, plane, link)
            else:
                self._join_peers(joint, rows, joints)

    def _add_plane(self, host: _Host) -> str:
        """Add the host's NVSwitches as one plane, as NCCL does, however many the file names."""
        return self.builder.add(Plane(id=f"{host.name}/nvswitch", host=host.name)).id

    def _assume_links(self, host: _Host, gpu: Gpu) -> bool:
        profile = gpu.profile
        if profile is None or profile.fabric != "switch":
            return False
        self.builder.assumed.append(
            f"{host.name}: the file has no NVLinks; {profile.links} links a GPU to NVSwitches "
            f"assumed from the profile {profile.name}"
        )
        return True

    def _capped(self, gpu: Gpu) -> int:
        if gpu.profile is None or gpu.links <= gpu.profile.links:
            return gpu.links
        self.builder.warnings.append(
            f"{gpu.host}: GPU {gpu.index} lists {gpu.links} NVLinks, a {gpu.profile.name} has "
            f"{gpu.profile.links}: capacity of {gpu.profile.links} links taken"
        )
        return gpu.profile.links

    def _join_peers(
        self, joint: _Joint, rows: list[tuple[Element, int]], joints: dict[str, _Joint]
    ) -> None:
        for row, count in rows:
            target = joints.get(normalise_bus_id(row.get("target", "")))
            if target is None or target.gpu.id == joint.gpu.id:
                self.builder.warnings.append(
                    f"{joint.gpu.host}: GPU {joint.gpu.index} has {count} NVLinks to "
                    f"{'itself' if target else row.get('target')}, which joins nothing; ignored"
                )
                continue
            self.builder.graph.add_edge(
                joint.gpu.id, target.gpu.id, link=self._gpu_link(joint, count)
            )

    def _gpu_link(self, joint: _Joint, count: int) -> Link:
        """Return `count` links of a GPU: the model's, or the generation its `sm` implies."""
        if joint.gpu.profile is not None:
            return nvlink(joint.gpu.profile, count)
        assert joint.element is not None
        amd = bool(joint.element.get("gcn"))  # RCCL writes it
        twin = nearest_generation(whole_number(joint.element, "sm", 80, self.what), amd=amd)
        self.builder.assumed.append(
            f"{joint.gpu.host}: GPU {joint.gpu.index} is of no known model; its "
            f"{'xGMI' if amd else 'NV'}Links are taken as those of {twin.name}"
        )
        return nvlink(twin, count)

    def _pcie_rate(self, pci: Element) -> float:
        width = whole_number(pci, "link_width", 0, self.what)
        return pcie_rate(pci.get("link_speed", ""), width)

    def _numa_index(self, numa: str) -> int:
        node = self.builder.graph.nodes[numa]["node"]
        assert isinstance(node, Numa)
        return node.index

    def _say_what_is_missing(self) -> None:
        gpus = [data["node"] for _, data in self.builder.graph.nodes(data=True)]
        gpus = [node for node in gpus if isinstance(node, Gpu)]
        if not gpus:
            self.builder.warnings.append(
                f"the file names no GPU ({self.unclassed} PCI devices without a class): it is a "
                "skeleton that NCCL completes at run time"
            )
        unknown = [gpu.index for gpu in gpus if gpu.profile is None]
        if unknown:
            self.builder.warnings.append(
                f"the file does not tell the model of GPUs {unknown}; give it with --gpu MODEL "
                "to plan with this topology"
            )


def _links(gpu: Element | None, what: str) -> Iterator[tuple[Element, int]]:
    for child in gpu if gpu is not None else ():
        if child.tag in ("nvlink", "xgmi"):
            yield child, max(whole_number(child, "count", 1, what), 0)


def _gpu_number(pci: Element, name: str, what: str) -> int:
    gpu = pci.find("gpu")
    return whole_number(gpu, name, 0, what) if gpu is not None else 0


def _bus_id(pci: Element) -> str:
    return normalise_bus_id(pci.get("busid", ""))


def _megabits(net: Element, what: str) -> float:
    """Return a port's speed, 0 for the ways to say unknown: none, 0 and -1."""
    text = (net.get("speed") or "0").strip()
    if not re.fullmatch(r"-1|[0-9]{1,9}(\.[0-9]+)?", text):
        raise InputError(f"{what}: <net> has speed={text!r}, which is no number of Mb/s")
    return max(float(text), 0.0)
