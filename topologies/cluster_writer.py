"""A cluster graph as a cluster file with explicit hosts: read back, it is the same graph."""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from epplan.errors import InputError
from epplan.files import parse_yaml
from epplan.quoting import comment

from .cluster_file import is_cluster_file
from .graph import Cluster, Gpu, Host, Link, NetworkSwitch, Nic, Node, Numa, PcieSwitch, Plane
from .measured import MeasuredRecord
from .units import parse_bandwidth, parse_memory

_LINE = 90  # longer lists get a line an entry
_NETWORK_KINDS = ("net", "nic")


def cluster_text(cluster: Cluster, head: str, measured: Sequence[dict[str, Any]] = ()) -> str:
    """Return the text of a cluster file.

    Args:
        cluster: what to write.
        head: one line for its head: which command made it.
        measured: rows of the file's `measured`, which replace efficiencies of the links.

    Raises:
        InputError: a host of which nothing but its name is known.
    """
    bare = [node.host for node in cluster.nodes(Host)]
    if bare:
        raise InputError(
            f"{cluster.name} does not look inside its hosts ({', '.join(bare[:3])} ...): there is "
            "nothing to write down about them"
        )
    document: dict[str, Any] = {
        "schema_version": 1,
        "name": cluster.name,
        "explicit_hosts": [_host(cluster, *item) for item in cluster.by_host().items()],
        "switches": [{"names": switch.id} for switch in cluster.nodes(NetworkSwitch)],
        "planes": [plane.id for plane in cluster.nodes(Plane) if not plane.host],
        "links": [
            _link(tail, head, link, one_way)
            for tail, head, link, one_way in _links(cluster)
            if _host_of(cluster, tail, head) is None
        ],
        "measured": list(measured),
        "assumed": list(cluster.assumed),
        "warnings": list(cluster.warnings),
    }
    document = {key: value for key, value in document.items() if value != []}
    return f"# {comment(head)}\n{_dump(document)}"


def _dump(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def measured_text(
    source: str, cluster: Cluster, head: str, records: Iterable[MeasuredRecord]
) -> str:
    """Return a source as a cluster file with new `measured` rows.

    A cluster file keeps its templates and, unless it has such rows already, its comments.

    Args:
        source: what `cluster` was loaded from.
        cluster: written part by part where `source` is no cluster file.
        head: one line for the head of a new file.
        records: the rows.
    """
    rows = _rows(records)
    bundled = resources.files("epplan.topologies.clusters") / f"{source}.yaml"
    text = bundled.read_text(encoding="utf-8") if bundled.is_file() else _text_of(Path(source))
    document = _document(text)
    if not is_cluster_file(document):
        return cluster_text(cluster, head, rows)
    if "measured" in document:
        return f"# {comment(head)}\n{_dump({**document, 'measured': rows})}"
    return f"{text.rstrip()}\n{_dump({'measured': rows})}"


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _document(text: str) -> Any:
    """Return the document in a text that may be of any format."""
    try:
        return parse_yaml(text, "source")
    except InputError:
        return None


def _rows(records: Iterable[MeasuredRecord]) -> list[dict[str, Any]]:
    return [
        {
            "path": record.path,
            **({} if record.rated is None else {"rated": bandwidth_text(record.rated, bits=True)}),
            "transfers": record.transfers,
            "bandwidth": bandwidth_text(record.bandwidth, bits=False),
            "latency": f"{record.latency * 1e6:.3f}us",
            "samples": record.samples,
            "backend": record.backend,
        }
        for record in records
    ]


class _Dumper(yaml.SafeDumper):
    """Writes the innermost mappings and short lists on one line."""


def _represent_mapping(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    flat = all(not isinstance(item, dict) and not _is_nested(item) for item in value.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=flat)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    is_short = len(str(value)) < _LINE
    flat = is_short and not any(isinstance(item, dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(list, _represent_list)


def _host(cluster: Cluster, name: str, nodes: list[Node]) -> dict[str, Any]:
    def own(node: str) -> str:
        return node.removeprefix(f"{name}/")

    def ids(kind: type[Node]) -> list[str]:
        return [own(node.id) for node in nodes if isinstance(node, kind)]

    record = {
        "name": name,
        "numa_nodes": [
            {"id": own(node.id), "index": node.index} for node in nodes if isinstance(node, Numa)
        ],
        "pcie_switches": ids(PcieSwitch),
        "planes": ids(Plane),
        "gpus": [_gpu(own(node.id), node) for node in nodes if isinstance(node, Gpu)],
        "nics": [_nic(own(node.id), node) for node in nodes if isinstance(node, Nic)],
        "links": [
            _link(own(tail), own(head), link, one_way)
            for tail, head, link, one_way in _links(cluster)
            if _host_of(cluster, tail, head) == name
        ],
    }
    return {key: value for key, value in record.items() if value != []}


def _gpu(name: str, gpu: Gpu) -> dict[str, Any]:
    return _given(
        id=name,
        index=gpu.index,
        model=gpu.profile.name if gpu.profile else None,
        memory=memory_text(gpu.memory_bytes),
        links=gpu.links,
        numa=gpu.numa,
        pci_bus_id=gpu.pci_bus_id,
        uuid=gpu.uuid,
        mig=gpu.mig,
        faults=None if gpu.faults is None else list(gpu.faults),
    )


def _nic(name: str, nic: Nic) -> dict[str, Any]:
    rate = nic.rated_bytes_per_s
    return _given(
        id=name,
        name=nic.name,
        rate=None if rate is None else bandwidth_text(rate, bits=True),
        numa=nic.numa,
        pci_bus_id=nic.pci_bus_id,
        guid=nic.guid,
    )


def _link(tail: str, head: str, link: Link, one_way: bool) -> dict[str, Any]:
    return _given(
        ends=[tail, head],
        kind=link.kind,
        count=link.count if link.count != 1 else None,
        rate=bandwidth_text(link.rated_bytes_per_s, bits=link.kind in _NETWORK_KINDS),
        efficiency=link.efficiency,
        provenance=link.provenance,
        one_way=one_way or None,
    )


def _links(cluster: Cluster) -> list[tuple[str, str, Link, bool]]:
    """Return every link once where both directions are equal, and whether it is one way."""
    found: dict[tuple[str, str], tuple[str, str, Link, bool]] = {}
    for tail, head, link in cluster.links():
        back = found.get((head, tail))
        if back is not None and back[2] == link:
            found[head, tail] = (head, tail, link, False)
        else:
            found[tail, head] = (tail, head, link, True)
    return list(found.values())


def _host_of(cluster: Cluster, tail: str, head: str) -> str | None:
    """Return the host a link lies in."""
    hosts = {cluster.node(tail).host, cluster.node(head).host}
    return hosts.pop() or None if len(hosts) == 1 else None


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def bandwidth_text(rate: float, *, bits: bool) -> str:
    """Return a bandwidth that reads back as exactly this one."""
    nice = f"{rate * 8 / 1e9:.12g}Gb/s" if bits else f"{rate / 1e9:.12g}GB/s"
    exact = "e" not in nice and parse_bandwidth(nice) == rate
    return nice if exact else f"{rate:.6f}".rstrip("0").rstrip(".") + "B/s"


def memory_text(count: int) -> str:
    """Return a memory size that reads back as exactly this one."""
    nice = f"{count // 2**20}MiB"
    return nice if parse_memory(nice) == count else f"{count}B"
