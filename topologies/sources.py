"""A SOURCE on the command line to a cluster: a bundled name, or a file known by its content."""

import hashlib
from importlib import resources
from pathlib import Path

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text

from .cluster_file import is_cluster_file, read_cluster_file
from .graph import Cluster, ClusterBuilder
from .readers.nccl_xml import is_nccl_xml, read_nccl_xml


def bundled_clusters() -> list[str]:
    """Return the names of the clusters that come with epplan."""
    entries = resources.files("epplan.topologies.clusters").iterdir()
    return sorted(Path(entry.name).stem for entry in entries if entry.name.endswith(".yaml"))


def load_cluster(source: str, gpu_model: str | None = None) -> Cluster:
    """Return the cluster `source` names.

    Args:
        source: a bundled name, or a path to a cluster file or a NCCL topology XML.
        gpu_model: hardware profile of GPUs whose model the source does not tell.

    Raises:
        InputError: unknown source, unknown format or an invalid file.
    """
    if source in bundled_clusters():
        entry = resources.files("epplan.topologies.clusters") / f"{source}.yaml"
        return _parse(entry.read_text(encoding="utf-8"), f"bundled cluster {source}", gpu_model)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"unknown topology: {source}",
            hints=[
                f"bundled clusters: {', '.join(bundled_clusters())}",
                "or give the path of a cluster file (YAML) or of a NCCL topology XML",
            ],
        )
    return _parse(read_text(path, "topology"), f"topology {path}", gpu_model)


def _parse(text: str, what: str, gpu_model: str | None) -> Cluster:
    if text.lstrip().startswith("<"):
        if not is_nccl_xml(text):
            raise InputError(f"{what} is XML, but no NCCL topology: it has no <system><cpu>")
        builder = read_nccl_xml(text, what, gpu_model)
    else:
        builder = _read_document(text, what)
    return builder.build(hashlib.sha256(text.encode()).hexdigest())


def _read_document(text: str, what: str) -> ClusterBuilder:
    document = parse_yaml(text, what)
    if not is_cluster_file(document):
        raise InputError(
            f"{what} is of no known format",
            hints=["known: epplan's cluster file (host_types and hosts) and NCCL topology XML"],
        )
    return read_cluster_file(document, what)
