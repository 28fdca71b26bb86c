"""Slurm's topology.yaml: a list of topologies, each with a name and exactly one plug-in.

    - topology: default
      cluster_default: true
      tree: {switches: [{switch: spine, children: "leaf[1-2]"}, {switch: leaf1, nodes: "n[1-8]"}]}
    - {topology: racks, block: {block_sizes: [18], blocks: [{block: rack1, nodes: "n[1-18]"}]}}
    - {topology: plain, flat: true}

The cluster default (else the first) is what is read; the others are checked and named.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import validate
from epplan.topologies.graph import ClusterBuilder

from .slurm_plugins import (
    Block,
    Ring,
    Switch,
    Torus,
    read_blocks,
    read_rings,
    read_toruses,
    read_tree,
)


def _several(value: object) -> object:
    return [value] if isinstance(value, dict) else value


Item = TypeVar("Item")
Several = Annotated[list[Item], BeforeValidator(_several)]  # Slurm takes one without a list too


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SwitchRecord(_Record):
    """A switch of a tree."""

    switch: str
    children: str | None = None
    nodes: str | None = None


class TreeRecord(_Record):
    """topology/tree."""

    switches: Several[SwitchRecord]


class BlockRecord(_Record):
    """One block."""

    block: str
    nodes: str


class BlocksRecord(_Record):
    """topology/block."""

    block_sizes: list[int] = []
    blocks: Several[BlockRecord]


class FlatRecord(_Record):
    """topology/flat with options."""

    alpha_step_rank: bool = False


class RingRecord(_Record):
    """One ring."""

    ring: str
    nodes: str


class RingsRecord(_Record):
    """topology/ring."""

    rings: Several[RingRecord]


class DimsRecord(_Record):
    """A box of cells."""

    x: int = Field(gt=0, le=4096)
    y: int = Field(gt=0, le=4096)
    z: int = Field(gt=0, le=4096)


class PlacementRecord(_Record):
    """A box that jobs may get."""

    dims: DimsRecord


class RegionRecord(_Record):
    """A part of a torus."""

    region: str | None = None
    name: str | None = None
    nodes: str


class TorusRecord(_Record):
    """One torus."""

    name: str
    dims: DimsRecord
    nodes: str | None = None
    regions: Several[RegionRecord] | None = None
    placements: Several[PlacementRecord] = []


class TorusesRecord(_Record):
    """topology/torus3d."""

    toruses: Several[TorusRecord]


class TopologyRecord(_Record):
    """One topology."""

    topology: str
    cluster_default: bool = False
    tree: TreeRecord | None = None
    block: BlocksRecord | None = None
    flat: bool | FlatRecord | None = None
    ring: RingsRecord | None = None
    torus3d: TorusesRecord | None = None


class TopologyFile(_Record):
    """The whole file."""

    topologies: list[TopologyRecord]


_PLUGINS = ("tree", "block", "flat", "ring", "torus3d")


def is_slurm_yaml(document: Any) -> bool:
    """Tell whether a document is a topology.yaml: its records have `topology` and a plug-in."""
    records = document if isinstance(document, list) else [document]
    return any(
        isinstance(record, dict) and "topology" in record and any(x in record for x in _PLUGINS)
        for record in records
    )


def read_slurm_yaml(document: Any, what: str) -> ClusterBuilder:
    """Return the default topology of a topology.yaml.

    Raises:
        InputError: wrong shape, no or two plug-ins in a topology, or what its plug-in refuses.
    """
    records = document if isinstance(document, list) else [document]
    file = validate(TopologyFile, {"topologies": records}, what)
    problems = list(filter(None, map(_plugin_problem, file.topologies)))
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    read = [_read(record, f"{what}, {record.topology}") for record in file.topologies]
    defaults = [i for i, record in enumerate(file.topologies) if record.cluster_default]
    chosen = defaults[0] if defaults else 0
    names = [record.topology for record in file.topologies]
    if len(names) > 1:
        others = ", ".join(name for i, name in enumerate(names) if i != chosen)
        why = "the cluster default" if defaults else "the first"
        read[chosen].assumed.append(f"topology {names[chosen]} is read, {why}; others: {others}")
    return read[chosen]


def _plugin_problem(record: TopologyRecord) -> str | None:
    given = [name for name in _PLUGINS if getattr(record, name) not in (None, False)]
    if len(given) == 1:
        return None
    return (
        f"topology {record.topology} has {' and '.join(given) or 'no plug-in'}; exactly one of "
        f"{', '.join(_PLUGINS)} is needed"
    )


def _read(record: TopologyRecord, what: str) -> ClusterBuilder:
    if record.tree is not None:
        switches = [Switch(x.switch, x.children, x.nodes) for x in record.tree.switches]
        return read_tree(switches, what)
    if record.block is not None:
        blocks = [Block(x.block, x.nodes) for x in record.block.blocks]
        return read_blocks(blocks, record.block.block_sizes, what)
    if record.ring is not None:
        return read_rings([Ring(x.ring, x.nodes) for x in record.ring.rings], what)
    if record.torus3d is not None:
        return read_toruses([_torus(x, what) for x in record.torus3d.toruses], what)
    builder = ClusterBuilder(what)
    builder.warnings.append("topology/flat names no host: all are equally near")
    return builder


def _torus(record: TorusRecord, what: str) -> Torus:
    regions = [region.nodes for region in record.regions or ()]
    if (record.nodes is None) == (not regions):
        raise InputError(f"{what}: torus {record.name} needs either nodes or regions")
    dims = (record.dims.x, record.dims.y, record.dims.z)
    return Torus(record.name, dims, record.nodes if record.nodes is not None else ",".join(regions))
