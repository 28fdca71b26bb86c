"""What NCCL is told about a cluster, and that it is told nothing where it sees well itself."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from epplan.errors import InputError
from epplan.launcher.job import Network
from epplan.launcher.nccl_topology import nccl_topology
from epplan.launcher.network import choose_network
from epplan.topologies.graph import (
    Cluster,
    ClusterBuilder,
    Gpu,
    Link,
    NetworkSwitch,
    Nic,
    Numa,
    PcieSwitch,
)
from epplan.topologies.sources import load_cluster, parse_cluster
from tests.launch_modules.jobs import MADE_BY, make_job
from tests.launch_modules.plans import make_plan

CABLE = Link(kind="net", rated_bytes_per_s=50e9, efficiency=0.9, provenance="read")


def host(*nics: tuple[str, float, str | None], joined: bool = True) -> Cluster:
    """Return host `a` with a GPU and these NICs: name, bytes/s, leaf. `joined`: by a spine."""
    builder = ClusterBuilder("test")
    builder.add(Gpu(id="a/gpu0", host="a", index=0, profile=None, memory_bytes=1))
    for name, rate, leaf in nics:
        nic = builder.add(Nic(id=f"a/{name}", host="a", name=name, rated_bytes_per_s=rate))
        if leaf is not None:
            if leaf not in builder.graph:
                builder.add(NetworkSwitch(id=leaf))
                if joined:
                    if "spine" not in builder.graph:
                        builder.add(NetworkSwitch(id="spine"))
                    builder.connect(leaf, "spine", CABLE)
            builder.connect(nic.id, leaf, CABLE)
    return builder.build("0" * 64)


def choose(cluster: Cluster, *used: str) -> Network:
    return choose_network(cluster, {"a": used}, "/job", MADE_BY)


def test_nothing_is_set_where_all_nics_are_alike() -> None:
    network = choose(host(("mlx5_0", 50e9, "leaf1"), ("mlx5_1", 50e9, "leaf2")))
    assert (network.variables, network.of_host["a"]) == ((), ())
    assert network.notes == ("a: no NCCL topology file: the source has no PCI bus ids",)


def test_nics_without_a_cable_and_of_slow_networks_are_left_out() -> None:
    cluster = host(
        ("mlx5_0", 50e9, "leaf1"),
        ("mlx5_1", 12.5e9, "leaf2"),
        ("mlx5_2", 50e9, None),
        ("mlx5_3", 50e9, "leaf1"),
    )
    [variable] = choose(cluster).of_host["a"]
    assert (variable.name, variable.value) == ("NCCL_IB_HCA", "=mlx5_0,mlx5_3")
    assert variable.reason.startswith("NCCL would use mlx5_1, mlx5_2 of a: no cable")


def test_names_that_are_no_rdma_devices_are_not_given_to_nccl() -> None:
    network = choose(host(("nic0", 50e9, "leaf1"), ("nic1", 50e9, None)))
    assert network.of_host["a"] == ()
    assert network.notes[0] == (
        "a: nic1 should not carry traffic, but NCCL_IB_HCA needs RDMA devices, and the source "
        "names nic0"
    )


def test_a_network_that_no_rank_uses_is_left_out() -> None:
    cluster = host(("mlx5_0", 50e9, "rail0"), ("mlx5_1", 50e9, "storage"), joined=False)
    network = choose(cluster, "mlx5_0")
    assert network.variables == ()  # or it would be taken for a rail
    assert [x.value for x in network.of_host["a"]] == ["=mlx5_0"]


def test_rails_that_nothing_joins() -> None:
    nics = [("mlx5_0", 50e9, "rail0"), ("mlx5_1", 50e9, "rail1")]
    [variable] = choose(host(*nics, joined=False)).variables
    assert (variable.name, variable.value) == ("NCCL_CROSS_NIC", "0")
    assert choose(host(*nics)).variables == ()


def test_a_bundled_cluster_needs_nothing() -> None:
    network = choose_network(
        load_cluster("dgx-h100-2"), {"dgx01": [], "dgx02": []}, "/job", MADE_BY
    )
    assert (network.variables, network.files) == ((), ())
    assert set(network.of_host.values()) == {()}


def test_a_host_the_topology_does_not_have() -> None:
    with pytest.raises(InputError, match="has no host node7") as caught:
        choose_network(load_cluster("dgx-h100-2"), {"node7": []}, "/job", MADE_BY)
    assert "its hosts are dgx01, dgx02" in caught.value.hints[0]


# --- the NCCL topology file -----------------------------------------------------------------------

XML = Path(__file__).parent / "data/nccl-2gpu.xml"


def facts(cluster: Cluster) -> dict[str, object]:
    """Return what a topology file has to keep: devices, and the way from each to its processor."""
    devices: dict[str, object] = {}
    ends: list[Gpu | Nic] = [*cluster.nodes(Gpu), *cluster.nodes(Nic)]
    for node in ends:
        way, here, above = [], node.id, ""
        while here and not isinstance(cluster.node(here), Numa):
            links = [
                (other, cluster.link(here, other))
                for other in cluster.graph[here]
                if other != above and isinstance(cluster.node(other), PcieSwitch | Numa)
            ]
            [(other, link)] = links
            way.append(link.rated_bytes_per_s)
            above, here = here, other
        devices[str(node.pci_bus_id)] = (type(node).__name__, way, node.numa)
    return devices


def test_a_written_topology_reads_back_as_it_was() -> None:
    cluster = load_cluster(str(XML))
    text = nccl_topology(cluster, "host0", MADE_BY)
    assert text is not None
    assert facts(parse_cluster(text.encode(), "written")) == facts(cluster)
    assert len(facts(cluster)) == 3


def test_bridges_that_have_no_bus_id_get_one_as_clouds_do() -> None:
    builder = ClusterBuilder("test")
    pcie = Link(kind="pcie", rated_bytes_per_s=63e9, efficiency=0.8, provenance="profile")
    builder.add(Numa(id="a/numa0", host="a", index=0))
    for index in range(2):
        builder.add(PcieSwitch(id=f"a/pcie{index}", host="a"))
        builder.connect("a/numa0", f"a/pcie{index}", pcie)
        gpu = Gpu(
            id=f"a/gpu{index}",
            host="a",
            index=index,
            profile=None,
            memory_bytes=1,
            pci_bus_id=f"0000:1{index}:00.0",
        )
        builder.connect(f"a/pcie{index}", builder.add(gpu).id, pcie)
    text = nccl_topology(builder.build("0" * 64), "a", "made --by")
    assert text is not None
    root = ElementTree.fromstring(text)
    bridges = [element.get("busid") for element in root.findall("cpu/pci")]
    assert bridges == ["ffff:ff:01.0", "ffff:ff:02.0"]
    assert [x.get("busid") for x in root.findall("cpu/pci/pci")] == ["0000:10:00.0", "0000:11:00.0"]
    assert text.startswith("<!-- made - -by -->")


def test_hosts_of_one_kind_share_a_file_and_each_has_its_variable() -> None:
    plan = make_plan({"host0": [0, 1]})
    job = make_job(plan, "slurm", topology=str(XML))
    [plan_file, file] = job.files
    assert plan_file.name == "plan.json"
    assert file.name == "nccl-topology-0.xml"
    [*_, variable] = job.hosts[0].variables
    assert (variable.name, variable.value) == ("NCCL_TOPO_FILE", f"/shared/job/{file.name}")
    on_cpus = make_job(plan, "slurm", topology=str(XML), options=["--backend=gloo"])
    assert len(on_cpus.files) == 1
