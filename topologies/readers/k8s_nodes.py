"""Kubernetes nodes (`kubectl get nodes -o json` or yaml): the labels that place them in a network.

fabric.topograph.run/tier-0, tier-1, ...         topograph, 0 is nearest
network.topology.nvidia.com/leaf, spine, core    topograph before
topology.k8s.aws/network-node-layer-1, 2, 3      1 is the spine
cloud.google.com/gce-topology-block, -subblock
oci.oraclecloud.com/host.network_block_id, host.rack_id
accelerator.topograph.run/domain, network.topology.nvidia.com/accelerator,
nvidia.com/gpu.clique, topology.k8s.aws/ultraserver-id    the NVLink domain
"""

import re
from collections.abc import Mapping
from typing import Any

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder

from .fabric import Fabric

# root first
_LEVELS = (
    tuple(f"network.topology.nvidia.com/{level}" for level in ("core", "spine", "leaf")),
    tuple(f"topology.k8s.aws/network-node-layer-{level}" for level in (1, 2, 3, 4)),
    tuple(f"cloud.google.com/gce-topology-{level}" for level in ("block", "subblock")),
    tuple(f"oci.oraclecloud.com/host.{level}" for level in ("network_block_id", "rack_id")),
)
_TIER = re.compile(r"fabric\.topograph\.run/tier-([0-9]{1,2})")
_DOMAINS = (
    "accelerator.topograph.run/domain",
    "network.topology.nvidia.com/accelerator",
    "topology.k8s.aws/ultraserver-id",
    "nvidia.com/gpu.clique",
)

Labels = Mapping[str, str]


def is_k8s_nodes(document: Any) -> bool:
    """Tell whether a document is a Kubernetes node or a list with some."""
    return isinstance(document, dict) and any(
        isinstance(item, dict) and item.get("kind") == "Node" for item in _items(document)
    )


def read_k8s_nodes(document: Any, what: str) -> ClusterBuilder:
    """Return the nodes as hosts below the switches their labels name.

    Raises:
        InputError: a node without a name, or no node with such labels.
    """
    fabric = Fabric(what)
    unplaced: list[str] = []
    for item in _items(document):
        if not isinstance(item, dict) or item.get("kind") != "Node":
            continue
        name, labels = _name_and_labels(item, what)
        levels, domain = _levels(labels), _domain(labels)
        fabric.tree(levels, name)
        if domain:
            fabric.domain(domain, [name])
        if not levels and not domain:
            unplaced.append(name)
    if len(unplaced) == len(fabric.builder.graph):
        raise InputError(
            f"{what}: none of its {len(unplaced)} nodes has a label about its place in the network",
            hints=["topograph, or the cloud's node feature discovery, sets such labels"],
        )
    if unplaced:
        fabric.builder.warnings.append(
            f"{len(unplaced)} nodes have no label about their place, first {unplaced[0]}"
        )
    return fabric.finish()


def _items(document: dict[str, Any]) -> list[Any]:
    items = document.get("items")
    return items if isinstance(items, list) else [document]


def _name_and_labels(item: dict[str, Any], what: str) -> tuple[str, Labels]:
    metadata = item.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str):
        raise InputError(f"{what}: a Node has no metadata.name")
    labels = metadata.get("labels")
    pairs = labels.items() if isinstance(labels, dict) else ()
    return name, {str(key): str(value) for key, value in pairs if value not in ("", None)}


def _levels(labels: Labels) -> list[str]:
    """Return the switches above a node, root first, of the first scheme that it has."""
    tiers = {int(match[1]): labels[key] for key in labels if (match := _TIER.fullmatch(key))}
    if tiers:
        return [tiers[tier] for tier in sorted(tiers, reverse=True)]
    schemes = ([labels[key] for key in keys if key in labels] for keys in _LEVELS)
    return next(filter(None, schemes), [])


def _domain(labels: Labels) -> str | None:
    return next((f"nvlink-{labels[key]}" for key in _DOMAINS if key in labels), None)
