"""Sources that show the network and no host's inside: InfiniBand, Slurm, clouds, labels."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, Host, NetworkSwitch, Nic, Plane
from epplan.topologies.show import summary, tables
from epplan.topologies.sources import load_cluster, parse_cluster

DATA = Path(__file__).parent / "data"


def read(text: str) -> Cluster:
    return parse_cluster(text.encode(), "test")


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(text)
    return str(caught.value)


def names(cluster: Cluster, kind: type[Any]) -> list[str]:
    return [node.id for node in cluster.nodes(kind)]


def domains(cluster: Cluster) -> dict[str, int]:
    return {plane.id: len(cluster.graph[plane.id]) for plane in cluster.nodes(Plane)}


# --- InfiniBand ---------------------------------------------------------------------------------


def test_ibnetdiscover_keeps_rails_and_guids() -> None:
    cluster = load_cluster(str(DATA / "ib-rails.txt"))
    assert sorted(names(cluster, NetworkSwitch)) == ["leaf01", "leaf02", "spine01"]
    assert names(cluster, Nic) == [
        "node01/mlx5_0",
        "node02/mlx5_0",
        "node01/mlx5_1",
        "guid-b8ce000000000031/hca",
    ]
    assert cluster.graph.has_edge("node01/mlx5_0", "leaf01")
    assert cluster.graph.has_edge("node01/mlx5_1", "leaf02")
    assert cluster.nodes(Nic)[0].guid == "b8ce000000000002"
    uplink = cluster.link("leaf01", "spine01")
    assert (uplink.count, uplink.rated_bytes_per_s, uplink.provenance) == (2, 100e9, "read")
    assert cluster.assumed == ()
    assert cluster.warnings == (
        "cable b8ce000000002000[33] - b8ce000000003000[3] is 200 Gb/s at one end and 400 Gb/s at "
        "the other; the slower is taken",
        "1 SHARP aggregation nodes are engines inside switches; left out",
        "4 nodes have no record of their own, only their neighbours name them",
        "1 adapters do not name their host; each is a host named by its id",
    )


PORTS = """
CA   134  1 0x7cfe9003003b4bde 4x EDR - SW  1719 10 0x7cfe9003009ce5b0 ( 'n1 HCA-1' - 'leaf' )
SW  1719 10 0x7cfe9003009ce5b0 4x EDR - CA   134  1 0x7cfe9003003b4bde ( 'leaf' - 'n1 HCA-1' )
SW  1719  1 0x7cfe9003009ce5b0 4x HDR - SW  1516  1 0x7cfe900300b07320 ( 'leaf' - 'spine' )
SW  1719 37 0x7cfe9003009ce5b0 4x ???                                    'leaf'
"""
LINKS = """
CA: n1 HCA-1:
   0x7cfe9003003b4bde 134 1[  ] ==( 4X 25.78125 Gbps Active/ LinkUp)==> 1719 10[ ] "a;leaf:b/U1" ( )
Switch: 0x7cfe9003009ce5b0 a;leaf:b/U1:
   1719 10[  ] ==( 4X 25.78125 Gbps Active/  LinkUp)==>  134  1[  ] "n1 HCA-1" ( )
   1719  1[  ] ==( 4X   53.125 Gbps Active/  LinkUp)==> 1516  1[  ] "a;spine:b/U1" ( )
   1719 37[  ] ==(           Down/ Polling)==>             [  ] "" ( )
"""
UP = "==( 4X {} Gbps Active/  LinkUp)==>"
LINES = (
    f'0x7cfe9003003b4bde "    n1 HCA-1"  134 1[  ] {UP.format("25.78125")} 0x7cfe9003009ce5b0 '
    '1719 10[  ] "a;leaf:b/U1" ( )\n'
    f'0x7cfe9003009ce5b0 " a;leaf:b/U1" 1719 1[  ] {UP.format("53.125")} 0x7cfe900300b07320 '
    '1516  1[  ] "a;spine:b/U1" ( )\n'
)


@pytest.mark.parametrize("text", [PORTS, LINKS, LINES], ids=["-p", "iblinkinfo", "iblinkinfo -l"])
def test_one_fabric_in_three_formats(text: str) -> None:
    cluster = read(text)
    assert names(cluster, Nic) == ["n1/HCA-1"]
    assert names(cluster, NetworkSwitch) == ["leaf", "spine"]
    assert cluster.nodes(Nic)[0].guid == "7cfe9003003b4bde"
    assert cluster.link("n1/HCA-1", "leaf").rated_bytes_per_s == 12.5e9
    assert cluster.link("leaf", "spine").rated_bytes_per_s == 25e9


def test_ibsim_net() -> None:
    cluster = read('Switch\t8 "S1"\n[1]\t"H1"[1]\n[2]\t"H1"[2]\n\nHca\t2 "H1"\n[1]\t"S1"[1]\n')
    assert names(cluster, Nic) == ["H1/hca:1", "H1/hca:2"]
    assert "every network cable is taken as 400 Gb/s" in cluster.assumed[0]
    assert cluster.link("H1/hca:1", "S1").provenance == "profile"


def test_a_second_record_is_refused() -> None:
    text = 'Switch 8 "S1"\nSwitch 8 "S1"'
    assert 'test: line 2: Switch "S1" has a second record' in refused(text)


def test_host_guids() -> None:
    cluster = read("VM_hostname a\n0ff08c4321664e96\nVM_hostname b\n0ff08c43217299f2\n")
    assert [nic.guid for nic in cluster.nodes(Nic)] == ["0ff08c4321664e96", "0ff08c43217299f2"]
    assert "line 2: 'x' is no host and no new GUID" in refused("VM_hostname a\nx\n")


# --- Slurm --------------------------------------------------------------------------------------


def test_slurm_tree() -> None:
    cluster = read(
        "# a comment\nswitchname=spine Switches=leaf[1-2] LinkSpeed=1\n"
        "SwitchName=leaf1 Nodes=n[01-02],\\\nm7\nSwitchName=leaf2 Nodes=n03\n"
    )
    counts = summary(cluster)["counts"]
    assert (counts["hosts"], counts["switches"]) == (4, 3)
    assert cluster.graph.has_edge("m7/host", "leaf1")
    assert [host["name"] for host in summary(cluster)["hosts"]] == ["n01", "n02", "m7", "n03"]
    tables(cluster)


def test_slurm_blocks_are_domains() -> None:
    cluster = read("BlockName=b1 Nodes=n[1-2]\nBlockName=b2 Nodes=n[3-4]\nBlockSizes=2,4\n")
    assert domains(cluster) == {"b1": 2, "b2": 2}
    assert cluster.assumed == ("each block is taken as one NVLink domain",)
    assert cluster.warnings == ("the file does not tell which switches join the blocks",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SwitchName=a Nodes=n1 Color=red", "line 1: color does not belong to switchname"),
        ("SwitchName=a Nodes=n1\nrubbish", "line 2: rubbish is no record of topology.conf"),
        ("SwitchName=a Switches=b", "switch a has child b, which is not defined"),
        ("SwitchName=a", "switch a has neither nodes nor switches below it"),
        ("SwitchName=a Nodes=n1\nSwitchName=a Nodes=n2", "switch a is defined 2 times"),
        ("SwitchName=a Switches=a", "switch a is its own child"),
        ("SwitchName=a Nodes=n1\nBlockName=b Nodes=n2", "belong to different plug-ins"),
        ("BlockName=b Nodes=n[1-4]\nBlockSizes=4,12", "12 is no power of two times the base"),
        ("BlockName=b Nodes=n[1-4]\nBlockSizes=18", "block b has 4 nodes, fewer than the base"),
        ("#BlockName=b Nodes=n1\nBlockSizes=4", "no block line that is not commented out"),
        ("RingName=r Nodes=n[1-17]", "ring r has 17 nodes; 16 are the most"),
        ("SwitchName=a Nodes=n[1-999999999]", "has more than 100000 names"),
        ("SwitchName=a Nodes=n[1-2", "its brackets do not match"),
        ("SwitchName=a Nodes=n[\u00b2]", "\u00b2 is no ascending range"),
    ],
)
def test_bad_topology_conf(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    ("plugin", "hosts", "links"),
    [
        ('tree: {switches: [{switch: s, nodes: "n[1-4]"}]}', 4, 8),
        ('tree: {switches: {switch: s, nodes: "n[1-4]"}}', 4, 8),
        ('block: {block_sizes: [4], blocks: [{block: b, nodes: "n[1-4]"}]}', 4, 8),
        ("flat: true", 0, 0),
        ("flat: {alpha_step_rank: true}", 0, 0),
        ('ring: {rings: [{ring: r, nodes: "n[1-4]"}]}', 4, 8),
        ('torus3d: {toruses: [{name: t, dims: {x: 3, y: 3, z: 1}, nodes: "n[1-9]"}]}', 9, 36),
        (
            "torus3d: {toruses: [{name: t, dims: {x: 2, y: 2, z: 2}, "
            'regions: [{region: a, nodes: "n[1-8]"}]}]}',
            8,
            24,
        ),
    ],
)
def test_topology_yaml(plugin: str, hosts: int, links: int) -> None:
    cluster = read(f"- topology: t\n  {plugin}\n")
    assert summary(cluster)["counts"]["hosts"] == hosts
    assert len(list(cluster.links())) == links


def test_the_default_topology_is_read() -> None:
    cluster = read(
        "- {topology: a, flat: true}\n"
        "- {topology: b, cluster_default: true, ring: {rings: [{ring: r, nodes: n1}]}}\n"
    )
    assert names(cluster, Host) == ["n1/host"]
    assert cluster.assumed == ("topology b is read, the cluster default; others: a",)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("tree: SwitchName=s1", "topologies.0.tree: Input should be a valid dictionary"),
        ("flat: true\n  ring: {rings: []}", "topology t has flat and ring; exactly one of tree,"),
        ("flat: false", "topology t has no plug-in; exactly one of"),
        (
            'torus3d: {toruses: [{name: t, dims: {x: 2, y: 2, z: 2}, nodes: "n[1-7]"}]}',
            "torus t has 2 x 2 x 2 = 8 cells and 7 nodes",
        ),
        ("torus3d: {toruses: [{name: t, dims: {x: 2, y: 2, z: 2}}]}", "needs either nodes or"),
        ('block: {block_sizes: [0], blocks: [{block: b, nodes: "n1"}]}', "block size is 0"),
    ],
)
def test_bad_topology_yaml(plugin: str, message: str) -> None:
    assert message in refused(f"- topology: t\n  {plugin}\n")


# --- topograph, clouds, labels ------------------------------------------------------------------


def test_topograph_model() -> None:
    cluster = read(
        "switches:\n  spine: {switches: [leaf1, leaf2]}\nblocks:\n"
        '- {switch: leaf1, nodes: ["n[1-2]"], annotations: {a.test/domain: nvl1}}\n'
        '- {switch: leaf2, nodes: ["[7-8]"]}\n'
    )
    assert names(cluster, NetworkSwitch) == ["spine", "leaf1", "leaf2"]
    assert names(cluster, Host) == ["n1/host", "n2/host", "7/host", "8/host"]
    assert domains(cluster) == {"nvl1": 2}
    assert "switch a is below itself" in refused("switches: {a: {switches: [a]}}")
    assert "is the name of two things" in refused(
        "switches: {leaf: {}}\nblocks: [{switch: leaf, nodes: [n], annotations: {x/domain: leaf}}]"
    )


EC2 = {
    "Instances": [
        {
            "InstanceId": f"i-{number}",
            "InstanceType": "p6e-gb200.36xlarge",
            "NetworkNodes": ["nn-1", "nn-2", f"nn-3{number % 2}"],
            "CapacityBlockId": "cbr-1",
        }
        for number in range(4)
    ]
}
GCP = [
    {
        "name": f"vm-{number}",
        "machineType": "zones/x/machineTypes/a4x-highgpu-4g",
        "resourceStatus": {
            "physicalHostTopology": {"cluster": "c", "block": "b", "subblock": "s", "host": "h"}
        },
    }
    for number in range(4)
]
OCI = {
    "data": {
        "items": [
            {
                "instance-id": f"ocid1.{number}",
                "compute-hpc-island-id": "island",
                "compute-network-block-id": "block",
                "compute-local-block-id": "local",
                "compute-gpu-memory-fabric-id": "fabric",
            }
            for number in range(4)
        ]
    }
}
OCI_METADATA = [
    {
        "displayName": f"host-{number}",
        "rdmaTopologyData": {
            "customerHPCIslandId": "island",
            "customerNetworkBlock": "block",
            "customerLocalBlock": "local",
            "customerGpuMemoryFabric": "fabric",
        },
    }
    for number in range(4)
]
NODES = {
    "kind": "List",
    "items": [
        {
            "kind": "Node",
            "metadata": {
                "name": f"node-{number}",
                "labels": {
                    "fabric.topograph.run/tier-0": "leaf",
                    "fabric.topograph.run/tier-1": "spine",
                    "fabric.topograph.run/tier-2": "core",
                    "nvidia.com/gpu.clique": "5e797fc6.7",
                },
            },
        }
        for number in range(4)
    ],
}


@pytest.mark.parametrize(
    ("document", "switches", "leaf", "host", "domain"),
    [
        (EC2, ["nn-1", "nn-2", "nn-30", "nn-31"], "nn-30", "i-0", "cbr-1"),
        (GCP, ["c", "b", "s"], "s", "vm-0", "s-nvlink"),
        (OCI, ["island", "block", "local"], "local", "ocid1.0", "fabric"),
        (OCI_METADATA, ["island", "block", "local"], "local", "host-0", "fabric"),
        (NODES, ["core", "spine", "leaf"], "leaf", "node-0", "nvlink-5e797fc6.7"),
    ],
    ids=["ec2", "gcp", "oci", "oci metadata", "kubernetes"],
)
def test_instance_topologies(
    document: Any, switches: list[str], leaf: str, host: str, domain: str
) -> None:
    cluster = read(json.dumps(document))
    assert names(cluster, NetworkSwitch) == switches
    assert len(cluster.nodes(Host)) == 4
    assert cluster.graph.has_edge(f"{host}/host", leaf)
    assert domains(cluster) == {domain: 4}


@pytest.mark.parametrize(
    ("labels", "switches"),
    [
        ({"network.topology.nvidia.com/leaf": "l", "network.topology.nvidia.com/spine": "s"}, "sl"),
        ({f"topology.k8s.aws/network-node-layer-{n}": str(n) for n in (1, 2, 3)}, "123"),
        ({"cloud.google.com/gce-topology-block": "b", "x": ""}, "b"),
        ({"oci.oraclecloud.com/host.network_block_id": "b"}, "b"),
    ],
)
def test_label_schemes_in_yaml(labels: dict[str, str], switches: str) -> None:
    text = f"kind: Node\nmetadata: {{name: n, labels: {json.dumps(labels)}}}\n"
    assert names(read(text), NetworkSwitch) == list(switches)


def test_nodes_without_labels() -> None:
    bare = {"kind": "Node", "metadata": {"name": "bare"}}
    assert "test: none of its 1 nodes has a label about its place" in refused(json.dumps(bare))
    cluster = read(json.dumps(NODES | {"items": [*NODES["items"], bare]}))
    assert cluster.warnings == ("1 nodes have no label about their place, first bare",)


def test_fabric_ids() -> None:
    uuid = "5e797fc6-0f46-421a-8724-0e102c0f723c"
    cluster = read(f"a: {uuid}\nb: {uuid}\nc: 00000000-0000-0000-0000-000000000000\n")
    assert domains(cluster) == {uuid: 2}
    assert len(cluster.nodes(Host)) == 3


def test_netq_graph() -> None:
    end = [{"node": "n1", "interface": "swp1"}, {"node": "n2", "interface": "ens4f0"}]
    devices = [
        {"id": "n1", "name": "leaf", "device_type": "switch"},
        {"id": "n2", "name": "h", "device_type": "host"},
    ]
    graph = {
        "nodes": [{"tier": 1, "compounded_nodes": devices}],
        "links": [{"compounded_links": [{"id": "x", "interfaces": end}]}],
    }
    cluster = read(json.dumps([graph]))
    assert names(cluster, Nic) == ["h/ens4f0"]
    assert cluster.graph.has_edge("h/ens4f0", "leaf")
    graph["nodes"] = []
    assert "a cable ends at n1, which is not among the nodes" in refused(json.dumps([graph]))


def test_an_instance_needs_a_name_and_a_place() -> None:
    nameless = {"Instances": [{"NetworkNodes": ["a"]}]}
    assert "record 1 does not name its instance" in refused(json.dumps(nameless))
    nowhere = {"Instances": [{"InstanceId": "i", "NetworkNodes": []}]}
    assert re.search("places no instance", refused(json.dumps(nowhere)))
