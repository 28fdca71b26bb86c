"""Slurm's topology.conf: one record a line, keys in any case, host ranges allowed.

    SwitchName=spine Switches=leaf[1-2]         # topology/tree
    SwitchName=leaf1 Nodes=node[01-16]
    BlockName=rack1 Nodes=node[01-18]           # topology/block
    BlockSizes=18,36
    RingName=ring0 Nodes=node[01-08]            # topology/ring

Several roots are legal: nothing joins them.
"""

import re
from collections.abc import Iterator

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder

from .slurm_plugins import Block, Ring, Switch, read_blocks, read_rings, read_tree

_KEY = re.compile(r"^\s*(SwitchName|BlockName|BlockSizes|RingName)\s*=", re.IGNORECASE)
_PAIR = re.compile(r"([A-Za-z]+)\s*=\s*(\S*)")
_KEYS = {
    "switchname": {"switches", "nodes", "linkspeed"},
    "blockname": {"nodes"},
    "ringname": {"nodes"},
    "blocksizes": set[str](),
}

Record = dict[str, str]


def is_slurm_conf(text: str) -> bool:
    """Tell whether a text has a line that begins with a key of topology.conf."""
    return any(map(_KEY.match, text.splitlines()))


def read_slurm_conf(text: str, what: str) -> ClusterBuilder:
    """Return the hosts and switches or blocks of a topology.conf.

    Raises:
        InputError: all unknown keys and contradictions at once, or no record but BlockSizes.
    """
    problems: list[str] = []
    records = list(_records(text, problems))
    kinds = {kind for kind, _ in records if kind != "blocksizes"}
    if len(kinds) > 1:
        problems.append(f"{' and '.join(sorted(kinds))} belong to different plug-ins")
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    rows = [record for _, record in records]
    sizes = [row["blocksizes"] for row in rows if "blocksizes" in row]
    if kinds == {"switchname"} and not sizes:
        return read_tree(
            [Switch(row["switchname"], row.get("switches"), row.get("nodes")) for row in rows], what
        )
    if kinds == {"ringname"} and not sizes:
        return read_rings([Ring(row["ringname"], row["nodes"]) for row in rows], what)
    if kinds != {"blockname"}:
        raise InputError(
            f"{what} has BlockSizes={sizes[0]} and no block"
            + (" line that is not commented out" if re.search(r"#\s*BlockName", text) else "")
        )
    blocks = [Block(row["blockname"], row["nodes"]) for row in rows if "blockname" in row]
    return read_blocks(blocks, _sizes(",".join(sizes), what), what)


def _records(text: str, problems: list[str]) -> Iterator[tuple[str, Record]]:
    """Yield each record with its first key; a backslash continues a line."""
    joined = re.sub(r"\\\r?\n", "", text)
    for number, line in enumerate(joined.splitlines(), 1):
        plain = line.partition("#")[0].strip()
        if not plain:
            continue
        pairs = [(key.lower(), value) for key, value in _PAIR.findall(plain)]
        kind = pairs[0][0] if pairs else ""
        if kind not in _KEYS or _PAIR.sub("", plain).strip():
            problems.append(f"line {number}: {plain[:60]} is no record of topology.conf")
            continue
        unknown = sorted({key for key, _ in pairs[1:]} - _KEYS[kind])
        if unknown:
            problems.append(f"line {number}: {unknown[0]} does not belong to {kind}")
        elif kind in ("blockname", "ringname") and "nodes" not in dict(pairs):
            problems.append(f"line {number}: {pairs[0][1]} has no Nodes")
        else:
            yield kind, dict(pairs)


def _sizes(text: str, what: str) -> list[int]:
    sizes = [part for part in text.split(",") if part]
    if not all(re.fullmatch("[0-9]{1,6}", part) for part in sizes):
        raise InputError(f"{what}: BlockSizes={text} is no list of numbers")
    return [int(part) for part in sizes]
