"""`ibnetdiscover` output, and the net files of ibsim, which leave out GUIDs and rates.

    Switch  65 "S-b8ce000000001000"  # "MF0;leaf01:MQM9700/U1" enhanced port 0 lid 7 lmc 0
    [1]     "H-b8ce000000000001"[1](b8ce000000000002)  # "node01 mlx5_0" lid 21 4xNDR

    Ca      1 "H-b8ce000000000001"  # "node01 mlx5_0"
    [1](b8ce000000000002)  "S-b8ce000000001000"[1]  # lid 21 lmc 0 "MF0;leaf01:Q/U1" lid 7 4xNDR

Chassis lines, error lines of stderr and blanks stand in between and are skipped.
"""

import re

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder

from .ib_fabric import IbFabric, IbNode, lines_of
from .ib_names import link_rate

_RECORD = re.compile(
    r'\s*(Switch|Ca|Hca|Rt)\s+[0-9]+\s+"([^"]+)"\s*(?:#\s*"([^"]*)")?', re.IGNORECASE
)
_PORT_LINE = re.compile(
    r'^\[([0-9]{1,4})\](?:\[[^\]]*\])?(?:\(([0-9a-fA-F]+)\))?\s*"([^"]+)"\s*\[([0-9]{1,4})\]'
    r"(?:\[[^\]]*\])?(?:\(([0-9a-fA-F]+)\))?(.*)"
)
_RATE = re.compile(r"([0-9]{1,2}x)([SDQFEHNX]DR(?:10)?)\b")


def is_ibnetdiscover(text: str) -> bool:
    """Tell whether a text has a record of a switch or an adapter with its id in quotes."""
    return any(map(_RECORD.match, lines_of(text)))


def read_ibnetdiscover(text: str, what: str) -> ClusterBuilder:
    """Return the fabric of an ibnetdiscover dump or an ibsim net file.

    Raises:
        InputError: a node is recorded twice.
    """
    fabric = IbFabric(what)
    node: IbNode | None = None
    for number, line in enumerate(lines_of(text), 1):
        record, port = _RECORD.match(line), _PORT_LINE.match(line.strip())
        if record:
            node = _read_record(fabric, record, f"{what}: line {number}")
        elif port and node is not None:
            _read_port(fabric, node, port)
    return fabric.build()


def _read_record(fabric: IbFabric, record: re.Match[str], where: str) -> IbNode:
    kind, name, description = record.groups()
    is_switch = kind.lower() in ("switch", "rt")
    key = _key(name)
    if key in fabric.nodes and fabric.nodes[key].recorded:
        raise InputError(f'{where}: {kind} "{name}" has a second record')
    if description is None:  # ibsim: the id is the name
        description = name
    return fabric.node(key, is_switch, description, recorded=True)


def _read_port(fabric: IbFabric, node: IbNode, line: re.Match[str]) -> None:
    port, guid, name, peer_port, peer_guid, comment = line.groups()
    described = re.search(r'"([^"]*)"', comment)
    peer = fabric.node(
        _key(name),
        name.startswith("S-"),
        described[1] if described else name,
        recorded=False,
    )
    if guid and not node.is_switch:
        node.ports[int(port)] = guid.lower().zfill(16)
    if peer_guid and not peer.is_switch:
        peer.ports[int(peer_port)] = peer_guid.lower().zfill(16)
    rate = _RATE.search(comment)
    fabric.cable(
        (node.key, int(port)),
        (peer.key, int(peer_port)),
        link_rate(rate[1], rate[2]) if rate else None,
    )


def _key(name: str) -> str:
    """Return a node's GUID from `H-<guid>`, or an ibsim id as it is."""
    match = re.fullmatch(r"[HSR]-([0-9a-fA-F]{4,16})", name)
    return match[1].lower() if match else name
