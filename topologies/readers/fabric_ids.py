"""Lists of `host: ClusterUUID`: which NVLink domain each host is in (`nvidia-smi -q`, by host).

node01: 5e797fc6-0f46-421a-8724-0e102c0f723c
node02: 5e797fc6-0f46-421a-8724-0e102c0f723c.1      with the clique behind a point
"""

import re
from typing import Any

from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(\.[0-9]{1,9})?")
_NONE = "00000000-0000-0000-0000-000000000000"  # no domain beyond the host


def is_fabric_ids(document: Any) -> bool:
    """Tell whether a document maps names to UUIDs and nothing else."""
    return (
        isinstance(document, dict)
        and bool(document)
        and all(isinstance(x, str) and _UUID.fullmatch(x) for x in document.values())
    )


def read_fabric_ids(document: Any, what: str) -> ClusterBuilder:
    """Return the hosts in their NVLink domains."""
    fabric = Fabric(what)
    for host, uuid in document.items():
        fabric.host(str(host))
        if not uuid.startswith(_NONE):
            fabric.domain(uuid.lower(), [str(host)])
    return fabric.finish()
