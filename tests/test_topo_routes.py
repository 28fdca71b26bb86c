"""Routes: bytes on every link against an oracle that walks single paths."""

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.graph import Cluster, NetworkSwitch, Nic, PcieSwitch
from epplan.topologies.host_paths import PATH_TYPES
from epplan.topologies.routes import Floats, find_routes
from epplan.topologies.sources import load_cluster
from tests.tiny import tiny_cluster


def walk(cluster: Cluster, traffic: Floats) -> dict[str, float]:
    """Return bytes per link by walking every pair's shortest paths one by one.

    Valid for clusters of switched-NVLink hosts where a GPU uses the NICs on its own PCIe switch.
    """
    load: dict[str, float] = {}
    gpus = cluster.gpus()

    def put(path: list[str], amount: float) -> None:
        for tail, head in pairwise(path):
            name = f"{cluster.link(tail, head).kind} {tail} -> {head}"
            load[name] = load.get(name, 0.0) + amount

    network = cluster.graph.subgraph(
        [switch.id for switch in cluster.nodes(NetworkSwitch)]
        + [nic.id for nic in cluster.nodes(Nic)]
    )

    def nics(gpu: str) -> list[tuple[str, str]]:
        switch = next(x for x in cluster.graph[gpu] if isinstance(cluster.node(x), PcieSwitch))
        return [(switch, x) for x in cluster.graph[switch] if isinstance(cluster.node(x), Nic)]

    for row, source in enumerate(gpus):
        for column, destination in enumerate(gpus):
            amount = float(traffic[row, column])
            if row == column:
                continue
            if source.host == destination.host:
                put([source.id, f"{source.host}/nvswitch", destination.id], amount)
                continue
            out, back = nics(source.id), nics(destination.id)
            for switch, nic in out:
                for other_switch, other_nic in back:
                    share = amount / len(out) / len(back)
                    paths = list(nx.all_shortest_paths(network, nic, other_nic))
                    for path in paths:
                        whole = [source.id, switch, *path, other_switch, destination.id]
                        put(whole, share / len(paths))
    return load


def assert_agrees(cluster: Cluster, seed: int = 0) -> None:
    routes = find_routes(cluster)
    count = len(routes.gpus)
    traffic = np.random.default_rng(seed).uniform(1, 100, (count, count))
    amounts = routes.bytes_per_resource(traffic)
    expected = walk(cluster, traffic)
    actual = {x.name: y for x, y in zip(routes.resources, amounts, strict=True) if y > 1e-9}
    assert actual.keys() == expected.keys()
    for name, amount in expected.items():
        assert actual[name] == pytest.approx(amount), name


@pytest.mark.parametrize(
    "name",
    ["dgx-h100-2", "hgx-h200-2", "dgx-a100-2", "mixed-h100-h200", "oversubscribed-leaf-4"],
)
def test_bundled_clusters_agree_with_single_paths(name: str) -> None:
    assert_agrees(load_cluster(name))


def test_rails_agree_with_single_paths() -> None:
    """NIC i of every host on leaf i: traffic inside a host must not show on the uplinks."""
    assert_agrees(load_cluster("hgx-h100-4nic-4"))


@settings(max_examples=25, deadline=None)
@given(
    gpus=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    nics=st.integers(1, 3),
    leafs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_cluster_agrees_with_single_paths(
    gpus: list[int], nics: int, leafs: int, seed: int
) -> None:
    assert_agrees(tiny_cluster(tuple(gpus), nics=min(nics, *gpus), leafs=leafs), seed)


def test_equal_paths_share_equally() -> None:
    cluster = tiny_cluster((1, 1), leafs=2)
    for index in (1, 2):
        for leaf in ("leaf0", "leaf1"):
            link = cluster.link(leaf, "spine")
            node = NetworkSwitch(id=f"spine{index}")
            cluster.graph.add_node(node.id, node=node)
            cluster.graph.add_edge(leaf, node.id, link=link)
            cluster.graph.add_edge(node.id, leaf, link=link)
    routes = find_routes(cluster)
    amounts = routes.bytes_per_resource(np.array([[0.0, 30.0], [0.0, 0.0]]))
    by_name = {x.name: y for x, y in zip(routes.resources, amounts, strict=True)}
    assert [by_name[f"net leaf0 -> spine{x}"] for x in ("", 1, 2)] == pytest.approx([10.0] * 3)


def test_several_nics_of_a_gpu_share_its_traffic() -> None:
    routes = find_routes(tiny_cluster((1, 1), nics=4))
    assert routes.nics[0] == ("h0/nic0", "h0/nic1", "h0/nic2", "h0/nic3")
    amounts = routes.bytes_per_resource(np.array([[0.0, 100.0], [0.0, 0.0]]))
    by_name = {x.name: y for x, y in zip(routes.resources, amounts, strict=True)}
    assert by_name["net h0/nic2 -> leaf0"] == pytest.approx(25.0)


def test_path_types() -> None:
    routes = find_routes(load_cluster("dgx-h100-2"))
    assert PATH_TYPES[routes.path_type[0, 0]] == "LOC"
    assert PATH_TYPES[routes.path_type[0, 7]] == "NVL"
    assert PATH_TYPES[routes.path_type[0, 8]] == "NET"
    assert routes.latency_s[0, 7] == pytest.approx(3.4e-6)
    assert routes.latency_s[0, 8] == pytest.approx(14e-6)
    far = find_routes(load_cluster("oversubscribed-leaf-4"))
    assert far.latency_s[0, 31] == pytest.approx(14e-6 + 2 * 0.6e-6)  # leaf, spine, leaf


def test_a_domain_over_hosts_keeps_traffic_off_the_network() -> None:
    document = {
        "schema_version": 1,
        "name": "rack",
        "host_types": {"tray": {"gpu": "gb200", "gpus": 4, "nic": "connectx-7", "nics": 4}},
        "hosts": [{"names": "tray[1-3]", "type": "tray", "leafs": ["leaf"]}],
        "switches": [{"names": "leaf"}],
        "nvlink_domains": [{"name": "rack1", "hosts": "tray[1-2]"}],
    }
    routes = find_routes(read_cluster_file(document, "rack").build(""))
    assert PATH_TYPES[routes.path_type[0, 7]] == "NVL"
    assert PATH_TYPES[routes.path_type[0, 8]] == "NET"
    traffic = np.zeros((12, 12))
    traffic[0, 7] = 1.0
    used = {
        resource.name
        for resource, amount in zip(
            routes.resources, routes.bytes_per_resource(traffic), strict=True
        )
        if amount
    }
    assert used == {"nvlink tray1/gpu0 -> rack1", "nvlink rack1 -> tray2/gpu3"}


def test_unreachable_gpus_are_named() -> None:
    cluster = tiny_cluster((2, 2), leafs=2)
    cluster.graph.remove_edge("leaf0", "spine")
    cluster.graph.remove_edge("spine", "leaf0")
    message = "tiny: 8 of 16 GPU pairs have no path, first h0/gpu0 to h1/gpu0; hosts concerned: h0"
    with pytest.raises(InputError, match=message) as caught:
        find_routes(cluster)
    assert caught.value.exit_code == 2


def test_group_of_some_gpus_uses_only_their_links() -> None:
    cluster = load_cluster("oversubscribed-leaf-4")
    routes = find_routes(cluster, [gpu.id for gpu in cluster.gpus()[:16]])
    assert len(routes.gpus) == 16
    assert not any("spine" in resource.name for resource in routes.resources)
