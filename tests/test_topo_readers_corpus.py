"""Every file of a corpus of real topology files, where there is one beside the project.

The counts are those its SOURCES.md states; files that are wrong are refused with the reason.
"""

import os
import re
from itertools import combinations
from pathlib import Path

import pytest

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, Nic, Plane
from epplan.topologies.host_paths import PATH_TYPES
from epplan.topologies.readers.smi_topo import read_matrix
from epplan.topologies.routes import find_routes
from epplan.topologies.show import summary, tables
from epplan.topologies.sources import load_cluster

CORPUS = Path(os.environ.get("EPPLAN_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))
FOLDERS = ("smi-topo", "ibnetdiscover", "slurm", "hwloc")
TYPE_OF = {"PIX": "PIX", "PXB": "PXB", "PHB": "PHB", "NODE": "PHB", "SYS": "SYS"}

REFUSED = {
    "smi-topo/stas-p2p-r-8gpu.txt": "this is a peer-to-peer matrix",
    "slurm/slurm-150-9-block_bad_options.yaml": "block size 12 is no power of two times",
    "slurm/slurm-150-9-block_blocks_not_list.yaml": "block.blocks: Input should be a valid list",
    "slurm/slurm-150-9-flat_bool_mutually_exclusive.yaml": "has block and flat; exactly one of",
    "slurm/slurm-150-9-root_not_list.yaml": "is of no known format",
    "slurm/slurm-150-9-torus3d_regions_not_list.yaml": "regions: Input should be a valid list",
    "slurm/slurm-150-9-tree_bad_options.yaml": "sw_root has child s3, which is not defined",
    "slurm/slurm-150-9-tree_not_dict.yaml": "tree: Input should be a valid dictionary",
    "slurm/slurm-150-9-tree_switches_not_list.yaml": "switches: Input should be a valid list",
    "slurm/cyclecloud-illegal-block.conf": "no block line that is not commented out",
}

# (hosts, switches, NVLink domains) where SOURCES.md counts only lines
STRUCTURE = {
    "slurm/slurm-133-1-case1.conf": (10000, 529, 0),
    "slurm/slurm-133-1-case6.conf": (40, 7, 0),
    "slurm/slurm-unit-backfill.conf": (32, 0, 8),
    "slurm/slurm-man-topology.yaml": (4, 3, 0),
    "slurm/cyclecloud-nodes-clusteruuid.txt": (72, 0, 4),
    "slurm/topograph-slinky-dra-block.conf": (96, 0, 12),
    "slurm/topograph-model-nvl72.yaml": (72, 7, 4),
    "slurm/topograph-model-medium.yaml": (8, 7, 4),
    "slurm/netq-topologyGraph.json": (8, 3, 0),
    "ibnetdiscover/superbench-ibstat.txt": (10, 0, 0),
    "ibnetdiscover/issue-iblinkinfo-edr-sample.txt": (3, 1, 0),
    "ibnetdiscover/ibexporter-p-test.out": (3, 4, 0),
    "ibnetdiscover/ibexporter-p-test3.out": (0, 1, 0),
}


def rows() -> dict[str, str]:
    """Return what SOURCES.md states, by file."""
    sources = CORPUS / "SOURCES.md"
    if not sources.is_file():
        return {}
    cells = [line.split(" | ") for line in sources.read_text().splitlines()]
    stated = {row[0][2:]: row[-1] for row in cells if len(row) > 5}
    return {name: text for name, text in stated.items() if name.startswith(FOLDERS)}


STATED = rows()
needs_corpus = pytest.mark.skipif(
    not STATED, reason="no corpus of real topology files beside the project"
)
READABLE = sorted(STATED.keys() - REFUSED)


def number(pattern: str, name: str) -> int:
    match = re.search(pattern, STATED[name])
    return int(match[1]) if match else 0


def load(name: str) -> Cluster:
    return load_cluster(str(CORPUS / name))


@needs_corpus
def test_every_file_is_read_or_refused() -> None:
    assert len(STATED) == 56  # the other 29 of 85 are NCCL XML, which has its own test
    assert REFUSED.keys() | STRUCTURE.keys() <= STATED.keys()


@needs_corpus
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_files_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match=re.escape(REFUSED[name])):
        load(name)


@pytest.mark.slow
@needs_corpus
@pytest.mark.parametrize("name", READABLE)
def test_what_is_read_can_be_shown_and_routed(name: str) -> None:
    cluster = load(name)
    tables(cluster)
    if len(cluster.gpus()) > 1:
        find_routes(cluster)  # every pair has a path


@needs_corpus
@pytest.mark.parametrize("name", [x for x in READABLE if x.startswith("smi-topo")])
def test_smi_topo_has_its_columns(name: str) -> None:
    counts = summary(load(name))["counts"]
    assert counts["gpus"] == number(r"header GPUs=(\d+)", name)
    assert counts["nics"] == number(r"header NICs=(\d+)", name)


@needs_corpus
@pytest.mark.parametrize("name", [x for x in READABLE if x.startswith("smi-topo")])
def test_routes_reproduce_the_matrix(name: str) -> None:
    cluster = load(name)
    matrix = read_matrix((CORPUS / name).read_text(), name)
    routes = find_routes(cluster)
    for (here, one), (there, other) in combinations(enumerate(matrix.gpus), 2):
        label = matrix.labels.get((one, other)) or matrix.labels.get((other, one))
        kind = PATH_TYPES[routes.path_type[here, there]]
        if label is not None and label.startswith("NV"):
            assert kind == "NVL"
        elif label is not None and kind != "NVB":  # two NVLinks are better than PCIe
            assert kind == TYPE_OF[label]
    assert not [x for x in cluster.warnings if "no PCIe tree gives all labels" in x]


@needs_corpus
@pytest.mark.parametrize("name", [x for x in READABLE if x.startswith("ibnetdiscover")])
def test_ibnetdiscover_has_its_records(name: str) -> None:
    cluster = load(name)
    counts = summary(cluster)["counts"]
    if name in STRUCTURE:
        assert (counts["hosts"], counts["switches"]) == STRUCTURE[name][:2]
        return
    assert counts["switches"] == number(r"Switch=(\d+)", name)
    left_out = [x for x in cluster.warnings if "SHARP" in x]
    engines = int(left_out[0].split()[0]) if left_out else 0
    adapters = {nic.id.split(":")[0] for nic in cluster.nodes(Nic)}  # ports of one are a:1, a:2
    assert len(adapters) + engines == number(r"Ca/Hca=(\d+)", name)


@needs_corpus
@pytest.mark.parametrize("name", [x for x in READABLE if x.startswith("slurm")])
def test_slurm_and_the_like_have_their_records(name: str) -> None:
    cluster = load(name)
    counts = summary(cluster)["counts"]
    if "SwitchName" in STATED[name]:
        assert counts["switches"] == number(r"SwitchName=(\d+)", name)
        assert len(cluster.nodes(Plane)) == number(r"BlockName=(\d+)", name)
    if name in STRUCTURE:
        domains = len(cluster.nodes(Plane))
        assert (counts["hosts"], counts["switches"], domains) == STRUCTURE[name]


@needs_corpus
@pytest.mark.parametrize("name", [x for x in READABLE if x.startswith("hwloc")])
def test_hwloc_has_its_gpus(name: str) -> None:
    counts = summary(load(name))["counts"]
    stated = [number(rf"{kind}=(\d+)", name) for kind in ("nvml", "cuda", "opencl0d")]
    without_driver = {"hwloc/mpibind-coral-ea-hwloc1.xml": 4, "hwloc/flux-chimera-multigpu.xml": 2}
    assert counts["gpus"] == without_driver.get(name, max(stated))


@needs_corpus
def test_dgx2_links_end_at_its_switches() -> None:
    cluster = load("hwloc/hwloc-nvidiaDGX2.xml")
    assert {gpu.links for gpu in cluster.gpus()} == {6}
    port = cluster.link(cluster.gpus()[0].id, cluster.nodes(Plane)[0].id)
    assert (port.rated_bytes_per_s, port.count, port.provenance) == (150e9, 6, "read")
