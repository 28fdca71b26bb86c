"""hwloc XML (`lstopo file.xml`) of versions 1, 2 and 3: one host's NUMA nodes, PCIe tree, devices.

    <topology version="2.0"><object type="Machine"><object type="Package">
      <object type="NUMANode" os_index="0"/>
      <object type="Bridge" bridge_type="0-1">            host bridge
        <object type="Bridge" bridge_type="1-1" ...>      root port
          <object type="PCIDev" pci_type="0302 [10de:2330] ..." pci_link_speed="63.015385">
            <object type="OSDev" name="nvml0" osdev_type="1">

Version 1 has NUMA nodes around what is near them, later ones beside it. osdev_type is a number in 1
and 2 and a mask in 3; names are read instead. Links come from the NVLinkBandwidth distances.
"""

import re
from dataclasses import dataclass

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder, Gpu, Nic, Numa, PcieSwitch
from epplan.topologies.hardware import (
    GpuProfile,
    gpu_profile,
    gpu_profile_by_device,
    hardware,
)
from epplan.topologies.host import numa_link

from .documents import MAX_NUMA_NODES, Element, whole_number
from .hwloc_links import add_links, link_count, read_rows
from .pci import DEFAULT_LANE_GT, normalise_bus_id, pcie_link

_PCI_TYPE = re.compile(r"([0-9a-fA-F]{4}) \[([0-9a-fA-F]{4}):([0-9a-fA-F]{4})\]")
_GPU_OS = re.compile(r"(nvml|cuda|rsmi|opencl\d+d|ze)([0-9]{1,4})$")
_GPU_VENDORS = ("10de", "1002")
_RDMA = re.compile(r"(mlx|hfi1_|qib|rdma|efa|irdma|bnxt_re|cxi|ibp|roce|i40iw)")
_NO_NIC = re.compile(r"(nvml|cuda|rsmi|opencl|card|render|control|sd|nvme|dma)")


@dataclass(frozen=True, slots=True)
class Device:
    """A PCI device with where it hangs: bridges from near to far, and its NUMA node."""

    element: Element
    bridges: tuple[Element, ...]
    numa: str
    pci_class: str
    vendor_device: str
    os_names: tuple[str, ...]


def is_hwloc_xml(root: Element) -> bool:
    """Tell whether an XML document is a hwloc topology."""
    return root.tag == "topology" and root.find("object") is not None


def read_hwloc_xml(root: Element, what: str, gpu_model: str | None = None) -> ClusterBuilder:
    """Return the host of a hwloc topology.

    Args:
        root: the document.
        what: names it in errors.
        gpu_model: the profile of GPUs whose model is not known by its PCI id.

    Raises:
        InputError: no NUMA node and no package, or a number that is none.
    """
    reader = _Reader(root, what, gpu_profile(gpu_model) if gpu_model else None)
    reader.add_numa_nodes()
    reader.find_devices(root, (), None)
    gpus = reader.add_gpus()
    reader.add_nics()
    add_links(reader.builder, root, gpus, reader.rows)
    reader.say()
    return reader.builder


class _Reader:
    def __init__(self, root: Element, what: str, fallback: GpuProfile | None) -> None:
        self.root = root
        self.what = what
        self.fallback = fallback
        self.builder = ClusterBuilder(what)
        self.host = _info(root, "HostName") or "host0"
        self.numa_ids: dict[Element, str] = {}
        self.devices: list[Device] = []
        self.rows = read_rows(root, what)
        self.without_speed = 0
        self.slow: list[str] = []

    def add_numa_nodes(self) -> None:
        nodes = [x for x in self.root.iter("object") if x.get("type") == "NUMANode"]
        # a GPU's memory may be a NUMA node of its own; it has no processor
        nodes = [x for x in nodes if x.get("subtype") != "GPUMemory"]
        if len(nodes) > MAX_NUMA_NODES:
            raise InputError(f"{self.what} has {len(nodes)} NUMA nodes; no host has so many")
        for element in nodes or self.root.findall("object")[:1]:
            index = max(whole_number(element, "os_index", 0, self.what), 0)
            numa = self.builder.add(
                Numa(id=f"{self.host}/numa{index}", host=self.host, index=index)
            )
            self.numa_ids[element] = numa.id
        names = list(self.numa_ids.values())
        model = _info(self.root, "CPUModelNumber") or ""
        rate = hardware().numa_bytes_per_s(
            _info(self.root, "CPUVendor") or "",
            int(model) if re.fullmatch("[0-9]{1,6}", model) else 0,
            {"aarch64": "arm64", "ppc64le": "ppc64"}.get(
                _info(self.root, "Architecture") or "", ""
            ),
        )
        for number, name in enumerate(names):
            for other in names[:number]:
                self.builder.connect(other, name, numa_link(rate))

    # --- the tree -------------------------------------------------------------------------------

    def find_devices(
        self, element: Element, bridges: tuple[Element, ...], numa: str | None
    ) -> None:
        """Collect PCI devices with the bridges and the NUMA node above them."""
        near = [child for child in element if child in self.numa_ids]
        if element in self.numa_ids:
            numa = self.numa_ids[element]
        elif near:
            numa = self.numa_ids[near[0]]
        for child in element.findall("object"):
            kind = child.get("type")
            if kind == "PCIDev":
                self._add_device(child, bridges, numa)
            upstream = kind == "Bridge" and child.get("bridge_type") == "1-1"
            self.find_devices(child, (child, *bridges) if upstream else bridges, numa)

    def _add_device(self, pci: Element, bridges: tuple[Element, ...], numa: str | None) -> None:
        match = _PCI_TYPE.match(pci.get("pci_type", ""))
        if not match:
            return
        first = next(iter(self.numa_ids.values()), None)
        if first is None:
            raise InputError(f"{self.what} has PCI devices and no NUMA node")
        names = tuple(x.get("name", "") for x in pci.iter("object") if x.get("type") == "OSDev")
        pci_class, vendor, device = (text.lower() for text in match.groups())
        self.devices.append(
            Device(pci, bridges, numa or first, pci_class, f"0x{vendor}:0x{device}", names)
        )

    def _parent(self, bridges: tuple[Element, ...], numa: str) -> str:
        """Return the node above a device, adding PCIe switches as NCCL counts them.

        A switch shows as two bridges, the port towards the device and the one towards the
        processor; a root port shows as one and is no switch.
        """
        if len(bridges) < 2:
            return numa
        upstream = bridges[1]
        switch = f"{self.host}/{_bus_id(upstream) or 'bridge'}"
        if switch not in self.builder.graph:
            self.builder.add(PcieSwitch(id=switch, host=self.host))
            above = self._parent(bridges[2:], numa)
            self.builder.connect(switch, above, pcie_link(self._rate(upstream)))
        return switch

    def _rate(self, element: Element) -> float:
        """Return bytes/s of pci_link_speed (GB/s), or NCCL's default where it is 0."""
        text = element.get("pci_link_speed", "0")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text):
            raise InputError(f"{self.what}: pci_link_speed={text!r} is no number of GB/s")
        if float(text) > 0:
            return float(text) * 1e9
        self.without_speed += 1
        return hardware().pcie_bytes_per_s(DEFAULT_LANE_GT)

    # --- GPUs and NICs --------------------------------------------------------------------------

    def add_gpus(self) -> dict[Gpu, Element]:
        """Add GPUs in the order of their driver's numbers; return them with their PCI devices."""
        found = [device for device in self.devices if _is_gpu(device)]
        gpus: dict[Gpu, Element] = {}
        for index, device in enumerate(sorted(found, key=_driver_number)):
            profile = gpu_profile_by_device(device.vendor_device)
            if profile is None and self.fallback is not None:
                profile = self.fallback
                self.builder.assumed.append(
                    f"{self.host}: GPU {index} is taken as {profile.name}, as given: its PCI id "
                    f"is {device.vendor_device}"
                )
            kib = _info(device.element, "CUDAGlobalMemorySize") or ""
            told = int(kib) * 1024 if re.fullmatch("[0-9]{1,12}", kib) else 0
            gpu = Gpu(
                id=f"{self.host}/gpu{index}",
                host=self.host,
                index=index,
                profile=profile,
                memory_bytes=told or (profile.memory if profile else 0),
                links=link_count(self.rows, device.element, profile),
                numa=self._numa_index(device.numa),
                pci_bus_id=_bus_id(device.element),
                uuid=_info(device.element, "NVIDIAUUID"),
            )
            self._attach(gpu, device)
            self._check_speed(gpu, device)
            gpus[gpu] = device.element
        return gpus

    def _check_speed(self, gpu: Gpu, device: Device) -> None:
        rate = self._rate(device.element)
        if gpu.profile and rate < hardware().pcie_bytes_per_s(gpu.profile.pcie) * 0.9:
            self.slow.append(f"GPU {gpu.index} {rate / 1e9:g} GB/s")

    def add_nics(self) -> None:
        """Add NIC ports: RDMA devices, or network interfaces where a card has none."""
        for device in self.devices:
            names = [name for name in device.os_names if name and not _NO_NIC.match(name)]
            names = [name for name in names if _RDMA.match(name)] or names
            if not device.pci_class.startswith("02"):
                continue
            for name in names:
                if f"{self.host}/{name}" in self.builder.graph:
                    continue
                nic = Nic(
                    id=f"{self.host}/{name}",
                    host=self.host,
                    name=name,
                    rated_bytes_per_s=None,
                    numa=self._numa_index(device.numa),
                    pci_bus_id=_bus_id(device.element),
                    guid=_guid(device.element, name),
                )
                self._attach(nic, device)

    def _attach(self, node: Gpu | Nic, device: Device) -> None:
        self.builder.add(node)
        parent = self._parent(device.bridges, device.numa)
        self.builder.connect(node.id, parent, pcie_link(self._rate(device.element)))

    def _numa_index(self, numa: str) -> int:
        node = self.builder.graph.nodes[numa]["node"]
        assert isinstance(node, Numa)
        return node.index

    def say(self) -> None:
        """Say what the file does not tell."""
        gpus = [data["node"] for _, data in self.builder.graph.nodes(data=True)]
        gpus = [node for node in gpus if isinstance(node, Gpu)]
        unknown = [gpu.index for gpu in gpus if gpu.profile is None]
        if not gpus:
            self.builder.warnings.append("the file names no GPU")
        if unknown:
            self.builder.warnings.append(
                f"the PCI ids of GPUs {unknown} are of no known model; give it with --gpu MODEL to "
                "plan with this topology"
            )
        if self.slow:
            self.builder.warnings.append(
                f"PCIe links slower than their model's, perhaps idle: {', '.join(self.slow)}"
            )
        if self.without_speed:
            self.builder.assumed.append(
                "PCIe links without a speed are taken as "
                f"{DEFAULT_LANE_GT:g} GT/s x16, as NCCL does"
            )


def _is_gpu(device: Device) -> bool:
    if any(_GPU_OS.match(name) for name in device.os_names):
        return True
    vendor = device.vendor_device[2:6]
    return vendor in _GPU_VENDORS and device.pci_class.startswith(("03", "12"))


def _driver_number(device: Device) -> int:
    """Return nvmlN's number, else another driver's; devices without one keep their order."""
    numbers = {
        match[1]: int(match[2]) for name in device.os_names if (match := _GPU_OS.match(name))
    }
    return numbers.get("nvml", next(iter(numbers.values()), 0))


def _info(element: Element, name: str) -> str | None:
    """Return the first value of an <info> at or below an element."""
    found = (x.get("value") for x in element.iter("info") if x.get("name") == name)
    return next(filter(None, found), None)


def _guid(pci: Element, name: str) -> str | None:
    """Return the GUID of a device's first port: the last half of its GID."""
    device = next((x for x in pci.iter("object") if x.get("name") == name), None)
    text = (_info(device, "Port1GID0") or "").replace(":", "")[16:] if device is not None else ""
    return text.lower() if re.fullmatch("[0-9a-fA-F]{16}", text) else None


def _bus_id(element: Element) -> str:
    return normalise_bus_id(element.get("pci_busid", ""))
