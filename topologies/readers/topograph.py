"""topograph model files: a tree of switches, and blocks of nodes below them.

    switches:
      spine: {switches: [leaf1, leaf2]}
    blocks:
      - {switch: leaf1, nodes: ["node[01-18]"], annotations: {x/domain: rack1}}

A switch that only its parent names is a leaf. The annotation that ends in `domain` is the NVLink
domain of the block's nodes.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from epplan.errors import InputError
from epplan.files import validate
from epplan.topologies.graph import ClusterBuilder
from epplan.topologies.hostlist import HostLists

from .fabric import Fabric


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SwitchRecord(_Record):
    """A switch and the switches and nodes below it."""

    name: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    switches: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class BlockRecord(_Record):
    """Nodes on one leaf switch."""

    name: str = ""
    type: str = ""
    switch: str = ""
    nodes: tuple[str, ...]
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Model(_Record):
    """The whole file."""

    switches: dict[str, SwitchRecord] = {}
    blocks: tuple[BlockRecord, ...] = ()


def is_topograph(document: Any) -> bool:
    """Tell whether a document is a topograph model: switches by name, or blocks with nodes."""
    if not isinstance(document, dict) or not document.keys() & {"switches", "blocks"}:
        return False
    return document.keys() <= {"switches", "blocks", "capacity_blocks"}


def read_topograph(document: Any, what: str) -> ClusterBuilder:
    """Return the hosts, switches and NVLink domains of a model.

    Raises:
        InputError: wrong shape, or a switch below itself.
    """
    model = validate(Model, document, what)
    fabric = Fabric(what)
    lists = HostLists(what)
    for name, switch in model.switches.items():
        fabric.switch(name)
        below = [fabric.switch(child) for child in switch.switches]
        below += [fabric.host(host) for nodes in switch.nodes for host in lists.expand(nodes)]
        for child in below:
            _cable(fabric, name, child)
    for block in model.blocks:
        hosts = [host for nodes in block.nodes for host in lists.expand(nodes)]
        for host in hosts:
            lower = fabric.host(host)
            if block.switch:
                _cable(fabric, fabric.switch(block.switch), lower)
        domain = _domain(block)
        if domain:
            fabric.domain(domain, hosts)
    return fabric.finish()


def _cable(fabric: Fabric, upper: str, lower: str) -> None:
    if upper == lower:
        raise InputError(f"{fabric.what}: switch {upper} is below itself")
    if not fabric.builder.graph.has_edge(upper, lower):
        fabric.cable(upper, lower)


def _domain(block: BlockRecord) -> str | None:
    told = {key: value for key, value in block.annotations.items() if key.endswith("/domain")}
    return next(iter(told.values()), block.name if block.type == "nvlink" else None)
