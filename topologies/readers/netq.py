"""NetQ's topology graph (Spectrum-X fabrics): tiers of devices, and links of single cables.

    [{"nodes": [{"tier": 1, "compounded_nodes": [{"id": "node9", "name": "leaf1",
                                                  "device_type": "switch"}]}],
      "links": [{"compounded_links": [{"id": "...", "interfaces": [
          {"node": "node9", "interface": "swp1"}, {"node": "node12", "interface": "ens4f0"}]}]}]}]

Each cable end on a host is a NIC port.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import validate
from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # layout and colours of a picture


class DeviceRecord(_Record):
    """A switch or a host."""

    id: str
    name: str
    device_type: str = ""


class TierRecord(_Record):
    """Devices of one tier."""

    tier: int | None = None
    compounded_nodes: tuple[DeviceRecord, ...] = ()


class EndRecord(_Record):
    """One end of a cable."""

    node: str
    interface: str


class CableRecord(_Record):
    """One cable."""

    interfaces: tuple[EndRecord, ...] = Field(min_length=2, max_length=2)


class LinkRecord(_Record):
    """All cables between two devices."""

    compounded_links: tuple[CableRecord, ...] = ()


class Graph(_Record):
    """One fabric."""

    nodes: tuple[TierRecord, ...]
    links: tuple[LinkRecord, ...]


class File(_Record):
    """The whole file."""

    graphs: tuple[Graph, ...]


def is_netq(document: Any) -> bool:
    """Tell whether a document is a list of graphs of nodes and links."""
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and {"nodes", "links"} <= first.keys()


def read_netq(document: Any, what: str) -> ClusterBuilder:
    """Return hosts, NIC ports, switches and cables.

    Raises:
        InputError: wrong shape, or a cable to an unknown device.
    """
    graphs = document if isinstance(document, list) else [document]
    fabric = Fabric(what)
    for graph in validate(File, {"graphs": graphs}, what).graphs:
        devices = {device.id: device for tier in graph.nodes for device in tier.compounded_nodes}
        for device in devices.values():
            if device.device_type == "switch":
                fabric.switch(device.name)
            else:
                fabric.host(device.name)
        for link in graph.links:
            for cable in link.compounded_links:
                one, other = (_end(fabric, devices, end) for end in cable.interfaces)
                fabric.cable(one, other)
    return fabric.finish()


def _end(fabric: Fabric, devices: dict[str, DeviceRecord], end: EndRecord) -> str:
    device = devices.get(end.node)
    if device is None:
        raise InputError(f"{fabric.what}: a cable ends at {end.node}, which is not among the nodes")
    if device.device_type == "switch":
        return device.name
    return fabric.nic(device.name, end.interface, None)
