"""Discovered hosts on a fabric by port GUID, and the cluster file they become."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from epplan.errors import InputError
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.cluster_writer import bandwidth_text, cluster_text, memory_text
from epplan.topologies.graph import Cluster, Link, NetworkSwitch, Nic
from epplan.topologies.host_paths import PATH_TYPES, leaf_of
from epplan.topologies.live.discover import hosts_file, read_host
from epplan.topologies.live.host_file import write_hosts
from epplan.topologies.live.sysfs import Sysfs
from epplan.topologies.merge import merge
from epplan.topologies.routes import find_routes
from epplan.topologies.sources import bundled_clusters, load_cluster, parse_cluster
from epplan.topologies.units import parse_bandwidth
from tests.fabrics import guid, ibnetdiscover, rails
from tests.nvml_replies import FakeSys, Replies, hgx
from tests.test_topo_live import epplan

NODES = dict[str, object]
EDGES = dict[tuple[str, str], Link]


def parts(cluster: Cluster) -> tuple[NODES, EDGES]:
    nodes: NODES = {name: data["node"] for name, data in cluster.graph.nodes(data=True)}
    return nodes, {(tail, head): link for tail, head, link in cluster.links()}


def read_back(cluster: Cluster) -> Cluster:
    return read_cluster_file(yaml.safe_load(cluster_text(cluster, "test")), "c.yaml").build("")


def host_file(tmp_path: Path, number: int, replies: str = "hgx-h100") -> Path:
    """Write the host file of an HGX host and return its path."""
    root = tmp_path / f"root{number}"
    hgx(root, number)
    record = read_host(f"node{number:02d}", Replies(replies), Sysfs(root, "x86_64"))
    path = tmp_path / f"host{number}.json"
    write_hosts(path, hosts_file([record]))
    return path


def merged(tmp_path: Path, cables: dict[tuple[int, int], int], hosts: int = 2) -> Cluster:
    clusters = [load_cluster(str(host_file(tmp_path, number))) for number in range(hosts)]
    fabric = parse_cluster(ibnetdiscover(cables).encode(), "fabric")
    return merge("c", clusters, fabric)


def test_ports_join_their_leafs_and_rails_stay(tmp_path: Path) -> None:
    cluster = merged(tmp_path, rails(2))
    assert (cluster.warnings, cluster.assumed) == ((), ())
    for nic in cluster.nodes(Nic):
        assert leaf_of(cluster, nic.id) == f"leaf{nic.name[-1]}"  # NIC i on rail i
    cable = cluster.link("node01/mlx5_3", "leaf3")
    assert (cable.kind, cable.rated_bytes_per_s, cable.provenance) == ("net", 50e9, "read")
    assert cluster.graph.has_edge("leaf3", "spine0")
    routes = find_routes(cluster)
    assert PATH_TYPES[routes.path_type[0, 8]] == "NET"
    assert routes.nics[3] == ("node00/mlx5_3",)


def test_names_of_the_fabric_do_not_matter(tmp_path: Path) -> None:
    """The fabric calls the hosts n0 and n1; a third one has no host file."""
    cluster = merged(tmp_path, rails(3))
    assert list(cluster.by_host()) == ["node00", "node01"]
    assert cluster.warnings == ("fabric has 1 hosts without a host file, left out: n2",)


def test_ports_without_a_cable_are_named(tmp_path: Path) -> None:
    cables = rails(2)
    del cables[1, 4]
    cluster = merged(tmp_path, cables)
    assert leaf_of(cluster, "node01/mlx5_4") is None
    assert cluster.warnings == (
        f"port node01/mlx5_4 ({guid(1, 4)}) is not in fabric; left uncabled",
    )


def test_merged_file_reads_back_as_the_same_graph(tmp_path: Path) -> None:
    cluster = merged(tmp_path, rails(2))
    again = read_back(cluster)
    assert parts(again) == parts(cluster)
    assert [gpu.id for gpu in again.gpus()] == [gpu.id for gpu in cluster.gpus()]
    assert (again.name, again.assumed, again.warnings) == ("c", cluster.assumed, cluster.warnings)


@pytest.mark.parametrize("name", bundled_clusters())
def test_every_bundled_cluster_survives(name: str) -> None:
    cluster = load_cluster(name)
    assert parts(read_back(cluster)) == parts(cluster)


@pytest.mark.parametrize("replies", ["v100-mesh", "nvl72-tray", "denied", "unknown-vgpu"])
def test_odd_hosts_survive(tmp_path: Path, replies: str) -> None:
    hgx(tmp_path)
    record = read_host("odd", Replies(replies), Sysfs(tmp_path, "x86_64"))
    write_hosts(tmp_path / "host.json", hosts_file([record]))
    cluster = load_cluster(str(tmp_path / "host.json"))
    again = read_back(cluster)
    assert parts(again) == parts(cluster)
    assert (again.assumed, again.warnings) == (cluster.assumed, cluster.warnings)


def test_domain_over_hosts_is_one_plane(tmp_path: Path) -> None:
    clusters = []
    for number in range(2):
        sys = FakeSys(tmp_path / str(number))
        for domain in ("0008", "0009", "0018", "0019"):
            sys.pci(f"{domain}:00:00.0", f"{domain}:01:00.0", device="0x2941")
        record = read_host(f"tray{number}", Replies("nvl72-tray"), Sysfs(sys.root, "aarch64"))
        write_hosts(sys.root / "host.json", hosts_file([record]))
        clusters.append(load_cluster(str(sys.root / "host.json")))
    cluster = merge("rack", clusters, None)
    again = read_back(cluster)
    assert parts(again) == parts(cluster)
    assert PATH_TYPES[find_routes(again).path_type[0, 7]] == "NVL"


def test_wrong_fabrics_are_refused(tmp_path: Path) -> None:
    host = load_cluster(str(host_file(tmp_path, 0)))
    foreign = parse_cluster(ibnetdiscover({(7, 0): 0}).encode(), "fabric")
    with pytest.raises(InputError, match="none of the 8 port GUIDs of the hosts is among the 1 of"):
        merge("c", [host], foreign)
    with pytest.raises(InputError, match="names no port GUID, so that no rail can be told"):
        merge("c", [host], load_cluster("dgx-h100-2"))
    with pytest.raises(InputError, match="host node00 is in two of the files"):
        merge("c", [host, host], None)
    with pytest.raises(InputError, match="no host file has an InfiniBand port GUID"):
        merge("c", [load_cluster("dgx-h100-2")], foreign)
    with pytest.raises(InputError, match="none of the files describes a GPU"):
        merge("c", [foreign], None)


def test_a_command_line_stays_in_its_comment() -> None:
    cluster = load_cluster("dgx-h100-2")
    odd = "epplan topo merge a -o 'x\nname: other\u2028hosts: []\x85y'"
    text = cluster_text(cluster, odd)
    assert yaml.safe_load(text)["name"] == cluster.name
    assert [line for line in text.splitlines() if line.startswith("#")] == text.splitlines()[:1]


def test_command(tmp_path: Path) -> None:
    for number in range(2):
        host_file(tmp_path, number)
    (tmp_path / "ib.out").write_text(ibnetdiscover(rails(2)))
    done = epplan(
        *("merge", "host0.json", "host1.json", "--fabric", "ib.out", "-o", "cluster.yaml"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "wrote cluster.yaml: 2 hosts, 16 GPUs\n"
    text = (tmp_path / "cluster.yaml").read_text()
    assert text.startswith("# written by epplan")
    assert "{id: mlx5_0, name: mlx5_0, rate: 400Gb/s, numa: 0, pci_bus_id: '0000:14:00.0'," in text
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    assert cluster.name == "cluster"
    assert len(cluster.nodes(NetworkSwitch)) == 9
    done = epplan("check", "cluster.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = epplan("merge", "none.json", "-o", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown topology: none.json" in done.stderr


HOST: dict[str, Any] = {
    "name": "a",
    "numa_nodes": [{"id": "numa0", "index": 0}],
    "gpus": [{"id": "gpu0", "index": 0, "model": "h100-sxm", "memory": "80GiB"}],
    "links": [{"ends": ["gpu0", "numa0"], "kind": "pcie", "rate": "63GB/s", "efficiency": 0.76}],
}


def test_all_problems_of_a_file_at_once() -> None:
    gpu = {**HOST["gpus"][0], "model": "h300"}
    nic = {"id": "n", "name": "n", "guid": "b8ce000000000001"}
    loose = {"ends": ["gpu0", "nowhere"], "kind": "pcie", "rate": "63GB/s", "efficiency": 0.76}
    document = {
        "schema_version": 1,
        "name": "c",
        "explicit_hosts": [
            {**HOST, "gpus": [gpu, gpu], "nics": [nic], "links": [loose]},
            {**HOST, "nics": [nic]},
        ],
        "links": [{**loose, "ends": ["a/n", "leaf9"]}],
    }
    with pytest.raises(InputError, match=r"c.yaml is not valid") as caught:
        read_cluster_file(document, "c.yaml")
    text = str(caught.value)
    for problem in (
        "host a is defined 2 times",
        "explicit_hosts a: gpu0 is defined 2 times",
        "explicit_hosts a: GPU index 0 is given to 2 GPUs",
        "explicit_hosts a: gpu0: unknown model h300; known are a100",
        "explicit_hosts a: links ['gpu0', 'nowhere']: nowhere is not defined",
        "links ['a/n', 'leaf9']: leaf9 is not defined",
        "port GUID b8ce000000000001 is given to 2 NICs",
    ):
        assert problem in text
    with pytest.raises(InputError, match="no hosts: give hosts or explicit_hosts"):
        read_cluster_file({"schema_version": 1, "name": "c", "explicit_hosts": []}, "c.yaml")
    with pytest.raises(InputError, match=r"explicit_hosts.0.nics.0.guid: String should match"):
        read_cluster_file(
            {
                "schema_version": 1,
                "name": "c",
                "explicit_hosts": [{**HOST, "nics": [{**nic, "guid": "0xB8CE"}]}],
            },
            "c.yaml",
        )


@pytest.mark.parametrize("rate", [50e9, 63.008e9, 12345678.9, 1 / 3 * 1e9, 450e9, 0.0])
def test_bandwidths_read_back_exactly(rate: float) -> None:
    for bits in (False, True):
        assert parse_bandwidth(bandwidth_text(rate, bits=bits)) == pytest.approx(rate, abs=1e-6)


def test_memory_text() -> None:
    assert memory_text(81559 * 2**20) == "81559MiB"
    assert memory_text(85520809984 + 1) == "85520809985B"
