"""Slurm's topology plug-ins, whichever of the two files describes them: tree, block, ring, torus.

Slurm knows hosts, no NICs: a host is cabled as a whole, and rails are lost. Blocks are taken as
NVLink domains, which is what the block plug-in is for.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder
from epplan.topologies.hostlist import HostLists

from .fabric import Fabric

MAX_RING = 16  # nodes, Slurm's limit
_MAX_NAME = 64  # characters of a switch name, likewise


@dataclass(frozen=True, slots=True)
class Switch:
    """A switch with what is below it, as host lists."""

    name: str
    switches: str | None
    nodes: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """A block and its nodes."""

    name: str
    nodes: str


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring and its nodes in order."""

    name: str
    nodes: str


@dataclass(frozen=True, slots=True)
class Torus:
    """A torus: nodes fill x first, then y, then z."""

    name: str
    dims: tuple[int, int, int]
    nodes: str


def read_tree(switches: Sequence[Switch], what: str) -> ClusterBuilder:
    """Return hosts below a forest of switches.

    Raises:
        InputError: switches defined twice, not at all, or empty.
    """
    fabric = Fabric(what)
    problems = _twice("switch", (switch.name for switch in switches))
    names = {switch.name for switch in switches}
    lists = HostLists(what)
    below = [(lists.expand(switch.switches), lists.expand(switch.nodes)) for switch in switches]
    for switch, (children, _) in zip(switches, below, strict=True):
        if len(switch.name) > _MAX_NAME:
            problems.append(f"switch {switch.name[:20]}... has a name over {_MAX_NAME} characters")
        missing = [child for child in children if child not in names]
        if missing:
            problems.append(f"switch {switch.name} has child {missing[0]}, which is not defined")
        elif switch.name in children:
            problems.append(f"switch {switch.name} is its own child")
        if not children and not switch.nodes:
            problems.append(f"switch {switch.name} has neither nodes nor switches below it")
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    for switch in switches:
        fabric.switch(switch.name)
    for switch, (children, nodes) in zip(switches, below, strict=True):
        for lower in [*map(fabric.switch, children), *map(fabric.host, nodes)]:
            if not fabric.builder.graph.has_edge(switch.name, lower):
                fabric.cable(switch.name, lower)
    _say_which_repeat(fabric, [node for _, nodes in below for node in nodes])
    return fabric.finish()


def _say_which_repeat(fabric: Fabric, nodes: Sequence[str]) -> None:
    several = [node for node, count in Counter(nodes).items() if count > 1]
    if several:
        fabric.builder.warnings.append(
            f"{len(several)} nodes are below several switches, first {several[0]}"
        )


def read_blocks(blocks: Sequence[Block], sizes: Sequence[int], what: str) -> ClusterBuilder:
    """Return hosts in NVLink domains.

    Args:
        blocks: the base blocks.
        sizes: planning sizes, the base block's first.
        what: names the source.

    Raises:
        InputError: sizes that do not follow from each other, blocks or nodes that appear twice.
    """
    lists = HostLists(what)
    members = {block.name: lists.expand(block.nodes) for block in blocks}
    problems = _twice("block", (block.name for block in blocks))
    problems += _twice("node", (node for nodes in members.values() for node in nodes))
    problems += _size_problems(sizes)
    problems += [
        f"block {name} has {len(nodes)} nodes, fewer than the base block size {sizes[0]}"
        for name, nodes in members.items()
        if sizes and len(nodes) < sizes[0]
    ]
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    fabric = Fabric(what)
    for name, nodes in members.items():
        fabric.domain(name, nodes)
    fabric.builder.assumed.append("each block is taken as one NVLink domain")
    if len(members) > 1:
        fabric.builder.warnings.append("the file does not tell which switches join the blocks")
    return fabric.finish()


def _size_problems(sizes: Sequence[int]) -> list[str]:
    base = sizes[0] if sizes else 1
    if not base:
        return ["the base block size is 0"]
    return [
        f"block size {size} is no power of two times the base block size {base}"
        for size in sizes
        if size % base or (size // base).bit_count() != 1
    ]


def read_rings(rings: Sequence[Ring], what: str) -> ClusterBuilder:
    """Return hosts cabled to their neighbours in rings.

    Raises:
        InputError: a ring of more than 16 nodes, or a name that appears twice.
    """
    lists = HostLists(what)
    members = {ring.name: lists.expand(ring.nodes) for ring in rings}
    problems = _twice("ring", (ring.name for ring in rings))
    problems += _twice("node", (node for nodes in members.values() for node in nodes))
    problems += [
        f"ring {name} has {len(nodes)} nodes; {MAX_RING} are the most"
        for name, nodes in members.items()
        if len(nodes) > MAX_RING
    ]
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    fabric = Fabric(what)
    for nodes in members.values():
        ids = [fabric.host(node) for node in nodes]
        _close(fabric, ids)
    return fabric.finish()


def read_toruses(toruses: Sequence[Torus], what: str) -> ClusterBuilder:
    """Return hosts cabled to their neighbours in three dimensions.

    Raises:
        InputError: cells without a node, nodes without a cell, or a name that appears twice.
    """
    lists = HostLists(what)
    members = {torus.name: lists.expand(torus.nodes) for torus in toruses}
    problems = _twice("torus", (torus.name for torus in toruses))
    problems += _twice("node", (node for nodes in members.values() for node in nodes))
    for torus in toruses:
        x, y, z = torus.dims
        if x * y * z != len(members[torus.name]):
            problems.append(
                f"torus {torus.name} has {x} x {y} x {z} = {x * y * z} cells and "
                f"{len(members[torus.name])} nodes"
            )
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    fabric = Fabric(what)
    for torus in toruses:
        _cable_torus(fabric, torus.dims, [fabric.host(node) for node in members[torus.name]])
    fabric.builder.assumed.append("the nodes of a torus fill x first, then y, then z")
    return fabric.finish()


def _cable_torus(fabric: Fabric, dims: tuple[int, int, int], ids: list[str]) -> None:
    x_size, y_size, z_size = dims

    def cell(x: int, y: int, z: int) -> str:
        return ids[x + x_size * (y + y_size * z)]

    for y, z in product(range(y_size), range(z_size)):
        _close(fabric, [cell(x, y, z) for x in range(x_size)])
    for x, z in product(range(x_size), range(z_size)):
        _close(fabric, [cell(x, y, z) for y in range(y_size)])
    for x, y in product(range(x_size), range(y_size)):
        _close(fabric, [cell(x, y, z) for z in range(z_size)])


def _close(fabric: Fabric, ids: list[str]) -> None:
    """Cable each to the next and the last to the first; two have one cable, one has none."""
    for one, other in zip(ids, ids[1:] + ids[:1], strict=True):
        if one != other and not fabric.builder.graph.has_edge(one, other):
            fabric.cable(one, other)


def _twice(kind: str, names: Iterable[str]) -> list[str]:
    return [
        f"{kind} {name} is defined {count} times"
        for name, count in Counter(names).items()
        if count > 1
    ]
