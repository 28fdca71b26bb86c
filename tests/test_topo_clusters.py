"""Cluster files: templates, bundled clusters, and all problems of a bad file at once."""

import re
from pathlib import Path

import pytest

from epplan.errors import InputError
from epplan.topologies.graph import NetworkSwitch, Nic, PcieSwitch
from epplan.topologies.hostlist import expand, expand_list, fold
from epplan.topologies.show import summary
from epplan.topologies.sources import bundled_clusters, load_cluster


@pytest.mark.parametrize(
    ("name", "hosts", "gpus", "nics", "nvlinks", "switches"),
    [
        ("dgx-h100-2", 2, 16, 16, 288, 1),
        ("hgx-h100-4nic-4", 4, 32, 16, 576, 5),
        ("hgx-h200-2", 2, 16, 16, 288, 1),
        ("dgx-a100-2", 2, 16, 16, 192, 1),
        ("mixed-h100-h200", 2, 16, 16, 288, 1),
        ("oversubscribed-leaf-4", 4, 32, 32, 576, 3),
        ("cpu-16", 1, 16, 0, 0, 0),
    ],
)
def test_bundled_clusters(
    name: str, hosts: int, gpus: int, nics: int, nvlinks: int, switches: int
) -> None:
    counts = summary(load_cluster(name))["counts"]
    assert (counts["hosts"], counts["gpus"], counts["nics"]) == (hosts, gpus, nics)
    assert (counts["nvlinks"], counts["switches"]) == (nvlinks, switches)


def test_every_bundled_cluster_is_tested() -> None:
    source = Path(__file__).read_text()
    assert [name for name in bundled_clusters() if f'("{name}"' not in source] == []


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a1", "a2", "a3", "b7"], "a[1-3],b7"),
        (["n08", "n09", "n10"], "n[08-10]"),
        (["n9", "n10", "n11"], "n9,n[10-11]"),  # a folded range keeps the width of its first
        (["login", "10.0.0.1", "10.0.0.2"], "login,10.0.0.[1-2]"),
        (["x2", "x1", "2", "3"], "x2,x1,[2-3]"),
        ([], ""),
    ],
)
def test_host_names_fold_and_unfold(names: list[str], folded: str) -> None:
    assert fold(names) == folded
    assert expand_list(folded) == names


def test_host_ranges() -> None:
    assert expand("dgx[01-03]") == ["dgx01", "dgx02", "dgx03"]
    assert expand("r[1-2]n[8,10-11]x") == ["r1n8x", "r1n10x", "r1n11x", "r2n8x", "r2n10x", "r2n11x"]
    assert expand("alone") == ["alone"]
    with pytest.raises(InputError, match=re.escape("host range a[3-1] is not valid: 3-1 is no")):
        expand("a[3-1]")


def test_rails_and_shared_nics() -> None:
    cluster = load_cluster("hgx-h100-4nic-4")
    assert cluster.graph.has_edge("hgx02/nic3", "rail4")
    assert cluster.graph.has_edge("hgx01/gpu6", "hgx01/pcie3")
    assert cluster.graph.has_edge("hgx01/gpu7", "hgx01/pcie3")
    assert len(cluster.nodes(PcieSwitch)) == len(cluster.nodes(Nic)) == 16
    assert len(cluster.nodes(NetworkSwitch)) == 5


def test_capacity_is_rated_times_efficiency() -> None:
    cluster = load_cluster("dgx-h100-2")
    port = cluster.link("dgx01/gpu0", "dgx01/nvswitch")
    assert (port.count, port.rated_bytes_per_s) == (18, 450e9)
    assert port.capacity_bytes_per_s == pytest.approx(324e9)  # two H200 reached 323
    assert cluster.link("dgx01/nic0", "leaf1").capacity_bytes_per_s == pytest.approx(44e9)


BAD = """
schema_version: 1
name: bad
host_types:
  a: {gpu: h101, gpus: 8}
  b: {gpu: h100-sxm, gpus: 8, nic: cx7, nics: 8, links: 19}
hosts:
  - {names: "n[1-2]", type: a, leafs: [leaf9]}
  - {names: n2, type: c}
switches:
  - {names: leaf1, uplinks: [{to: spine1, rate: 400Gb/s}]}
nvlink_domains:
  - {name: rack, hosts: n7}
"""


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    with pytest.raises(InputError) as caught:
        load_cluster(str(file))
    problems = "\n".join(caught.value.problems)
    assert caught.value.exit_code == 2
    for part in (
        "host n2 is defined 2 times",
        "host_types.a.gpu: unknown model h101",
        "host_types.b.links: 19, but h100-sxm has 18",
        "host_types.b.nic: unknown model cx7",
        "hosts n[1-2]: leaf leaf9 is not among the switches",
        "hosts n2: unknown type c; host_types has a, b",
        "switches leaf1: uplink to spine1, which is not defined",
        "nvlink_domains rack: host n7 is not defined",
    ):
        assert part in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts: [", "is not valid YAML at line 1"),
        ("a: 1", "is of no known format"),
        ("host_types: {}\nhosts: []\nschema_version: 2\nname: x\n", "is not valid"),
        ("<a><b/></a>", "is XML, but no NCCL topology"),
        ("<system version='1'><cpu", "is not well-formed XML: line 1, column"),
        ("", "is of no known format"),
    ],
)
def test_bad_files_give_one_message(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_cluster(str(file))


def test_unknown_source_lists_the_bundled_ones() -> None:
    with pytest.raises(InputError, match="unknown topology: nowhere") as caught:
        load_cluster("nowhere")
    assert "dgx-h100-2" in str(caught.value)
