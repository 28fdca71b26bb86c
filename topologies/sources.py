"""A SOURCE on the command line to a cluster: a bundled name, a synthetic one, or a file.

Files are known by their content, never by their name.
"""

import hashlib
import stat
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from epplan.errors import InputError

from .cluster_file import is_cluster_file, read_cluster_file
from .graph import Cluster, ClusterBuilder
from .live.discover import discover_text
from .live.host_file import is_host_file
from .live.host_graph import read_host_file
from .readers.cloud import is_cloud, read_cloud
from .readers.documents import Element, parse_document, parse_xml
from .readers.fabric_ids import is_fabric_ids, read_fabric_ids
from .readers.host_guids import is_host_guids, read_host_guids
from .readers.hwloc_xml import is_hwloc_xml, read_hwloc_xml
from .readers.iblinkinfo import is_iblinkinfo, read_iblinkinfo
from .readers.ibnetdiscover import is_ibnetdiscover, read_ibnetdiscover
from .readers.ibnetdiscover_ports import is_ibnetdiscover_ports, read_ibnetdiscover_ports
from .readers.k8s_nodes import is_k8s_nodes, read_k8s_nodes
from .readers.nccl_xml import is_nccl_xml, read_nccl_xml
from .readers.netq import is_netq, read_netq
from .readers.slurm_conf import is_slurm_conf, read_slurm_conf
from .readers.slurm_yaml import is_slurm_yaml, read_slurm_yaml
from .readers.smi_topo import is_smi_topo, read_smi_topo
from .readers.topograph import is_topograph, read_topograph
from .synthetic import is_synthetic, read_synthetic

LOCAL = "local"  # this machine, asked now
MAX_BYTES = 64 * 2**20  # the largest fabrics' dumps have some MiB
KNOWN_FORMATS = (
    "a cluster file (YAML), a host file of `epplan topo discover`, NCCL or hwloc XML, "
    "nvidia-smi topo -m, ibnetdiscover, iblinkinfo, an "
    "ibsim net, Slurm's topology.conf or topology.yaml, a topograph model, an EC2, GCP or OCI "
    "instance topology, a NetQ graph, Kubernetes nodes"
)

_TEXTS: tuple[tuple[Callable[[str], bool], Callable[[str, str], ClusterBuilder]], ...] = (
    (is_ibnetdiscover, read_ibnetdiscover),
    (is_ibnetdiscover_ports, read_ibnetdiscover_ports),
    (is_iblinkinfo, read_iblinkinfo),
    (is_host_guids, read_host_guids),
    (is_slurm_conf, read_slurm_conf),
)
_DOCUMENTS: tuple[tuple[Callable[[Any], bool], Callable[[Any, str], ClusterBuilder]], ...] = (
    (is_cluster_file, read_cluster_file),
    (is_k8s_nodes, read_k8s_nodes),
    (is_slurm_yaml, read_slurm_yaml),
    (is_netq, read_netq),
    (is_topograph, read_topograph),
    (is_cloud, read_cloud),
    (is_fabric_ids, read_fabric_ids),
)


def bundled_clusters() -> list[str]:
    """Return the names of the clusters that come with epplan."""
    entries = resources.files("epplan.topologies.clusters").iterdir()
    return sorted(Path(entry.name).stem for entry in entries if entry.name.endswith(".yaml"))


def load_cluster(source: str, gpu_model: str | None = None) -> Cluster:
    """Return the cluster `source` names.

    Args:
        source: a bundled name, a synthetic cluster such as `2x8:h100,nic=8x400Gb/s`, or a path.
        gpu_model: hardware profile of GPUs whose model the source does not tell.

    Raises:
        InputError: unknown source, unknown format or an invalid file.
    """
    if source in bundled_clusters():
        entry = resources.files("epplan.topologies.clusters") / f"{source}.yaml"
        return parse_cluster(entry.read_bytes(), f"bundled cluster {source}", gpu_model)
    if source == LOCAL:
        return parse_cluster(discover_text().encode(), "this machine", gpu_model)
    if is_synthetic(source):
        return read_synthetic(source).build(hashlib.sha256(source.encode()).hexdigest())
    path = Path(source)
    if not _exists(path):
        raise InputError(
            f"unknown topology: {source}",
            hints=[
                f"bundled clusters: {', '.join(bundled_clusters())}",
                "or describe one in a line: 2x8:h100,nic=8x400Gb/s",
                f"or give the path of {KNOWN_FORMATS}",
            ],
        )
    return parse_cluster(_read(path), f"topology {path}", gpu_model)


def parse_cluster(data: bytes, what: str, gpu_model: str | None = None) -> Cluster:
    """Return the cluster in the bytes of a file, whatever its format.

    Raises:
        InputError: no text, of no known format, or invalid.
    """
    text = _text(data, what)
    return _read_text(text, what, gpu_model).build(hashlib.sha256(data).hexdigest())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for any file
        return False


def _read(path: Path) -> bytes:
    """Return a file's bytes; pipes are read too, and nothing beyond the limit."""
    try:
        status = path.stat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        if size <= MAX_BYTES:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            size = len(data)
    except OSError as error:
        raise InputError(f"topology {path} cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise InputError(f"topology {path} is larger than {MAX_BYTES >> 20} MiB: no topology is")
    return data


def _text(data: bytes, what: str) -> str:
    if b"\0" in data:
        raise InputError(
            f"{what} is not text: byte {data.index(0)} is NUL",
            hints=["UTF-16 from a Windows shell? Save it as UTF-8"],
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not text: byte {error.start} is not UTF-8") from None


def _read_text(text: str, what: str, gpu_model: str | None) -> ClusterBuilder:
    if text.lstrip().startswith("<"):
        return _read_xml(parse_xml(text, what), what, gpu_model)
    if is_smi_topo(text):
        return read_smi_topo(text, what, gpu_model)
    for matches, read in _TEXTS:
        if matches(text):
            return read(text, what)
    document = parse_document(text, what)
    if is_host_file(document):
        return read_host_file(document, what, gpu_model)
    for is_it, read_it in _DOCUMENTS:
        if is_it(document):
            return read_it(document, what)
    raise InputError(f"{what} is of no known format", hints=[f"known: {KNOWN_FORMATS}"])


def _read_xml(root: Element, what: str, gpu_model: str | None) -> ClusterBuilder:
    if is_nccl_xml(root):
        return read_nccl_xml(root, what, gpu_model)
    if is_hwloc_xml(root):
        return read_hwloc_xml(root, what, gpu_model)
    if root.tag == "graphs":
        raise InputError(
            f"{what} is a NCCL graph (NCCL_GRAPH_DUMP_FILE): it has channels, no topology",
            hints=["give what NCCL_TOPO_DUMP_FILE writes"],
        )
    raise InputError(
        f"{what} is XML, but no NCCL topology (<system>) and no hwloc topology (<topology>)"
    )
