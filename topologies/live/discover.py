"""Ask this machine what it is: NVML for the GPUs, sysfs for all the rest, joined by bus id."""

import platform
from collections import Counter
from pathlib import Path

import epplan
from epplan.topologies.readers.pci import normalise_bus_id

from .host_file import (
    GpuRecord,
    HostRecord,
    HostsFile,
    Readings,
    Refusal,
    hosts_text,
)
from .nvml import (
    GPU_SOURCES,
    LINK_SOURCES,
    MAX_LINKS,
    Nvml,
    NvmlUnavailableError,
    open_nvml,
)
from .sysfs import SYSFS_SOURCES, Sysfs


def discover_text() -> str:
    """Return this machine's host file; what the source `local` is."""
    return hosts_text(hosts_file([discover_host()]))


def discover_host(root: Path = Path("/"), name: str | None = None) -> HostRecord:
    """Return everything this machine tells about itself.

    Args:
        root: holds `sys` and `proc`.
        name: of the host; by default its own, without the domain.
    """
    name = name or platform.node().partition(".")[0] or "localhost"
    try:
        with open_nvml() as nvml:
            return read_host(name, nvml, Sysfs(root))
    except NvmlUnavailableError as error:
        return read_host(name, None, Sysfs(root), f"NVML cannot be used: {error}")


def read_host(name: str, nvml: Nvml | None, sysfs: Sysfs, remark: str = "") -> HostRecord:
    """Return one host's record.

    Args:
        name: of the host.
        nvml: answers about GPUs; None where there is none.
        sysfs: the kernel's view.
        remark: why there is no NVML.
    """
    remarks = [remark] if remark else []
    gpus = _read_gpus(nvml, remarks) if nvml else []
    in_sysfs = [bus for bus in sysfs.gpu_bus_ids() if bus not in {x.pci_bus_id for x in gpus}]
    if in_sysfs and gpus:
        remarks.append(
            f"{len(in_sysfs)} GPUs that sysfs shows and NVML does not ({', '.join(in_sysfs)}) are "
            "left out: this process may not use them"
        )
    elif in_sysfs:
        gpus = [GpuRecord(pci_bus_id=bus) for bus in in_sysfs]
    nics = tuple(sysfs.nics())
    buses = [*(gpu.pci_bus_id for gpu in gpus), *(nic.pci_bus_id for nic in nics if nic.pci_bus_id)]
    return HostRecord(
        name=name,
        boot_id=sysfs.boot_id(),
        driver_version=nvml.driver_version() if nvml else None,
        cpu=sysfs.cpu(),
        numa_nodes=sysfs.numa_nodes(),
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.pci_bus_id)),
        nics=nics,
        pci=sysfs.pci(iter(buses)),
        remarks=tuple(remarks),
    )


def hosts_file(hosts: list[HostRecord]) -> HostsFile:
    """Return the file that holds these hosts."""
    return HostsFile(
        epplan_version=epplan.__version__,
        sources={
            **{f"gpu.{name}": source for name, source in GPU_SOURCES.items()},
            **{f"gpu.link.{name}": source for name, source in LINK_SOURCES.items()},
            **SYSFS_SOURCES,
        },
        hosts=tuple(hosts),
    )


def _read_gpus(nvml: Nvml, remarks: list[str]) -> list[GpuRecord]:
    gpus = []
    for index in range(nvml.gpu_count()):
        replies = {name: nvml.ask_gpu(index, name) for name in GPU_SOURCES}
        bus_id = replies["pci_bus_id"]
        if not isinstance(bus_id, str):
            reason = bus_id.refused if isinstance(bus_id, Refusal) else bus_id
            remarks.append(
                f"GPU {index} of NVML is left out: it does not tell its bus id ({reason})"
            )
            continue
        links, refused = _read_links(nvml, index)
        gpus.append(
            GpuRecord(
                pci_bus_id=normalise_bus_id(bus_id),
                nvml_index=index,
                replies=replies,
                links=links,
                links_refused=refused,
            )
        )
    return gpus


def _read_links(nvml: Nvml, gpu: int) -> tuple[tuple[Readings, ...], dict[str, int]]:
    """Return the links whose state NVML tells, and how many it refuses, by refusal."""
    links: list[Readings] = []
    refused: Counter[str] = Counter()
    for link in range(MAX_LINKS):
        states = {name: nvml.ask_link(gpu, link, name) for name in ("state", "state_field")}
        refusals = {state.refused for state in states.values() if isinstance(state, Refusal)}
        if all(isinstance(state, Refusal) for state in states.values()):
            refused.update(refusals)
            continue
        others = {name: nvml.ask_link(gpu, link, name) for name in LINK_SOURCES.keys() - states}
        links.append({"link": link, **states, **dict(sorted(others.items()))})
    return tuple(links), dict(refused)
