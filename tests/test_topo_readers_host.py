"""Sources that look inside a host: nvidia-smi topo -m in all its forms, and hwloc XML."""

import re
from pathlib import Path

import pytest

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, Nic, PcieSwitch, Plane
from epplan.topologies.host_paths import PATH_TYPES
from epplan.topologies.routes import find_routes
from epplan.topologies.show import summary
from epplan.topologies.sources import load_cluster, parse_cluster

DATA = Path(__file__).parent / "data"
SMI = (DATA / "smi-hgx.txt").read_text()
HWLOC = (DATA / "hwloc-2gpu.xml").read_text()


def read(text: str, gpu: str | None = None) -> Cluster:
    return parse_cluster(text.encode(), "test", gpu)


def matrix(cells: str) -> Cluster:
    """Return a matrix of GPUs from its cells, row by row."""
    rows = [line.split() for line in cells.strip().splitlines()]
    names = [f"GPU{number}" for number in range(len(rows[0]))]
    lines = [" ".join(["", *names, "  CPU Affinity  NUMA Affinity"])]
    lines += [f"{name}  {'  '.join(row)}  0-7  0" for name, row in zip(names, rows, strict=False)]
    return read("\n".join(lines))


def path_type(cluster: Cluster, one: int = 0, other: int = 1) -> str:
    return PATH_TYPES[find_routes(cluster).path_type[one, other]]


def test_smi_example() -> None:
    cluster = load_cluster(str(DATA / "smi-hgx.txt"), "h100-sxm")
    assert [gpu.links for gpu in cluster.gpus()] == [18] * 4
    assert [gpu.numa for gpu in cluster.gpus()] == [0, 0, 1, 1]
    assert [nic.name for nic in cluster.nodes(Nic)] == ["mlx5_0", "mlx5_3"]
    assert [nic.numa for nic in cluster.nodes(Nic)] == [0, 1]
    assert len(cluster.nodes(Plane)) == 1
    assert cluster.link("host0/gpu0", "host0/nvswitch").rated_bytes_per_s == 450e9
    # PIX through one switch, PXB through three, NODE through the NUMA node
    assert cluster.graph.has_edge("host0/gpu0", "host0/pix0")
    assert len(cluster.nodes(PcieSwitch)) == 4
    assert cluster.graph.has_edge("host0/gpu3", "host0/numa1")
    assert cluster.warnings == ()
    assert path_type(cluster) == "NVL"


def test_without_a_model_the_candidates_are_named() -> None:
    cluster = read(SMI)
    assert (
        "the matrix does not tell the GPUs' model (h100-sxm or h200-sxm or h20 or b200 or gb200 or "
        "b300); give it with --gpu MODEL to plan with this topology"
    ) in cluster.warnings
    assert cluster.link("host0/gpu0", "host0/nvswitch").rated_bytes_per_s == 450e9  # the slowest


@pytest.mark.parametrize(
    "text",
    [
        SMI.replace("\x1b[4m", "").replace("\x1b[0m", ""),
        SMI.replace("\t", "    "),
        "".join(f"    {line.lstrip()}\n" for line in SMI.splitlines()),
        SMI.replace("NIC0\t", "mlx5_0\t").replace("NIC1\t", "mlx5_3\t").split("Legend")[0],
        "76 NICs found in the topology, only displaying 2 in the matrix.\n" + SMI,
        SMI.replace("NIC0\tNIC1\t", "NIC0NIC1\t").replace("PIX\tSYS\t", "PIXSYS\t"),
        SMI.split("NIC0\tPIX")[0],
        SMI.replace("\n", "\r\n"),
        "\ufeff" + SMI,
    ],
    ids=["plain", "blanks", "indented", "devices", "notice", "glued", "cut", "crlf", "bom"],
)
def test_smi_variants_say_the_same(text: str) -> None:
    cluster, example = read(text, "h100-sxm"), read(SMI, "h100-sxm")
    assert summary(cluster)["counts"] == summary(example)["counts"]
    assert [gpu.numa for gpu in cluster.gpus()] == [0, 0, 1, 1]


def test_missing_rows_are_said() -> None:
    cluster = read("".join(SMI.splitlines(keepends=True)[:3]))
    assert [gpu.links for gpu in cluster.gpus()] == [18] * 4
    assert cluster.warnings[0] == (
        "2 of 4 GPU rows are missing; they are taken from the columns of the others"
    )


def test_a_mesh_owns_its_pairs() -> None:
    cluster = matrix("X NV1 NV2\nNV1 X NV1\nNV2 NV1 X")
    assert not cluster.nodes(Plane)
    assert [gpu.links for gpu in cluster.gpus()] == [3, 2, 3]
    assert cluster.link("host0/gpu0", "host0/gpu2").count == 2


def test_bridged_pairs_and_four_gpus_are_meshes() -> None:
    pairs = matrix("X NV12 SYS SYS\nNV12 X SYS SYS\nSYS SYS X NV12\nSYS SYS NV12 X")
    assert not pairs.nodes(Plane)
    assert (path_type(pairs, 0, 1), path_type(pairs, 0, 2)) == ("NVL", "SYS")
    four = matrix("X NV6 NV6 NV6\nNV6 X NV6 NV6\nNV6 NV6 X NV6\nNV6 NV6 NV6 X")
    assert not four.nodes(Plane)


def test_a_gpu_that_lost_its_links() -> None:
    cluster = matrix("X NV18 NV18 SYS\nNV18 X NV18 SYS\nNV18 NV18 X SYS\nSYS SYS SYS X")
    assert [gpu.links for gpu in cluster.gpus()] == [18, 18, 18, 0]
    assert "GPU3 has no NVLink, others have 18: it lost its links" in cluster.warnings
    assert path_type(cluster, 0, 3) == "SYS"
    some = matrix("X NV18 NV16\nNV18 X NV16\nNV16 NV16 X")
    assert "GPU2 has 16 NVLinks, others 18: it lost some" in some.warnings


def test_sys_inside_a_numa_node_is_followed_and_said() -> None:
    cluster = matrix("X SYS\nSYS X")
    assert path_type(cluster) == "SYS"
    assert "GPU0, GPU1 share NUMA or CPU affinity 0, and SYS labels" in cluster.warnings[-1]


def test_labels_no_tree_can_have() -> None:
    cluster = matrix("X PIX SYS\nPIX X PIX\nSYS PIX X")
    assert (
        "no PCIe tree gives all labels; 1 differ, first GPU0 to GPU2 is SYS, here PIX"
        in (cluster.warnings[-1])
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            " GPU0 GPU1\n GPU0 X OK\n GPU1 OK X\n",
            "test: line 2 has cells like OK and NS: this is a peer-to-peer matrix (nvidia-smi topo "
            "-p2p), which does not tell how GPUs are joined",
        ),
        (" GPU0 GPU1\n", "test has the header of nvidia-smi topo -m and no row of a GPU"),
        (
            " GPU0 GPU1\nGPU0 X NV1 NV2\n",
            "test: line 2: GPU0 has 3 cells, the header has 2 columns",
        ),
        (" GPU0 GPU0\nGPU0 X NV1\n", "test: column GPU0 appears twice in the header"),
    ],
)
def test_bad_matrices(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(text)


def test_hwloc_example() -> None:
    cluster = load_cluster(str(DATA / "hwloc-2gpu.xml"))
    first, second = cluster.gpus()
    assert [gpu.pci_bus_id for gpu in (first, second)] == ["0000:81:00.0", "0000:13:00.0"]
    assert (first.host, first.numa, second.numa, second.uuid) == ("node7", 1, 0, "GPU-1")
    assert first.profile is not None
    assert first.profile.name == "h100-sxm"
    (nic,) = cluster.nodes(Nic)
    assert (nic.name, nic.guid, nic.numa) == ("mlx5_0", "b8ce000000000002", 0)
    # two bridges are one switch, a root port is none
    assert [switch.id for switch in cluster.nodes(PcieSwitch)] == ["node7/0000:11:00.0"]
    assert cluster.graph.has_edge(second.id, "node7/0000:11:00.0")
    assert cluster.graph.has_edge(first.id, "node7/numa1")
    port = cluster.link(first.id, "node7/nvswitch")
    assert (port.count, port.rated_bytes_per_s, port.provenance) == (18, 450e9, "read")
    assert cluster.assumed == ("PCIe links without a speed are taken as 8 GT/s x16, as NCCL does",)


def test_hwloc_versions_say_the_same() -> None:
    example = summary(read(HWLOC))["counts"]
    third = HWLOC.replace('version="2.0"', 'version="3.0"').replace('type="1"', 'type="12"')
    assert summary(read(third))["counts"] == example
    # version 1: the NUMA node is around the rest of its package
    first = HWLOC.replace(' version="2.0"', "")
    for package in (0, 1):
        first = first.replace(
            f'<object type="Package" os_index="{package}">\n'
            f'      <object type="NUMANode" os_index="{package}"/>',
            f'<object type="NUMANode" os_index="{package}">',
        )
    cluster = read(first)
    assert summary(cluster)["counts"] == example
    assert [gpu.numa for gpu in cluster.gpus()] == [1, 0]


def test_hwloc_without_distances_takes_the_profile() -> None:
    text = re.sub("<distances2hetero.*</distances2hetero>", "", HWLOC, flags=re.DOTALL)
    cluster = read(text)
    assert [gpu.links for gpu in cluster.gpus()] == [0, 0]
    assert "node7: the file has no NVLinks; 18 links a GPU to NVSwitches assumed from" in (
        "\n".join(cluster.assumed)
    )
    unknown = read(text.replace("10de:2330", "10de:ffff"))
    assert "the PCI ids of GPUs [0, 1] are of no known model" in unknown.warnings[-1]
    assert path_type(unknown) == "SYS"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("450000 450000 1000000", "450000", "NVLinkBandwidth has 7 values for 3 objects"),
        ("450000 450000 1000000", "a b c", "NVLinkBandwidth has a value that is no number"),
        ('os_index="0"/>', 'os_index="x"/>', "<object> has os_index='x', which is no whole number"),
        ('speed="63.0"', 'speed="-1"', "pci_link_speed='-1' is no number of GB/s"),
    ],
)
def test_bad_hwloc(old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(HWLOC.replace(old, new))
