"""Host records to the cluster graph; what a host could not tell is assumed and said.

numa0 -- 0000:0f:00.0 (switch) -- gpu0 == nvswitch
                |
              mlx5_0
"""

from typing import Any

from epplan.topologies.graph import ClusterBuilder, Gpu, Link, Nic, Numa, PcieSwitch, Plane
from epplan.topologies.hardware import GpuProfile, gpu_profile, hardware
from epplan.topologies.host import numa_link, nvlink
from epplan.topologies.readers.pci import DEFAULT_LANE_GT
from epplan.topologies.units import format_bandwidth

from . import gpu_record
from .host_file import (
    GpuRecord,
    HostRecord,
    NicRecord,
    parse_hosts,
)
from .readings import max_pcie_speed, nic_rate, number, nvml_pcie_rate, port_guid

# A real port of a GPU or NIC is faster; emulated ones say 2.5 GT/s x1.
_VIRTUAL_BYTES_PER_S = 1e9
_ARCHES = {"aarch64": "arm64"}


def read_host_file(document: Any, what: str, gpu_model: str | None = None) -> ClusterBuilder:
    """Return the hosts a parsed host file describes.

    Args:
        document: the parsed JSON.
        what: names it in errors.
        gpu_model: the profile of GPUs whose model the file does not tell.

    Raises:
        InputError: all problems of the file at once.
    """
    hosts = parse_hosts(document, what).hosts
    return hosts_graph(hosts[0].name if len(hosts) == 1 else what, *hosts, gpu_model=gpu_model)


def hosts_graph(name: str, *hosts: HostRecord, gpu_model: str | None = None) -> ClusterBuilder:
    """Return these hosts as one cluster; hosts of one NVLink domain share its plane."""
    builder = ClusterBuilder(name)
    fallback = gpu_profile(gpu_model) if gpu_model else None
    for host in hosts:
        _Host(builder, host, fallback).add()
    return builder


class _Host:
    """Adds one host's nodes and links."""

    def __init__(
        self, builder: ClusterBuilder, record: HostRecord, fallback: GpuProfile | None
    ) -> None:
        self.builder = builder
        self.record = record
        self.fallback = fallback
        self.numa_nodes = sorted(record.numa_nodes) or [0]
        self.gpus: dict[str, Gpu] = {}  # by bus id

    def add(self) -> None:
        self.builder.warnings += [f"{self.record.name}: {text}" for text in self.record.remarks]
        self._add_numa_nodes()
        for index, gpu in enumerate(self.record.gpus):
            self._add_gpu(index, gpu)
        for gpu in self.record.gpus:
            self._add_nvlinks(gpu)
        for nic in self.record.nics:
            self._add_nic(nic)
        if not self.record.gpus:
            self._warn("no GPU was found, by NVML or in sysfs")

    def _assume(self, text: str) -> None:
        self.builder.assumed.append(f"{self.record.name}: {text}")

    def _warn(self, text: str) -> None:
        self.builder.warnings.append(f"{self.record.name}: {text}")

    # --- NUMA nodes and PCIe ----------------------------------------------------------------------

    def _add_numa_nodes(self) -> None:
        host, cpu = self.record.name, self.record.cpu
        machine = str(cpu.get("machine", "x86_64"))
        rate = hardware().numa_bytes_per_s(
            str(cpu.get("vendor_id", "")),
            number(cpu, "model") or 0,
            _ARCHES.get(machine, machine),
        )
        for position, index in enumerate(self.numa_nodes):
            self.builder.add(Numa(id=f"{host}/numa{index}", host=host, index=index))
            for other in self.numa_nodes[:position]:
                self.builder.connect(f"{host}/numa{other}", f"{host}/numa{index}", numa_link(rate))

    def _numa_of(self, bus_id: str | None, what: str) -> int:
        device = self.record.pci.get(bus_id) if bus_id else None
        index = number(device.readings, "numa_node") if device else None
        if index in self.numa_nodes:
            return index
        if len(self.numa_nodes) > 1:
            self._assume(f"sysfs does not tell the NUMA node of {what}; node 0 assumed")
        return self.numa_nodes[0]

    def _attach(self, node: str, bus_id: str | None, numa: int, rate: float | None) -> None:
        """Hang a device on its PCIe switch, or on its NUMA node.

        As NCCL does: a switch is its upstream port, and root and downstream ports are left out.
        """
        device = self.record.pci.get(bus_id) if bus_id else None
        path = device.path if device else ()
        child = node
        for position in range(len(path) - 1, 1, -2):
            switch = f"{self.record.name}/{path[position - 2]}"
            is_new = switch not in self.builder.graph
            if is_new:
                self.builder.add(PcieSwitch(id=switch, host=self.record.name))
            self.builder.connect(child, switch, self._pcie_link(path[: position + 1], rate))
            if not is_new:
                return
            child, rate = switch, None
        end = path[: len(path) - (len(path) - 1) // 2 * 2] if path else ()
        self.builder.connect(child, f"{self.record.name}/numa{numa}", self._pcie_link(end, rate))

    def _pcie_link(self, path: tuple[str, ...], rate: float | None) -> Link:
        """Return the link above a device: as fast as the slower of it and the port above."""
        ends = [self.record.pci[bus] for bus in path[-2:] if bus in self.record.pci]
        known = [speed for end in ends if (speed := max_pcie_speed(end))]
        if len(known) == 2 and known[0] <= _VIRTUAL_BYTES_PER_S < known[1]:
            self._warn(
                f"PCIe bridge {path[-2]} says {format_bandwidth(known[0])}, slower than {path[-1]} "
                "below it; taken as a virtual bridge with the device's speed"
            )
            del known[0]
        read = min(known) if known else rate
        return Link(
            kind="pcie",
            rated_bytes_per_s=read or hardware().pcie_bytes_per_s(DEFAULT_LANE_GT),
            efficiency=hardware().efficiency["pcie"],
            provenance="read" if read else "profile",
        )

    # --- GPUs -------------------------------------------------------------------------------------

    def _add_gpu(self, index: int, record: GpuRecord) -> None:
        host, bus_id = self.record.name, record.pci_bus_id
        profile = self._profile(index, record)
        memory = record.replies.get("memory_bytes")
        if not isinstance(memory, int):
            memory = profile.memory if profile else 0
            self._assume(
                f"GPU {index} does not tell its memory; "
                + (f"the profile's {profile.name} assumed" if profile else "taken as 0")
            )
        numa = self._numa_of(bus_id, f"GPU {index}")
        uuid = record.replies.get("uuid")
        self.gpus[bus_id] = self.builder.add(
            Gpu(
                id=f"{host}/gpu{index}",
                host=host,
                index=index,
                profile=profile,
                memory_bytes=memory,
                links=self._links(record).to_switch + sum(self._links(record).to_gpus.values()),
                numa=numa,
                pci_bus_id=bus_id,
                uuid=uuid if isinstance(uuid, str) else None,
                mig=gpu_record.is_mig(record),
                faults=gpu_record.faults(record),
            )
        )
        self._attach(f"{host}/gpu{index}", bus_id, numa, nvml_pcie_rate(record.replies))

    def _profile(self, index: int, record: GpuRecord) -> GpuProfile | None:
        profile = gpu_record.find_profile(record, self.record.pci.get(record.pci_bus_id))
        if profile is not None:
            return profile
        name = gpu_record.model_name(record)
        if self.fallback is not None:
            self._assume(f"GPU {index} ({name}) is taken as {self.fallback.name}, as given")
            return self.fallback
        self._warn(
            f"GPU {index} ({name}) has no hardware profile; give one with --gpu MODEL to plan"
        )
        return None

    # --- NVLink -----------------------------------------------------------------------------------

    def _links(self, record: GpuRecord) -> gpu_record.Links:
        peers = {gpu.pci_bus_id for gpu in self.record.gpus}
        return gpu_record.count_links(record, self.record.pci, peers)

    def _add_nvlinks(self, record: GpuRecord) -> None:
        gpu = self.gpus[record.pci_bus_id]
        if not record.links:
            self._assume_links(gpu, record)
            return
        links = self._links(record)
        twin = gpu.profile or gpu_record.nearest_model(record)
        if twin is None:
            self._warn(f"GPU {gpu.index}: neither model nor generation known, NVLinks left out")
            return
        if links.down:
            self._warn(f"GPU {gpu.index}: {links.down} NVLinks are not active")
        if links.hidden:
            self._assume(
                f"GPU {gpu.index}: the other end of {links.hidden} NVLinks is hidden; taken as "
                "NVSwitches"
            )
        if links.to_switch:
            self.builder.connect(gpu.id, self._plane(record), nvlink(twin, links.to_switch))
        for bus_id, count in links.to_gpus.items():
            peer = self.gpus.get(bus_id)
            if peer is None or peer is gpu:
                self._warn(
                    f"GPU {gpu.index}: {count} NVLinks to {bus_id}, which is no other GPU here; "
                    "ignored"
                )
                continue
            self.builder.graph.add_edge(gpu.id, peer.id, link=nvlink(twin, count))

    def _assume_links(self, gpu: Gpu, record: GpuRecord) -> None:
        profile, reason = gpu.profile, gpu_record.why_no_links(record)
        if profile is None or not profile.links:
            return  # a model without NVLink, or none that a profile could stand in for
        if profile.fabric != "switch":
            self._warn(f"GPU {gpu.index}: {reason}; none assumed, they depend on the board")
            return
        self._assume(
            f"GPU {gpu.index}: {reason}; {profile.links} links to NVSwitches assumed from the "
            f"profile {profile.name}"
        )
        self.builder.connect(gpu.id, self._plane(record), nvlink(profile, profile.links))

    def _plane(self, record: GpuRecord) -> str:
        """Return the host's NVSwitches, or those of the domain the GPU has joined."""
        domain = gpu_record.domain(record)
        name = f"nvlink-domain {domain}" if domain else f"{self.record.name}/nvswitch"
        if name not in self.builder.graph:
            self.builder.add(Plane(id=name, host="" if domain else self.record.name))
        return name

    # --- NICs -------------------------------------------------------------------------------------

    def _add_nic(self, record: NicRecord) -> None:
        ports = sum(other.name == record.name for other in self.record.nics)
        name = record.name if ports == 1 else f"{record.name}:{record.port}"
        rate = nic_rate(record.readings)
        state = record.readings.get("state") or record.readings.get("operstate")
        if isinstance(state, str) and not ("ACTIVE" in state or state in ("up", "unknown")):
            self._warn(f"NIC {name} is not active: {state}")
        numa = self._numa_of(record.pci_bus_id, f"NIC {name}")
        nic = self.builder.add(
            Nic(
                id=f"{self.record.name}/{name}",
                host=self.record.name,
                name=name,
                rated_bytes_per_s=rate,
                numa=numa,
                pci_bus_id=record.pci_bus_id,
                guid=port_guid(record.readings),
            )
        )
        self._attach(nic.id, record.pci_bus_id, numa, None)
