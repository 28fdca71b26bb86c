"""`epplan topo measure`: fits, slow pairs, real gloo ranks, and the file that is written."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from epplan.errors import InputError
from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.planner.plan import Plan, write_plan
from epplan.runtime.environment import Setting
from epplan.runtime.link_benchmark import Options, time_links
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.cluster_writer import cluster_text, measured_text
from epplan.topologies.graph import Cluster
from epplan.topologies.measure import LinkTimes, Measurement, fit, measure, parse_times
from epplan.topologies.routes import find_routes
from epplan.topologies.sources import load_cluster
from epplan.topologies.transfer_cost import transfer_cost
from tests.fork_ranks import run_ranks
from tests.plans import bare_plan
from tests.test_topo_live import epplan
from tests.tiny import tiny_cluster

SIZES = (4096, 65536, 1048576)


def plan_for(gpus: list[tuple[str, int]]) -> Plan:
    model = ModelSpec(
        name="tiny",
        hidden_size=8,
        num_layers=1,
        moe_layers=(0,),
        num_experts=len(gpus),
        top_k=1,
        expert_ffn_size=8,
        attention=AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8),
        weight_bytes=2,
    )
    return bare_plan(model, gpus, [list(range(len(gpus)))])


def times(
    cluster: Cluster,
    rates: dict[tuple[int, int], float],
    *,
    latency: float = 10e-6,
    exchange: float = 0.0,
    **change: Any,
) -> LinkTimes:
    """Return what pairs of these bytes/s would take; all to all as fast as `exchange`."""
    document = {
        "schema_version": 1,
        "kind": "epplan-link-times",
        "backend": "nccl",
        "backend_reason": "asked for",
        "device": "x",
        "repeats": 1,
        "ranks": [
            {"host": gpu.host, "gpu_index": gpu.index, "machine": f"m-{gpu.host}"}
            for gpu in cluster.gpus()
        ],
        "pairs": [
            {"ranks": list(ranks), "bytes": size, "seconds": latency + size / rate}
            for ranks, rate in rates.items()
            for size in SIZES
        ],
        "all_to_all": [
            {"bytes": size, "seconds": latency + size / exchange} for size in SIZES if exchange
        ],
        **change,
    }
    return parse_times(document, "times")


def rows(measurement: Measurement) -> dict[str, tuple[str, float, float]]:
    return {
        row.path: (row.transfers, round(row.latency * 1e6, 2), round(row.bandwidth / 1e9, 3))
        for row in measurement.rows
    }


def test_fit_finds_latency_and_bandwidth() -> None:
    latency, bandwidth = fit([(size, 5e-6 + size / 40e9) for size in SIZES])
    assert latency == pytest.approx(5e-6)
    assert bandwidth == pytest.approx(40e9)


def test_fit_of_noise_claims_no_latency() -> None:
    assert fit([(4096, 1e-6)])[1] == pytest.approx(4096e6)
    latency, bandwidth = fit([(1000, 1e-6), (2000, 9e-6)])  # more than linear
    assert latency == 0.0
    assert bandwidth == pytest.approx(2000 / 9e-6)


def test_times_stand_beside_what_the_topology_expected() -> None:
    cluster = tiny_cluster((2, 2))
    routes = find_routes(cluster, [gpu.id for gpu in cluster.gpus()])
    sent = np.zeros((4, 4))
    sent[0, 1] = SIZES[-1]
    expected = transfer_cost(routes, sent).seconds
    found = measure(cluster, times(cluster, {(0, 1): 300e9, (2, 3): 320e9}, exchange=30e9), 0.5)
    pairs = [row for row in found.compared if row.transfers == "pairs"]
    assert [(row.path, row.bytes) for row in pairs] == [("NVL", size) for size in SIZES]
    assert pairs[-1].expected_s == pytest.approx(expected)
    middle = (SIZES[-1] / 300e9 + SIZES[-1] / 320e9) / 2
    assert pairs[-1].measured_s == pytest.approx(10e-6 + middle)
    exchange = [row for row in found.compared if row.transfers == "all-to-all"]
    assert [row.path for row in exchange] == ["NET, NVL"] * len(SIZES)
    even = (np.ones((4, 4)) - np.eye(4)) * SIZES[-1] / 3
    assert exchange[-1].expected_s == pytest.approx(transfer_cost(routes, even).seconds)


def test_classes_are_path_types() -> None:
    cluster = tiny_cluster((2, 2))
    rates = {(0, 1): 300e9, (2, 3): 320e9} | {(a, b): 40e9 for a in (0, 1) for b in (2, 3)}
    found = measure(cluster, times(cluster, rates, exchange=30e9), 0.5)
    assert rows(found)["NET"] == ("pairs", 10.0, 40.0)
    # Ranks of two hosts: their all to all says nothing about an NVLink port.
    assert rows(found)["NVL"][:2] == ("pairs", 10.0)
    assert 300 < rows(found)["NVL"][2] < 320
    assert found.slow == ()


def test_ranks_of_one_plane_take_the_all_to_all() -> None:
    cluster = tiny_cluster((3,))
    rates = {(0, 1): 150e9, (0, 2): 150e9, (1, 2): 150e9}
    found = measure(cluster, times(cluster, rates, exchange=350e9), 0.5)
    assert rows(found) == {"NVL": ("all-to-all", 10.0, 350.0)}


def test_a_slow_pair_is_flagged_and_does_not_change_its_class() -> None:
    cluster = tiny_cluster((1, 1, 1, 1))
    rates = {(a, b): 40e9 for b in range(4) for a in range(b)}
    rates[1, 3] = 12e9
    found = measure(cluster, times(cluster, rates), 0.5)
    assert rows(found) == {"NET": ("pairs", 10.0, 40.0)}
    (slow,) = found.slow
    assert (slow.gpus, slow.path) == (("h1/gpu0", "h3/gpu0"), "NET")
    assert measure(cluster, times(cluster, rates), 0.2).slow == ()


def test_links_of_different_ratings_are_fitted_apart(tmp_path: Path) -> None:
    slow, uplink, fast = 50e9 / 8, 100e9 / 8, 400e9 / 8  # h3's NIC, leaf1's uplink, all others
    cluster = uneven_cluster()
    way = {0: fast, 1: fast, 2: fast, 3: slow}
    rates = {}
    for first, second in combinations(range(4), 2):
        crosses = {first // 2, second // 2} == {0, 1}
        rates[first, second] = 0.9 * min(way[first], way[second], uplink if crosses else fast)
    found = measure(cluster, times(cluster, rates), 0.5)
    assert found.slow == ()  # as slow as they are rated
    assert {row.rated: round(row.bandwidth) for row in found.rows} == {
        rated: round(0.9 * rated) for rated in (fast, uplink, slow)
    }
    path = tmp_path / "measured.yaml"
    path.write_text(cluster_text(cluster, "test"))
    path.write_text(measured_text(str(path), cluster, "test", found.rows))
    measured = load_cluster(str(path))
    for tail, head in (("h0/nic0", "leaf0"), ("h3/nic0", "leaf1"), ("leaf1", "spine")):
        link = measured.link(tail, head)
        assert link.efficiency == pytest.approx(0.9)
        assert link.provenance == "measured"
    assert measured.link("leaf0", "spine").provenance == "read"  # no pair fills it


def test_a_link_no_pair_fills_is_not_taken_for_the_slower_ones(tmp_path: Path) -> None:
    one = {"gpu": "h100-sxm", "gpus": 1, "nic": "connectx-7", "nics": 1}
    document = {
        "schema_version": 1,
        "name": "one-fast",
        "host_types": {"fast": one, "slow": {**one, "nic_rate": "100Gb/s"}},
        "hosts": [
            {"names": "h0", "type": "fast", "leafs": ["leaf"]},
            {"names": "h[1-2]", "type": "slow", "leafs": ["leaf"]},
        ],
        "switches": [{"names": "leaf"}],
    }
    cluster = read_cluster_file(document, "one-fast").build("")
    rate = 0.8 * 100e9 / 8
    found = measure(cluster, times(cluster, {(0, 1): rate, (0, 2): rate, (1, 2): rate}), 0.5)
    path = tmp_path / "measured.yaml"
    path.write_text(cluster_text(cluster, "test"))
    path.write_text(measured_text(str(path), cluster, "test", found.rows))
    measured = load_cluster(str(path))
    assert measured.link("h0/nic0", "leaf").capacity_bytes_per_s == pytest.approx(0.8 * 400e9 / 8)
    assert measured.link("h1/nic0", "leaf").capacity_bytes_per_s == pytest.approx(rate)


def uneven_cluster() -> Cluster:
    """Return hosts of one GPU, two a leaf; one NIC and one leaf's uplink are slow."""
    rates = ["400Gb/s", "400Gb/s", "400Gb/s", "50Gb/s"]
    one = {"gpu": "h100-sxm", "gpus": 1, "nic": "connectx-7", "nics": 1}
    document = {
        "schema_version": 1,
        "name": "uneven",
        "host_types": {f"t{index}": {**one, "nic_rate": rate} for index, rate in enumerate(rates)},
        "hosts": [
            {"names": f"h{index}", "type": f"t{index}", "leafs": [f"leaf{index // 2}"]}
            for index in range(4)
        ],
        "switches": [
            {"names": "leaf0", "uplinks": [{"to": "spine", "rate": "800Gb/s"}]},
            {"names": "leaf1", "uplinks": [{"to": "spine", "rate": "100Gb/s"}]},
            {"names": "spine"},
        ],
    }
    return read_cluster_file(document, "uneven").build("")


def test_times_of_something_else_are_refused() -> None:
    cluster = tiny_cluster((1, 1))
    rates = {(0, 1): 40e9}
    same = [{"host": f"h{x}", "gpu_index": 0, "machine": "laptop"} for x in range(2)]
    with pytest.raises(InputError, match="hosts h0 and h1 ran on one machine, laptop"):
        measure(cluster, times(cluster, rates, ranks=same), 0.5)
    with pytest.raises(InputError, match="gloo moved data between CPUs, but h0/gpu0 is a GPU"):
        measure(cluster, times(cluster, rates, backend="gloo"), 0.5)
    with pytest.raises(InputError, match="tiny has no h1/gpu0, which ranks ran on"):
        measure(tiny_cluster((1,)), times(cluster, rates), 0.5)
    with pytest.raises(InputError, match="1 rank has no pair to time"):
        measure(tiny_cluster((1,)), times(tiny_cluster((1,)), {}), 0.5)
    with pytest.raises(InputError, match="times is not valid") as caught:
        times(cluster, {(0, 5): 1e9})
    assert "pair [0, 5]: there are 2 ranks" in str(caught.value)


def document(**parts: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": "c",
        "host_types": {"dgx": {"gpu": "h100-sxm", "gpus": 2, "nic": "connectx-7", "nics": 2}},
        "hosts": [{"names": "a[1-2]", "type": "dgx", "leafs": ["leaf"]}],
        "switches": [
            {"names": "leaf", "uplinks": [{"to": "spine", "count": 1, "rate": "400Gb/s"}]},
            {"names": "spine"},
        ],
        **parts,
    }


def row(path: str, bandwidth: str) -> dict[str, Any]:
    return {
        "path": path,
        "transfers": "pairs",
        "bandwidth": bandwidth,
        "latency": "10us",
        "samples": 3,
        "backend": "nccl",
    }


def test_measured_rows_replace_efficiencies() -> None:
    measured = [row("NVL", "360GB/s"), row("NET", "45GB/s"), row("PIX", "990GB/s")]
    cluster = read_cluster_file(document(measured=measured), "c").build("")
    port = cluster.link("a1/gpu0", "a1/nvswitch")
    assert port.capacity_bytes_per_s == pytest.approx(360e9)
    assert port.provenance == "measured"
    assert port.rated_bytes_per_s == 450e9
    assert cluster.link("a1/nic0", "leaf").capacity_bytes_per_s == pytest.approx(45e9)
    assert cluster.link("leaf", "spine").provenance == "read"  # no pair fills it
    slot = cluster.link("a1/gpu0", "a1/pcie0")
    assert slot.capacity_bytes_per_s == slot.rated_bytes_per_s  # nothing beats its rating
    assert cluster.link("a1/pcie0", "a1/numa0").provenance == "measured"
    with pytest.raises(InputError, match=r"measured.0.path: Input should be 'NVL'"):
        read_cluster_file(document(measured=[row("FOO", "1GB/s")]), "c")


def time_here(rank: int) -> Any:
    setting = Setting(
        backend="gloo",
        backend_reason="asked for",
        device=torch.device("cpu"),
        dtype=torch.float32,
        notes=(),
    )
    plan = plan_for([("localhost", index) for index in range(3)])
    options = Options(backend="gloo", max_bytes=40000, repeats=2)
    return time_links(plan, options, setting, rank)


def test_gloo_ranks_time_every_pair() -> None:
    result, *others = run_ranks(time_here, 3)
    assert others == [None, None]
    found = parse_times(result, "result")
    assert [(pair.ranks, pair.bytes) for pair in found.pairs] == [
        (ranks, size) for ranks in ((0, 1), (0, 2), (1, 2)) for size in (4096, 32768)
    ]
    assert [row.bytes for row in found.all_to_all] == [8192, 65536]
    assert found.ranks[2].gpu_index == 2
    fitted = measure(load_cluster("cpu-16"), found, 0.5)
    assert [(row.path, row.transfers) for row in fitted.rows] == [("SHM", "all-to-all")]


CLUSTER = """# my machine
schema_version: 1
name: mine
host_types:
  cpu: {gpu: cpu-rank, gpus: 2, numa_nodes: 1}   # a laptop
hosts:
  - {names: laptop, type: cpu}
"""


def test_command(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CLUSTER)
    write_plan(tmp_path / "plan.json", plan_for([("laptop", 0), ("laptop", 1)]))
    run = ("measure", "plan.json", "--topology", "mine.yaml", "--max-bytes", "40000")
    done = epplan(*run, "-o", "new.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote new.yaml" in done.stderr
    result = json.loads(done.stdout)
    assert (result["backend"], result["ranks"], result["slow"]) == ("gloo", 2, [])
    assert result["classes"][0]["path"] == "SHM"
    text = (tmp_path / "new.yaml").read_text()
    assert text.startswith(CLUSTER)  # comments and templates stay
    (written,) = yaml.safe_load(text)["measured"]
    assert written["path"] == "SHM"
    port = load_cluster(str(tmp_path / "new.yaml")).link("laptop/gpu0", "laptop/memory")
    assert port.provenance == "measured"


def test_command_with_times(tmp_path: Path) -> None:
    cluster = tiny_cluster((1, 1, 1, 1))
    rates = {(a, b): 40e9 for b in range(4) for a in range(b)}
    rates[0, 1] = 10e9
    (tmp_path / "times.json").write_text(times(cluster, rates).model_dump_json())
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            document(
                hosts=[{"names": "h[0-3]", "type": "dgx", "leafs": ["leaf"]}],
                measured=[row("NET", "1GB/s")],
            )
        )
    )
    write_plan(tmp_path / "plan.json", plan_for([(f"h{x}", 0) for x in range(4)]))
    run = ("measure", "plan.json", "--topology", "c.yaml")
    done = epplan(*run, "--times", "times.json", "-o", "c.yaml", cwd=tmp_path)
    assert done.returncode == 6, done.stderr
    assert "slow: h0/gpu0 - h1/gpu0 (NET): 9.1 GB/s, the median of NET is 29.0 GB/s" in done.stdout
    written = load_cluster(str(tmp_path / "c.yaml"))
    assert written.link("h1/nic0", "leaf").capacity_bytes_per_s == pytest.approx(40e9)
    refused = epplan(*run, cwd=tmp_path)
    assert refused.returncode == 2
    assert "plan plan.json is for 4 hosts; here only this machine's memory" in refused.stderr
    assert "srun python -m epplan.runtime.link_benchmark plan.json" in refused.stderr
    missing = epplan(*run, "--times", "none.json", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (2, "error: link times not found: none.json\n")


def test_measured_latency_replaces_the_table() -> None:
    measured = [{**row("NVL", "360GB/s"), "latency": "20us"}]
    routes = find_routes(read_cluster_file(document(measured=measured), "c").build(""))
    assert routes.latency_s[0, 1] == pytest.approx(20e-6 - 8.4e-6)  # less the start of a transfer
