"""`iblinkinfo` output: a block per node, or with -l one line per link.

    CA: node01 mlx5_0:
      0xb8ce000000000002   21   1[  ] ==( 4X 106.25 Gbps Active/ LinkUp)==>   7   1[  ] "leaf" ( )
    Switch: 0xb8ce000000001000 MF0;leaf01:MQM9700/U1:
                            7   1[  ] ==( 4X 106.25 Gbps Active/ LinkUp)==>  21   1[  ] "x" ( )
                            7   2[  ] ==(              Down/ Polling)==>          [  ] "" ( )

Lines often come out of grep without their blocks: then LIDs join them, and lines that begin with a
GUID are adapters. The number is Gb/s of one lane on the wire.
"""

import re
from dataclasses import dataclass

from epplan.topologies.graph import ClusterBuilder

from .ib_fabric import IbFabric, lines_of
from .ib_names import link_rate

_BLOCK = re.compile(r"^\s*(CA|Switch|Router):\s*(?:0x([0-9a-fA-F]+)\s+)?(.*?):?\s*$")
_LINE = re.compile(
    r'^\s*(?:0x([0-9a-fA-F]+)\s+)?(?:"([^"]*)"\s+)?([0-9]{1,6})\s+([0-9]{1,4})\[[^\]]*\]'
    r"\s+==\(\s*(?:([0-9]{1,2}X)\s+([0-9.]+)\s*Gbps\s+)?([^)]*)\)==>"
    r'\s*(?:0x([0-9a-fA-F]+)\s+)?([0-9]{1,6})?\s*([0-9]{1,4})?\[[^\]]*\]\s*"([^"]*)"'
)
_ADAPTER = re.compile(r"\b(HCA-?[0-9]*|mlx[45]_\w+|mthca\w*|hfi1_\w+|qib\w+|ibp\w+|roce\w+)\s*$")


@dataclass(frozen=True, slots=True)
class _End:
    lid: str
    port: int
    name: str
    guid: str


def is_iblinkinfo(text: str) -> bool:
    """Tell whether a text has one of iblinkinfo's arrows."""
    return any(map(_LINE.match, lines_of(text)))


def read_iblinkinfo(text: str, what: str) -> ClusterBuilder:
    """Return the fabric of an iblinkinfo listing."""
    fabric = IbFabric(what)
    switches: set[str] = set()
    links: list[tuple[_End, _End | None, float | None]] = []
    block: tuple[bool, str] | None = None
    for line in lines_of(text):
        heading, match = _BLOCK.match(line), _LINE.match(line)
        if match:
            here, there, rate = _ends(match, block[1] if block else "")
            links.append((here, there, rate))
            if block[0] if block else not here.guid or _looks_like_switch(here):
                switches.add(here.lid)
            if there is not None and _looks_like_switch(there):
                switches.add(there.lid)
        elif heading:
            block = (heading[1] != "CA", heading[3])
    for here, there, rate in links:
        _add(fabric, here, switches, recorded=True)
        if there is not None:
            _add(fabric, there, switches, recorded=False)
            fabric.cable((here.lid, here.port), (there.lid, there.port), rate)
    return fabric.build()


def _ends(match: re.Match[str], block: str) -> tuple[_End, _End | None, float | None]:
    guid, name, lid, port, width, speed, state = match.groups()[:7]
    far_guid, far_lid, far_port, far_name = match.groups()[7:]
    here = _End(lid, int(port), (name or block).strip(), _guid(guid))
    if "Active" not in state or not far_lid or not far_port:
        return here, None, None
    there = _End(far_lid, int(far_port), far_name.strip(), _guid(far_guid))
    return here, there, link_rate(width, speed) if width else None


def _guid(digits: str | None) -> str:
    return digits.lower().zfill(16) if digits else ""


def _looks_like_switch(end: _End) -> bool:
    return ";" in end.name or (bool(end.name) and not _ADAPTER.search(end.name))


def _add(fabric: IbFabric, end: _End, switches: set[str], *, recorded: bool) -> None:
    """Add a port's node, known by its LID: a switch has one, an adapter has one per port."""
    node = fabric.node(end.lid, end.lid in switches, end.name, recorded=recorded)
    if not node.is_switch and end.guid:
        node.ports[end.port] = end.guid
