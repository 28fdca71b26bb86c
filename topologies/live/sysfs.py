"""PCI devices, NUMA nodes, CPUs and NICs as the kernel shows them under /sys and /proc.

Every folder may be missing or unreadable (containers hide devices, virtual machines have other
trees): a file that cannot be read is a refusal, a folder that is not there is empty.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epplan.topologies.readers.pci import normalise_bus_id

from .host_file import NicRecord, PciRecord, Reading, Readings, Refusal

_BUS_ID = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")
_PCI_FILES = (
    "class",
    "vendor",
    "device",
    "numa_node",
    "max_link_speed",
    "max_link_width",
    "current_link_speed",
    "current_link_width",
)
_PORT_FILES = ("state", "phys_state", "rate", "link_layer")
_GPU_VENDORS = ("0x10de", "0x1002")

SYSFS_SOURCES = {
    **{f"pci.{name}": f"/sys/bus/pci/devices/BUS_ID/{name}" for name in _PCI_FILES},
    "pci.path": "/sys/bus/pci/devices/BUS_ID, resolved",
    **{f"nic.{name}": f"/sys/class/infiniband/NAME/ports/PORT/{name}" for name in _PORT_FILES},
    "nic.node_guid": "/sys/class/infiniband/NAME/node_guid",
    "nic.gid": "/sys/class/infiniband/NAME/ports/PORT/gids/0",
    "nic.interfaces": "/sys/class/infiniband/NAME/device/net",
    "nic.operstate": "/sys/class/net/NAME/operstate",
    "nic.speed": "/sys/class/net/NAME/speed (Mb/s)",
    "boot_id": "/proc/sys/kernel/random/boot_id",
    "cpu.vendor_id": "/proc/cpuinfo",
    "cpu.cpu family": "/proc/cpuinfo",
    "cpu.model": "/proc/cpuinfo",
    "cpu.machine": "uname",
    "numa.cpulist": "/sys/devices/system/node/nodeN/cpulist",
}


@dataclass(frozen=True, slots=True)
class Sysfs:
    """The kernel's view of this machine, under `root`.

    Attributes:
        root: what holds `sys` and `proc`; another folder than / to read a copied tree.
        machine: the CPU architecture, as uname says it.
    """

    root: Path = Path("/")
    machine: str = os.uname().machine

    def cpu(self) -> Readings:
        """Return vendor, family and model of the first CPU."""
        found: Readings = {"machine": self.machine}
        for line in self._text(self.root / "proc/cpuinfo").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("vendor_id", "cpu family", "model"):
                found.setdefault(key, value)
        return found

    def boot_id(self) -> Reading:
        """Return what tells this machine, since its last boot, from all others."""
        return self._read(self.root / "proc/sys/kernel/random/boot_id")

    def numa_nodes(self) -> dict[int, Readings]:
        """Return the nodes that have CPUs; GPU memory can be a node without any."""
        folders = self._entries(self.root / "sys/devices/system/node", "node[0-9]*")
        nodes = {int(path.name[4:]): self._read(path / "cpulist") for path in folders}
        return {index: {"cpulist": cpus} for index, cpus in sorted(nodes.items()) if cpus != ""}

    def gpu_bus_ids(self) -> list[str]:
        """Return the bus ids of all display and compute devices of GPU makers."""
        return sorted(
            path.name
            for path in self._entries(self.root / "sys/bus/pci/devices", "*")
            if self._text(path / "vendor").strip() in _GPU_VENDORS
            and self._text(path / "class").startswith(("0x0300", "0x0302", "0x0380", "0x1200"))
        )

    def pci(self, bus_ids: Iterator[str]) -> dict[str, PciRecord]:
        """Return these devices and everything on the way to them that sysfs shows."""
        found: dict[str, PciRecord] = {}
        for bus_id in bus_ids:
            path = self.pci_path(self.root / "sys/bus/pci/devices" / bus_id)
            for depth, name in enumerate(path, 1):
                if name not in found:
                    folder = self.root / "sys/bus/pci/devices" / name
                    readings = {file: self._read(folder / file) for file in _PCI_FILES}
                    found[name] = PciRecord(path=path[:depth], readings=readings)
        return found

    def pci_path(self, link: Path) -> tuple[str, ...]:
        """Return the bus ids from the root port to the device behind a link."""
        if not link.exists():
            return ()
        return tuple(part for part in link.resolve().parts if _BUS_ID.fullmatch(part))

    def nics(self) -> Iterator[NicRecord]:
        """Yield every RDMA port, then every network interface with hardware but without RDMA."""
        taken: set[str] = set()
        for device in self._entries(self.root / "sys/class/infiniband", "*"):
            if (device / "device/physfn").exists():
                continue  # a virtual function: its parent is listed
            interfaces = [path.name for path in self._entries(device / "device/net", "*")]
            taken.update(interfaces)
            for port in self._entries(device / "ports", "[0-9]*"):
                yield self._rdma_port(device, port, interfaces)
        for interface in self._entries(self.root / "sys/class/net", "*"):
            bus_id = self._device(interface)
            if interface.name not in taken and bus_id:
                yield NicRecord(
                    name=interface.name,
                    pci_bus_id=bus_id,
                    readings={
                        name: self._read(interface / name) for name in ("operstate", "speed")
                    },
                )

    def _rdma_port(self, device: Path, port: Path, interfaces: list[str]) -> NicRecord:
        readings = {name: self._read(port / name) for name in _PORT_FILES}
        readings["node_guid"] = self._read(device / "node_guid")
        readings["gid"] = self._read(port / "gids/0")
        if interfaces:
            readings["interfaces"] = " ".join(interfaces)
        return NicRecord(
            name=device.name,
            port=int(port.name),
            pci_bus_id=self._device(device),
            readings=readings,
        )

    def _device(self, entry: Path) -> str | None:
        """Return the PCI device an entry of /sys/class hangs on; virtio is one level below."""
        path = self.pci_path(entry / "device")
        return normalise_bus_id(path[-1]) if path else None

    def _entries(self, folder: Path, pattern: str) -> list[Path]:
        try:
            return sorted(folder.glob(pattern))
        except OSError:
            return []

    def _read(self, file: Path) -> Reading:
        try:
            return file.read_text(encoding="ascii", errors="replace").strip()
        except OSError as error:
            return Refusal(refused=error.strerror or type(error).__name__)

    def _text(self, file: Path) -> str:
        reading = self._read(file)
        return reading if isinstance(reading, str) else ""
