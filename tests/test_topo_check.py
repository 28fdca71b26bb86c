"""`epplan topo check`: every fault is one line with its remedy, and a sound cluster passes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from epplan.topologies.check import check_against, check_cluster
from epplan.topologies.check_report import Line, Report
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.graph import Cluster
from epplan.topologies.live.discover import read_host
from epplan.topologies.live.host_graph import hosts_graph
from epplan.topologies.live.sysfs import Sysfs
from epplan.topologies.merge import merge
from epplan.topologies.sources import load_cluster, parse_cluster
from tests.fabrics import ibnetdiscover, rails
from tests.nvml_replies import Replies, hgx
from tests.test_topo_live import epplan

LEAF = {"names": "leaf1"}


def cluster(**parts: Any) -> Cluster:
    document = {
        "schema_version": 1,
        "name": "c",
        "host_types": {
            "dgx": {"gpu": "h100-sxm", "gpus": 4, "numa_nodes": 2, "nic": "connectx-7", "nics": 4},
            "weak": {"gpu": "h100-sxm", "gpus": 4, "nic": "connectx-7", "nics": 4, "links": 9},
            "few": {"gpu": "h100-sxm", "gpus": 4, "nic": "connectx-7", "nics": 2},
            "thin": {
                **{"gpu": "h100-sxm", "gpus": 4, "numa_nodes": 2, "nic": "connectx-7", "nics": 4},
                "nic_rate": "200Gb/s",
            },
            "bare": {"gpu": "h100-sxm", "gpus": 4},
        },
        "hosts": [{"names": "a[1-3]", "type": "dgx", "leafs": ["leaf1"]}],
        "switches": [LEAF],
        **parts,
    }
    return read_cluster_file(document, "c").build("")


def found(report: Report) -> list[tuple[str, str, str, str]]:
    return [
        (line.level, line.check, line.subject, line.message)
        for line in report.lines
        if line.level != "pass"
    ]


def discovered(tmp_path: Path, replies: str, hosts: int = 1) -> list[Cluster]:
    clusters = []
    for number in range(hosts):
        root = tmp_path / f"n{number}"
        hgx(root, number)
        record = read_host(f"n{number}", Replies(replies), Sysfs(root, "x86_64"))
        clusters.append(hosts_graph(record.name, record).build(""))
    return clusters


def fabric(text: str) -> Cluster:
    return parse_cluster(text.encode(), "fabric")


def test_a_sound_cluster_passes() -> None:
    report = check_cluster(cluster())
    assert not report.has_findings
    assert report.counts() == {"pass": 8, "warn": 0, "fail": 0}
    assert report.not_checked == ("MIG", "fabric health")
    assert report.lines[0] == Line(
        level="pass",
        check="NVLinks",
        subject="c",
        message="all GPUs of a model have the same NVLinks",
    )


def test_every_finding_has_a_remedy() -> None:
    hosts = [
        {"names": "a[1-3]", "type": "dgx", "leafs": ["leaf1"]},
        {"names": "w", "type": "weak", "leafs": ["leaf2"]},
        {"names": "f", "type": "few", "leafs": ["leaf1"]},
        {"names": "b", "type": "bare"},
    ]
    report = check_cluster(cluster(hosts=hosts, switches=[LEAF, {"names": "leaf2"}]))
    assert report.counts()["fail"] >= 6
    assert all(line.remedy for line in report.lines if line.level != "pass")


def test_degraded_gpus() -> None:
    hosts = [
        {"names": "a[1-2]", "type": "dgx", "leafs": ["leaf1"]},
        {"names": "w", "type": "weak", "leafs": ["leaf1"]},
    ]
    lines = found(check_cluster(cluster(hosts=hosts)))
    assert lines[0] == ("fail", "NVLinks", "w/gpu0", "9 NVLinks, its twins have 18")
    assert len(lines) == 4
    alone = [{"names": "w", "type": "weak", "leafs": ["leaf1"]}]
    assert found(check_cluster(cluster(hosts=alone))) == [
        ("warn", "NVLinks", "w", "all h100-sxm have 9 NVLinks, the model has 18")
    ]


def test_a_gpu_without_its_nvlink_row() -> None:
    """Its links are assumed from the profile by the reader, and missing all the same."""
    row = b'<nvlink target="0000:03:00.0" count="18" tclass="0x068000"/>'
    data = (Path(__file__).parent / "data" / "nccl-2gpu.xml").read_bytes()
    assert data.count(row) == 1
    lines = found(check_cluster(parse_cluster(data.replace(row, b""), "dump")))
    assert lines[0] == ("fail", "NVLinks", "host0/gpu1", "0 NVLinks, its twins have 18")


def test_live_faults(tmp_path: Path) -> None:
    (host,) = discovered(tmp_path, "hgx-degraded")
    assert found(check_cluster(host)) == [
        ("fail", "NVLinks", "n0/gpu3", "16 NVLinks, its twins have 18"),
        ("fail", "fabric health", "n0/gpu5", "degraded bandwidth"),
        ("fail", "fabric health", "n0/gpu5", "incorrect configuration: insufficient NVLinks"),
        ("warn", "consistency", "n0", "n0: GPU 3: 2 NVLinks are not active"),
    ]


def test_mig(tmp_path: Path) -> None:
    (host,) = discovered(tmp_path, "mig")
    lines = found(check_cluster(host))
    message = "MIG is on: its instances have no NVLink and no topology"
    assert ("fail", "MIG", "n0/gpu0", message) in lines
    assert not [line for line in lines if line[1] == "NVLinks"]  # not told is not lost


def test_nics_far_shared_and_missing() -> None:
    hosts = [
        {"names": "f", "type": "few", "leafs": ["leaf1"]},
        {"names": "b", "type": "bare"},
    ]
    lines = found(check_cluster(cluster(hosts=hosts)))
    shared = "2 NICs are shared: nic0 by gpu0, gpu1; nic1 by gpu2, gpu3"
    assert ("warn", "shared NICs", "f", shared) in lines
    lost = "gpu0, gpu1, gpu2, gpu3: no way to a NIC: traffic cannot leave the host"
    assert ("fail", "near NIC", "b", lost) in lines


def rewired(base: Cluster, tail: str, head: str, **change: Any) -> Cluster:
    """Return a cluster with one link changed in both directions."""
    graph: nx.DiGraph[str] = base.graph.copy()
    for one, two in ((tail, head), (head, tail)):
        graph.add_edge(one, two, link=replace(base.link(one, two), **change))
    return replace(base, graph=graph)


def test_slow_slots_and_bridges() -> None:
    base = cluster()
    bridge = rewired(base, "a1/pcie0", "a1/numa0", rated_bytes_per_s=15.76e9)
    assert found(check_cluster(bridge)) == [
        (
            *("warn", "PCIe", "a1/pcie0"),
            "bridge of 15.8 GB/s, slower than a1/gpu0 (63.0 GB/s) below it",
        )
    ]
    slot = rewired(base, "a2/gpu1", "a2/pcie1", rated_bytes_per_s=31.5e9)
    assert found(check_cluster(slot)) == [
        ("fail", "PCIe", "a2/gpu1", "PCIe 31.5 GB/s, its twins 63.0 GB/s")
    ]
    nic = rewired(base, "a2/nic1", "a2/pcie1", rated_bytes_per_s=31.5e9)
    assert found(check_cluster(nic)) == [
        ("warn", "PCIe", "a2/nic1", "port of 50.0 GB/s in a slot of 31.5 GB/s")
    ]


def test_leafs_cut_off() -> None:
    hosts = [
        {"names": "a[1-2]", "type": "dgx", "leafs": ["leaf1"]},
        {"names": "a3", "type": "dgx", "leafs": ["leaf2"]},
    ]
    report = check_cluster(cluster(hosts=hosts, switches=[LEAF, {"names": "leaf2"}]))
    assert found(report) == [("fail", "leafs", "leaf2", "no path to leaf1")]


def test_faults_of_one_rail(tmp_path: Path) -> None:
    hosts = discovered(tmp_path, "hgx-h100", 4)
    cables = rails(4)
    assert found(check_cluster(merge("c", hosts, fabric(ibnetdiscover(cables))))) == []
    del cables[2, 5]  # dead cable
    cables[3, 0], cables[3, 1] = 1, 0  # swapped
    lines = found(check_cluster(merge("c", hosts, fabric(ibnetdiscover(cables)))))
    assert ("fail", "rails", "n2/mlx5_5", "no cable to a leaf") in lines
    swapped = "on leaf1; this rail is leaf0 on 3 of 4 hosts"
    assert ("fail", "rails", "n3/mlx5_0", swapped) in lines
    assert [line[1] for line in lines].count("rails") == 3


def test_slow_port_and_thin_uplinks() -> None:
    hosts = [
        {"names": "a[1-2]", "type": "dgx", "leafs": ["leaf1"]},
        {"names": "t[1-2]", "type": "thin", "leafs": ["leaf2"]},
    ]
    switches = [
        {"names": "leaf1", "uplinks": [{"to": "spine", "count": 4, "rate": "400Gb/s"}]},
        {"names": "leaf2", "uplinks": [{"to": "spine", "count": 3, "rate": "400Gb/s"}]},
        {"names": "spine"},
    ]
    lines = found(check_cluster(cluster(hosts=hosts, switches=switches)))
    assert lines[0] == ("fail", "rails", "t1/nic0", "25.0 GB/s, nic0 elsewhere 50.0 GB/s")
    assert lines[-1] == (
        *("warn", "rails", "leaf2"),
        "uplinks of 150.0 GB/s, its twins' 200.0 GB/s",
    )


def test_skeletons() -> None:
    skeleton = '<system version="1"><cpu numaid="0"><pci busid="ffff:ff:01.0"/></cpu></system>'
    report = check_cluster(parse_cluster(skeleton.encode(), "skeleton"))
    assert found(report)[0][:3] == ("warn", "completeness", "skeleton")


SLURM = """SwitchName=spine Switches=leaf[0-1]
SwitchName=leaf0 Nodes=n[0-1]
SwitchName=leaf1 Nodes=n[2-4]
"""


def test_slurm_against_the_fabric() -> None:
    one_leaf = {(host, 0): int(host > 1) for host in range(4)}
    slurm = parse_cluster(SLURM.encode(), "topology.conf")
    report = check_against(slurm, fabric(ibnetdiscover(one_leaf)))
    assert found(report) == [("fail", "same hosts", "n4", "missing in fabric")]
    one_leaf[1, 0] = 1  # re-cabled
    report = check_against(slurm, fabric(ibnetdiscover(one_leaf)))
    assert found(report)[1] == (
        *("fail", "same leafs", "n1"),
        "on leaf0 in topology.conf, on leaf1 in fabric",
    )


def test_leafs_of_other_names_are_compared_by_company() -> None:
    renamed = SLURM.replace("leaf", "rack").encode()
    cables = {(host, 0): int(host > 1) for host in range(5)}
    slurm = parse_cluster(renamed, "topology.conf")
    assert not check_against(slurm, fabric(ibnetdiscover(cables))).has_findings
    cables[4, 0] = 0
    assert found(check_against(slurm, fabric(ibnetdiscover(cables)))) == [
        (
            *("fail", "same leafs", "n4"),
            "on rack1 with n2, n3 in topology.conf, on other leafs than they (leaf0) in fabric",
        )
    ]


def test_lost_gpu() -> None:
    less = cluster()
    less.graph.remove_node("a2/gpu3")
    report = check_against(cluster(), replace(less, name="today"))
    assert found(report) == [("fail", "same GPUs", "a2", "4 GPUs in c, 3 in today")]


def test_command(tmp_path: Path) -> None:
    done = epplan("check", "dgx-h100-2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "8 pass, 0 warn, 0 fail\n")
    assert "not checked, because the source does not tell: MIG, fabric health" in done.stdout
    done = epplan("check", "hgx-h100-4nic-4", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (6, "")
    result = json.loads(done.stdout)
    assert result["sources"] == ["hgx-h100-4nic-4"]
    assert result["counts"] == {"pass": 7, "warn": 4, "fail": 0}
    assert result["lines"][2]["remedy"]
    done = epplan("check", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown topology: nowhere")


@pytest.mark.parametrize("name", ["dgx-h100-2", "hgx-h200-2", "dgx-a100-2", "mixed-h100-h200"])
def test_bundled_clusters_are_sound(name: str) -> None:
    assert found(check_cluster(load_cluster(name))) == []
