"""`epplan simulate` from outside: its JSON, its tables, its errors."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from epplan.commands.simulate import simulate
from epplan.commands.solve import solve
from epplan.errors import InputError
from epplan.planner.plan import read_plan, write_plan
from tests.tiny import tiny_plan

LAYOUT = ["--topology", "dgx-h100-2", "--model", "reference", "--layout", "ep16"]


def run(*args: str) -> Result:
    return CliRunner().invoke(simulate, args, standalone_mode=False)


def data(*args: str) -> Any:
    result = run(*args, "--json")
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)


def test_json_has_what_scripts_need() -> None:
    found = data(*LAYOUT, "--batch", "1024", "--price", "2")
    assert found["phase"] == "decode"
    assert found["tpot_s"] == found["step_s"] > found["floor_s"] > 0
    assert found["tps"] == pytest.approx(1024 / found["step_s"])
    assert found["bottleneck"].startswith("HBM of dgx0")
    assert found["memory_bytes_per_gpu_max"] > 6 * 2**30
    assert found["cost_per_million_tokens"] == pytest.approx(2 * 16 / 3600 / found["tps"] * 1e6)
    assert found["phases"]["prefill"]["tpot_s"] is None
    assert found["phases"]["prefill"]["bottleneck"].startswith("FLOP/s of")
    assert found["fits"]


def test_tables_name_the_bottleneck_and_the_largest_part_of_memory() -> None:
    result = run(*LAYOUT, "--phase", "decode", "--context", "10000", "--batch", "1024")
    assert "bottleneck" in result.stdout
    assert "HBM of dgx01/gpu0" in result.stdout
    assert "DOES NOT FIT" in result.stdout
    assert "78.12 GiB  (largest)" in result.stdout
    assert "warning: decode does not fit: rank 0 needs 84.1" in result.stderr
    assert result.return_value == 0


def test_sweeps_are_tables_of_all_combinations() -> None:
    found = data(*LAYOUT, "--phase", "decode", "--sweep", "batch=64,1024", "--sweep", "context=0,8")
    assert [(row["batch"], row["context"]) for row in found["sweep"]] == [
        *((64, 0), (64, 8), (1024, 0), (1024, 8))
    ]
    table = run(*LAYOUT, "--phase", "decode", "--sweep", "transfer=nccl,deepep-ll").stdout
    assert "deepep-ll" in table
    line = ["--topology", "2x8:h100,nic=8x400Gb/s", "--model", "mixtral-8x7b", "--phase", "decode"]
    assert [row["gpus"] for row in data(*line, "--sweep", "ep=4,8")["sweep"]] == [4, 8]
    grown = data(*line, "--layout", "tp8", "--sweep", "hosts=1,3")["sweep"]
    assert [row["gpus"] for row in grown] == [8, 24]


def test_what_ifs_change_the_cluster() -> None:
    base = data(*LAYOUT, "--phase", "prefill", "--no-overlap")
    slower = data(*LAYOUT, "--phase", "prefill", "--no-overlap", "--nic", "200Gb/s")
    assert slower["step_s"] > base["step_s"]
    assert slower["remarks"] == ["what if: dgx-h100-2 with NICs of 200Gb/s"]
    skewed = data(*LAYOUT, "--phase", "prefill", "--no-overlap", "--load", "zipf:1")
    evened = data(
        *(*LAYOUT, "--phase", "prefill", "--no-overlap", "--load", "zipf:1", "--replicas", "16")
    )
    assert evened["step_s"] < skewed["step_s"]


def test_a_trace_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    result = run(*LAYOUT, "--trace", str(path))
    assert "--trace writes one phase: decode" in result.stderr
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["pid"] for event in events} == set(range(16))


def test_a_plan_is_simulated_on_its_topology(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, tiny_plan())
    with pytest.raises(InputError, match="the plan's topology cannot be read") as caught:
        data(str(path))
    assert caught.value.hints == ("say where it is now: --topology SOURCE",)
    with pytest.raises(InputError, match="none of the plan's 4 GPUs is in 2x2:h100"):
        data(str(path), "--topology", "2x2:h100,nic=1x400Gb/s", "--load", "uniform")
    with pytest.raises(InputError, match=r"^--model, --layout: PLAN says this already"):
        data(str(path), "--model", "reference", "--layout", "ep4")


def test_a_solved_plan_keeps_its_placement_traffic_and_topology(tmp_path: Path) -> None:
    bundled = Path(__file__).parent.parent / "topologies" / "clusters" / "dgx-h100-2.yaml"
    cluster, plan = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    cluster.write_text(bundled.read_text())
    options = ["--topology", str(cluster), "--model", "reference", "--load", "lognormal:1,1"]
    assert CliRunner().invoke(solve, [*options, "-o", str(plan)]).exit_code == 0
    step = ["--phase", "prefill", "--context", "4096", "--no-overlap", "--transfer", "plan"]
    found = data(str(plan), *step)
    assert found["layout"] == "ep16"
    contiguous = data(*LAYOUT, "--load", "lognormal:1,1", *step)
    assert found["step_s"] < contiguous["step_s"]  # what the solver gained is there
    priced = sum(cost.dispatch_s + cost.combine_s for cost in read_plan(plan).cost)
    assert found["transfer_s"] == pytest.approx(priced, rel=1e-6)  # 4096 tokens a rank in both
    without = data(str(plan), *step, "--without-host", "dgx02")
    assert without["gpus"] == 8
    assert "without dgx02: 8 GPUs fewer" in without["remarks"][1]
    assert data(str(plan), *step, "--load", "uniform")["step_s"] < found["step_s"]
    cluster.write_text(bundled.read_text() + "# changed\n")
    with pytest.raises(InputError, match="was changed after planning"):
        data(str(plan))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to simulate"),
        ([*LAYOUT, "--transfer", "mpi"], "unknown transfer library: mpi"),
        ([*LAYOUT, "--sweep", "color=1"], "--sweep color=1 is not valid"),
        ([*LAYOUT, "--sweep", "batch=1,x"], "--sweep batch: 'x' is no whole number"),
        ([*LAYOUT, "--sweep", "hosts=1"], "--sweep hosts needs a cluster in a line"),
        ([*LAYOUT, "--nic", "fast"], "--nic fast: 'fast' is no bandwidth"),
        ([*LAYOUT, "--without-host", "h9"], "dgx-h100-2 has no host h9"),
        ([*LAYOUT, "--leaf-oversubscription", "2"], "no leaf of dgx-h100-2 has an uplink"),
        ([*LAYOUT, "--device-profile", "no.yaml"], "device profile not found: no.yaml"),
        ([*LAYOUT[:4], "--layout", "ep32"], "EP=32 needs 32 GPUs, dgx-h100-2 has 16"),
        ([*LAYOUT[:4], "--layout", "ep16", "--replicas", "3"], "do not fill 16 GPUs evenly"),
    ],
)
def test_what_is_wrong_is_said(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data(*args)
