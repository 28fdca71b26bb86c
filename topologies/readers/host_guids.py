"""Lists of hosts with their InfiniBand port GUIDs, which join hosts to a fabric dump.

VM_hostname node01
0ff08c4321664e96
"""

import re

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric

_HOST = re.compile(r"^VM_hostname\s+(\S+)\s*$")
_GUID = re.compile(r"^(?:0x)?([0-9a-fA-F]{16})$")


def is_host_guids(text: str) -> bool:
    """Tell whether the first line that is not empty names a host."""
    return _HOST.match(text.lstrip().partition("\n")[0]) is not None


def read_host_guids(text: str, what: str) -> ClusterBuilder:
    """Return the hosts with a NIC for each GUID.

    Raises:
        InputError: a line that is neither, or a GUID that appears twice.
    """
    fabric = Fabric(what)
    host, nics, seen = "", 0, set[str]()
    for number, line in enumerate(text.splitlines(), 1):
        named, guid = _HOST.match(line.strip()), _GUID.match(line.strip())
        if named:
            host, nics = named[1], 0
            fabric.host(host)
        elif guid and guid[1].lower() not in seen:
            seen.add(guid[1].lower())
            fabric.nic(host, f"nic{nics}", None, guid[1].lower())
            nics += 1
        elif line.strip():
            raise InputError(f"{what}: line {number}: {line[:60]!r} is no host and no new GUID")
    fabric.builder.warnings.append("the list names ports and no switch: merge it with a fabric")
    return fabric.finish()
