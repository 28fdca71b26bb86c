"""A whole host from its parts list: GPUs, NVLink fabric, PCIe switches, NUMA nodes, NICs.

What a cluster file's host type and a synthetic cluster describe. GPUs and NICs are spread evenly
over PCIe switches and NUMA nodes in index order, as in DGX and HGX machines.
"""

from dataclasses import dataclass

from .graph import ClusterBuilder, Gpu, Link, Nic, Numa, PcieSwitch, Plane
from .hardware import GpuProfile, NicProfile, hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class HostType:
    """The parts list of one kind of host."""

    gpu: GpuProfile
    gpus: int
    numa_nodes: int
    nic: NicProfile | None
    nics: int
    links: int  # NVLink links of each GPU that work; fewer than the model's is a degraded host
    memory_bytes: int  # of each GPU


def add_host(builder: ClusterBuilder, name: str, host: HostType, plane: str | None) -> list[Nic]:
    """Add one host's nodes and links and return its NICs.

    Args:
        builder: receives the nodes.
        name: host name, unique in the cluster.
        host: its parts.
        plane: id of an existing NVLink plane to join (a domain over several hosts), or None to
            make the host's own.
    """
    _add_numa_nodes(builder, name, host)
    switches = _add_pcie_switches(builder, name, host)
    gpus = [_add_gpu(builder, name, host, index, switches) for index in range(host.gpus)]
    _join_gpus(builder, name, host, gpus, plane)
    return [_add_nic(builder, name, host, index, switches) for index in range(host.nics)]


def add_plane(builder: ClusterBuilder, name: str, host: str = "") -> str:
    """Add an NVLink plane and return its id."""
    return builder.add(Plane(id=name, host=host)).id


def spread(index: int, count: int, places: int) -> int:
    """Return the place of item `index` when `count` items fill `places` evenly in order."""
    return index * places // count


def _add_numa_nodes(builder: ClusterBuilder, name: str, host: HostType) -> None:
    for index in range(host.numa_nodes):
        builder.add(Numa(id=f"{name}/numa{index}", host=name, index=index))
        for other in range(index):
            rate = hardware().numa_bytes_per_s("default", 0)
            builder.connect(f"{name}/numa{other}", f"{name}/numa{index}", numa_link(rate))


def numa_link(rate: float) -> Link:
    """Return a link between NUMA nodes with NCCL's bandwidth for the CPU."""
    efficiency = hardware().efficiency["numa"]
    return Link(kind="numa", rated_bytes_per_s=rate, efficiency=efficiency, provenance="profile")


def pcie_link(gigatransfers: float) -> Link:
    """Return a PCIe x16 link of a profile's generation."""
    rate = hardware().pcie_bytes_per_s(gigatransfers)
    efficiency = hardware().efficiency["pcie"]
    return Link(kind="pcie", rated_bytes_per_s=rate, efficiency=efficiency, provenance="profile")


def nvlink(profile: GpuProfile, links: int) -> Link:
    """Return `links` NVLink or xGMI links of a GPU model as one."""
    amd = any(device.startswith("0x1002") for device in profile.device)
    return Link(
        kind="nvlink",
        rated_bytes_per_s=profile.link * links,
        efficiency=hardware().efficiency["xgmi" if amd else "nvlink"],
        provenance="profile",
        count=links,
    )


def _add_pcie_switches(builder: ClusterBuilder, name: str, host: HostType) -> list[str]:
    """Add one PCIe switch per group of GPUs that share NICs; none without NICs or PCIe."""
    if not host.nics or not host.gpu.pcie:
        return []
    count = min(host.gpus, host.nics)
    link = pcie_link(host.gpu.pcie)
    switches = [
        builder.add(PcieSwitch(id=f"{name}/pcie{index}", host=name)).id for index in range(count)
    ]
    for index, switch in enumerate(switches):
        builder.connect(switch, f"{name}/numa{spread(index, count, host.numa_nodes)}", link)
    return switches


def _add_gpu(
    builder: ClusterBuilder, name: str, host: HostType, index: int, switches: list[str]
) -> str:
    numa = spread(index, host.gpus, host.numa_nodes)
    gpu = builder.add(
        Gpu(
            id=f"{name}/gpu{index}",
            host=name,
            index=index,
            profile=host.gpu,
            memory_bytes=host.memory_bytes,
            links=host.links if host.gpu.fabric in ("switch", "mesh") else 0,
            numa=numa,
        )
    )
    if host.gpu.pcie:
        parent = switches[spread(index, host.gpus, len(switches))] if switches else None
        builder.connect(gpu.id, parent or f"{name}/numa{numa}", pcie_link(host.gpu.pcie))
    return gpu.id


def _join_gpus(
    builder: ClusterBuilder, name: str, host: HostType, gpus: list[str], plane: str | None
) -> None:
    if host.gpu.fabric == "switch":
        plane = plane or add_plane(builder, f"{name}/nvswitch", name)
        for gpu in gpus:
            builder.connect(gpu, plane, nvlink(host.gpu, host.links))
    elif host.gpu.fabric == "memory":
        memory = add_plane(builder, f"{name}/memory", name)
        efficiency = hardware().efficiency["shm"]
        rate = host.gpu.link
        link = Link(kind="shm", rated_bytes_per_s=rate, efficiency=efficiency, provenance="profile")
        for gpu in gpus:
            builder.connect(gpu, memory, link)
    elif host.gpu.fabric == "mesh" and len(gpus) > 1:
        per_pair = host.links // (len(gpus) - 1)
        if not per_pair:
            return
        for index, gpu in enumerate(gpus):
            for other in gpus[:index]:
                builder.connect(other, gpu, nvlink(host.gpu, per_pair))


def _add_nic(
    builder: ClusterBuilder, name: str, host: HostType, index: int, switches: list[str]
) -> Nic:
    assert host.nic is not None
    nic = builder.add(
        Nic(
            id=f"{name}/nic{index}",
            host=name,
            name=f"nic{index}",
            rated_bytes_per_s=host.nic.rate,
            numa=spread(index, host.nics, host.numa_nodes),
        )
    )
    parent = (
        switches[spread(index, host.nics, len(switches))] if switches else f"{name}/numa{nic.numa}"
    )
    builder.connect(nic.id, parent, pcie_link(host.nic.pcie))
    return nic
