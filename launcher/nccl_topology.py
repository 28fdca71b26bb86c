"""A host of the cluster graph as a NCCL topology file (NCCL_TOPO_FILE).

Only processors and PCI devices are written, as in the files of clouds: NCCL completes such a
skeleton with the NVLinks, GPUs and ports it finds at run time, and would take ours for the truth
where the two differ. Element meaning: nccl src/graph/xml.cc.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from epplan.quoting import comment
from epplan.topologies.graph import Cluster, Gpu, Nic, Node, Numa, PcieSwitch
from epplan.topologies.hardware import hardware

_GPU, _NIC, _BRIDGE = "0x030200", "0x020700", "0x060400"  # PCI classes
_BUS_ID = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_WIDTHS = (16, 8, 4, 2, 1)


def nccl_topology(cluster: Cluster, host: str, made_by: str) -> str | None:
    """Return the file's text, or None where the source does not tell the GPUs' bus ids.

    Args:
        cluster: has the host.
        host: its name.
        made_by: version and command, for a comment.
    """
    members = cluster.by_host()[host]
    gpus = [node for node in members if isinstance(node, Gpu)]
    if not gpus or any(gpu.pci_bus_id is None for gpu in gpus):
        return None
    system = ElementTree.Element("system", version="1")
    writer = _Writer(cluster)
    for numa in (node for node in members if isinstance(node, Numa)):
        cpu = ElementTree.SubElement(system, "cpu", numaid=str(numa.index))
        writer.add_devices(cpu, numa.id, above="")
    ElementTree.indent(system)
    note = re.sub("-(?=-)", "- ", comment(made_by))  # XML allows no -- in a comment
    return f"<!-- {note} -->\n{ElementTree.tostring(system, encoding='unicode')}\n"


class _Writer:
    """Walks from the processors down to the devices."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._invented = 0

    def add_devices(self, parent: ElementTree.Element, name: str, above: str) -> None:
        for child in self._below(name, above):
            bus_id = self._bus_id(child)
            if bus_id is None:
                continue
            attributes = {"busid": bus_id, "class": _class(child)}
            attributes |= _speed(self._cluster.link(name, child.id).rated_bytes_per_s)
            element = ElementTree.SubElement(parent, "pci", attributes)
            if isinstance(child, PcieSwitch):
                self.add_devices(element, child.id, above=name)

    def _below(self, name: str, above: str) -> Iterator[Node]:
        for other in self._cluster.graph[name]:
            is_pcie = self._cluster.link(name, other).kind == "pcie"
            node = self._cluster.node(other)
            if is_pcie and other != above and not isinstance(node, Numa):
                yield node

    def _bus_id(self, node: Node) -> str | None:
        """Return a device's bus id; bridges that the source invented get one as clouds do."""
        if isinstance(node, Gpu | Nic):
            return node.pci_bus_id
        tail = node.id.rpartition("/")[2]
        if _BUS_ID.fullmatch(tail):
            return tail
        self._invented += 1
        return f"ffff:ff:{self._invented:02x}.0"


def _class(node: Node) -> str:
    if isinstance(node, Gpu):
        return _GPU
    return _NIC if isinstance(node, Nic) else _BRIDGE


def _speed(rate: float) -> dict[str, str]:
    """Return link speed and width for rated bytes/s; the widest link of this rate."""
    for width in _WIDTHS:
        for speed in hardware().pcie_lane_gb_per_s:
            if abs(hardware().pcie_bytes_per_s(speed, width) - rate) < 1e-3 * rate:
                return {"link_speed": f"{speed:.1f} GT/s PCIe", "link_width": str(width)}
    return {"link_speed": "", "link_width": "16"}
