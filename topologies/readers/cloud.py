"""Instance topologies of clouds: where in the provider's network each instance is.

    EC2   describe-instance-topology: Instances[].NetworkNodes, root first; CapacityBlockId
    GCP   instances describe/list: resourceStatus.physicalHostTopology {cluster, block, subblock}
    OCI   bare metal hosts, or rdmaTopologyData of the metadata: island, network block, local block

The levels become switches, the last one the leaf. Providers do not tell links or NICs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric

# keys without case, dashes and underscores; a level may have several
_OCI_LEVELS = (
    ("computehpcislandid", "hpcislandid", "customerhpcislandid"),
    ("computenetworkblockid", "networkblockid", "customernetworkblock"),
    ("computelocalblockid", "localblockid", "customerlocalblock"),
)
_OCI_DOMAIN = ("computegpumemoryfabricid", "gpumemoryfabricid", "customergpumemoryfabric")
_NAMES = ("displayname", "name", "hostname", "instanceid", "id", "customerhostid", "ocid")
# of these the whole sub-block is one NVLink domain, and the capacity block an UltraServer's
_GCP_NVLINK = re.compile(r"\ba4x")
_EC2_NVLINK = re.compile(r"-gb[0-9]+\b|\bu-p6e")


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance: switch names root first, and its NVLink domain if it is in one."""

    name: str
    levels: tuple[str, ...]
    domain: str | None = None


def is_cloud(document: Any) -> bool:
    """Tell whether some record of a document has one provider's topology fields."""
    return any(_instance(record) is not None for record in _records(document))


def read_cloud(document: Any, what: str) -> ClusterBuilder:
    """Return the hosts of an instance topology below their network nodes.

    Raises:
        InputError: an instance without a name, or a level above itself.
    """
    fabric = Fabric(what)
    placed = 0
    for number, record in enumerate(_records(document), 1):
        instance = _instance(record)
        if instance is None:
            fabric.builder.warnings.append(f"record {number} has no topology; left out")
            continue
        if not instance.name:
            raise InputError(f"{what}: record {number} does not name its instance")
        fabric.tree(instance.levels, instance.name)
        placed += bool(instance.levels)
        if instance.domain:
            fabric.domain(instance.domain, [instance.name])
    if not placed:
        raise InputError(f"{what} places no instance: all its levels are empty")
    return fabric.finish()


def _records(document: Any) -> list[dict[str, Any]]:
    """Return the instances of a list, or of the one list a provider wraps them in."""
    for key in ("Instances", "instances", "items", "data"):
        if isinstance(document, dict) and key in document:
            return _records(document[key])
    records = document if isinstance(document, list) else [document]
    return [record for record in records if isinstance(record, dict)]


def _instance(record: Mapping[str, Any]) -> Instance | None:
    return _ec2(record) or _gcp(record) or _oci(record)


def _ec2(record: Mapping[str, Any]) -> Instance | None:
    nodes = record.get("NetworkNodes")
    if not isinstance(nodes, list):
        return None
    levels = tuple(node for node in nodes if isinstance(node, str) and node)
    nvlink = _EC2_NVLINK.search(_word(record.get("InstanceType")))
    domain = _word(record.get("CapacityBlockId")) if nvlink else ""
    return Instance(_word(record.get("InstanceId")), levels, domain or None)


def _gcp(record: Mapping[str, Any]) -> Instance | None:
    status = record.get("resourceStatus")
    place = status.get("physicalHostTopology") if isinstance(status, dict) else None
    if not isinstance(place, dict):
        return None
    levels = tuple(_word(place.get(level)) for level in ("cluster", "block", "subblock"))
    nvlink = _GCP_NVLINK.search(_word(record.get("machineType")))
    name = _word(record.get("name")) or _word(record.get("id"))
    return Instance(name, tuple(filter(None, levels)), f"{levels[2]}-nvlink" if nvlink else None)


def _oci(record: Mapping[str, Any]) -> Instance | None:
    flat = {_plain(key): value for key, value in record.items()}
    inner = flat.get("rdmatopologydata")
    if isinstance(inner, dict):
        flat = flat | {_plain(key): value for key, value in inner.items()}
    if not any(key in flat for keys in _OCI_LEVELS for key in keys):
        return None
    levels = tuple(filter(None, (_first(flat, keys) for keys in _OCI_LEVELS)))
    return Instance(_first(flat, _NAMES), levels, _first(flat, _OCI_DOMAIN) or None)


def _plain(key: object) -> str:
    return re.sub("[-_]", "", str(key)).lower()


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next(filter(None, (_word(record.get(key)) for key in keys)), "")


def _word(value: object) -> str:
    """Return a name; GCP's numeric ids are names too."""
    return str(value).strip() if isinstance(value, str | int) else ""
