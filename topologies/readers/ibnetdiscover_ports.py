"""`ibnetdiscover -p`: one line per port, from both ends; a port without a peer has half a line.

CA   134  1 0x7cfe9003003b4bde 4x EDR - SW  1719 10 0x7cfe9003009ce5b0 ( 'o1 HCA-1' - 'leaf' )
SW  2052 37 0x506b4b03005c2740 4x ???                                    'leaf'
"""

import re

from epplan.topologies.graph import ClusterBuilder

from .ib_fabric import IbFabric, IbNode, lines_of
from .ib_names import link_rate

_END = r"(CA|SW|RT)\s+[0-9]+\s+([0-9]{1,4})\s+0x([0-9a-fA-F]{1,16})"
_LINE = re.compile(
    rf"^\s*{_END}\s+([0-9]{{1,2}}x)\s+(\S+)"
    rf"(?:\s+-\s+{_END}\s+\(\s*'([^']*)'\s+-\s+'([^']*)'\s*\)|\s+'?([^']*)'?\s*$)"
)


def is_ibnetdiscover_ports(text: str) -> bool:
    """Tell whether a text has a line of a port with type, lid, number and GUID."""
    return any(map(_LINE.match, lines_of(text)))


def read_ibnetdiscover_ports(text: str, what: str) -> ClusterBuilder:
    """Return the fabric of an `ibnetdiscover -p` dump."""
    fabric = IbFabric(what)
    for line in filter(None, map(_LINE.match, lines_of(text))):
        kind, port, guid, width, speed, far_kind, far_port, far_guid, *names = line.groups()
        name, far_name, alone = (name or "" for name in names)
        node = _node(fabric, kind, port, guid, name or alone, recorded=True)
        if far_kind is not None:
            peer = _node(fabric, far_kind, far_port, far_guid, far_name, recorded=False)
            rate = link_rate(width, speed)
            fabric.cable((node.key, int(port)), (peer.key, int(far_port)), rate)
    return fabric.build()


def _node(
    fabric: IbFabric, kind: str, port: str, guid: str, name: str, *, recorded: bool
) -> IbNode:
    """Return the node of a port: a switch has one GUID, each port of an adapter has its own."""
    key = guid.lower().zfill(16)
    node = fabric.node(key, kind != "CA", name, recorded=recorded)
    if not node.is_switch:
        node.ports[int(port)] = key
    return node
