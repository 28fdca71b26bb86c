"""`epplan topo show`: hosts as trees, alike hosts once."""

import io
from pathlib import Path

from rich.console import Console

from epplan.topologies.graph import Cluster
from epplan.topologies.live.discover import read_host
from epplan.topologies.live.host_graph import hosts_graph
from epplan.topologies.live.sysfs import Sysfs
from epplan.topologies.show_tree import host_trees
from epplan.topologies.sources import load_cluster
from tests.nvml_replies import FakeSys, Replies
from tests.test_topo_live import epplan

GOLDEN = """\
a, b
+-- NUMA node 0
|   +-- PCIe switch 0000:11:00.0, 63.0 GB/s
|   |   +-- gpu0 h100-sxm, 79.65 GiB, 18 NVLinks, 0000:13:00.0
|   |   `-- mlx5_0 400 Gb/s, 0000:14:00.0
|   `-- eth0 25 Gb/s, 0000:05:00.0
+-- NUMA node 1
|   `-- gpu1 h100-sxm, 79.65 GiB, 18 NVLinks, 0000:23:00.0
`-- nvswitch, joins 2 GPUs
"""


def drawn(cluster: Cluster) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # rich then draws in ASCII
    for tree in host_trees(cluster):
        Console(file=file, width=100).print(tree)
    file.seek(0)
    return "\n".join(line.rstrip() for line in file.read().splitlines()) + "\n"


def test_host_numa_switch_device(tmp_path: Path) -> None:
    sys = FakeSys(tmp_path)
    top = ("0000:10:01.0", "0000:11:00.0")
    sys.pci(*top, "0000:12:00.0", "0000:13:00.0", device="0x2330")
    sys.pci(*top, "0000:12:01.0", "0000:14:00.0", device="0x1021", vendor="0x15b3", kind="0x020700")
    sys.pci("0000:20:01.0", "0000:23:00.0", device="0x2330", numa=1)
    sys.pci("0000:05:00.0", device="0x1", vendor="0x8086", kind="0x020000")
    sys.rdma("mlx5_0", "0000:14:00.0", "b8ce:0000:0000:0001")
    sys.interface("eth0", "0000:05:00.0", "25000")
    records = [read_host(x, Replies("hidden-remote"), Sysfs(tmp_path, "x86_64")) for x in "ab"]
    assert drawn(hosts_graph("c", *records).build("")) == GOLDEN


def test_hosts_that_differ_are_drawn_apart() -> None:
    text = drawn(load_cluster("mixed-h100-h200"))
    assert text.startswith("h100-1\n")
    assert "\nh200-1\n" in text


def test_command(tmp_path: Path) -> None:
    text = epplan("show", "hgx-h100-4nic-4", cwd=tmp_path).stdout
    assert text.count("hgx01, hgx02, hgx03, hgx04") == 2  # the tree and the matrix
    assert "PCIe switch pcie0, 63.0 GB/s" in text
    local = epplan("show", "local", cwd=tmp_path)
    assert (local.returncode, local.stderr) == (0, "")
