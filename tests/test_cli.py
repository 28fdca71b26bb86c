"""The command line as users and scripts see it: exit codes, JSON contracts, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def epplan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "epplan", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


SOLVE = ("solve", "--topology", "dgx-h100-2", "--model", "reference", "--load", "lognormal:1,1")


def test_solve_prints_one_object_and_writes_the_plan(tmp_path: Path) -> None:
    done = epplan(*SOLVE, "-o", "p.json", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["status"] in ("optimal", "feasible")
    assert 0 < result["bound_s"] <= result["objective_s"] <= result["contiguous_s"]
    assert result["gap"] == pytest.approx(1 - result["bound_s"] / result["objective_s"], abs=1e-9)
    assert (result["ep"], result["experts_per_gpu_max"], result["plan"]) == (16, 1, "p.json")
    assert result["binding"].startswith("layer ")
    assert result["seconds"] > 0
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["sha256"] == result["sha256"]
    assert [sorted(slots) for slots in plan["expert_of_slot"]] == [list(range(16))] * 4
    shown = epplan("explain", "p.json", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["certificate"]["objective_s"] == result["objective_s"]


def test_solve_is_deterministic(tmp_path: Path) -> None:
    first = epplan(*SOLVE, "-o", "a.json", "--json", cwd=tmp_path)
    second = epplan(*SOLVE, "-o", "b.json", "--json", cwd=tmp_path)
    volatile = {"seconds", "plan", "sha256"}  # the hash covers the seconds
    one, other = json.loads(first.stdout), json.loads(second.stdout)
    for name in one.keys() - volatile:
        assert one[name] == other[name], name


def test_tables_name_every_rank_and_the_certificate(tmp_path: Path) -> None:
    done = epplan(*SOLVE, cwd=tmp_path)
    assert done.returncode == 0
    assert "wrote plan.json (sha256" in done.stderr
    for part in ("dgx01", "nic7", "layer 3", "certificate", "valid for", "assumed:", "GiB of"):
        assert part in done.stdout
    shown = epplan("explain", "plan.json", cwd=tmp_path)
    assert shown.stdout == done.stdout


@pytest.mark.parametrize("transfer", ["direct", "node-dedup"])
def test_solve_for_a_transfer_says_what_it_assumed(tmp_path: Path, transfer: str) -> None:
    done = epplan(
        *("solve", "--topology", "2x2:h100,nic=2x400Gb/s", "--model", "mixtral-8x7b"),
        *("--layers", "1", "--experts-per-gpu", "2", "--load", "zipf:0.5"),
        *("--transfer", transfer, "--gap", "0.5", "--json"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["transfer"] == transfer
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["workload"]["transfer"] == transfer
    assert any("token sets are drawn at random" in text for text in plan["assumptions"])
    shown = epplan("explain", "plan.json", cwd=tmp_path)
    assert f"with transfer {transfer}" in " ".join(shown.stdout.replace("│", "").split())


def test_a_plan_names_the_nvlink_domains_that_rows_go_to_once(tmp_path: Path) -> None:
    done = epplan(
        *("solve", "--topology", "4x2:gb200,nic=2x400Gb/s,domain=2", "--model", "mixtral-8x7b"),
        *("--layers", "1", "--load", "uniform", "--transfer", "node-dedup", "--gap", "0.5"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "plan.json").read_text())["ranks"]
    assert [rank["island"] for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({rank["host"] for rank in ranks}) == 4


def test_replicas_with_token_sets_and_whole_groups(tmp_path: Path) -> None:
    done = epplan(
        *("solve", "--topology", "2x2:h100,nic=2x400Gb/s", "--model", "deepseek-v3"),
        *("--experts", "16", "--layers", "4", "--experts-per-gpu", "6", "--load", "zipf"),
        *("--replicas", "4", "--keep-groups", "--transfer", "node-dedup"),
        *("--gap", "0.01", "--time-limit", "2", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode in (0, 4), done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["bound_s"] <= result["objective_s"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["workload"]["transfer"] == "node-dedup"
    assert plan["workload"]["keep_groups"]
    slots = plan["expert_of_slot"][0]
    assert 16 < sum(expert is not None for expert in slots) <= 20
    hosts: dict[int, set[int]] = {}
    for slot, expert in enumerate(slots):
        if expert is not None:
            hosts.setdefault(expert // 2, set()).add(slot // (2 * plan["slots_per_rank"]))
    assert all(len(of_group) == 1 for of_group in hosts.values())
    shown = " ".join(epplan("explain", "plan.json", cwd=tmp_path).stdout.replace("│", "").split())
    assert "4 replicas or fewer of any experts" in shown
    assert "whole routing groups with all their copies on a host" in shown
    assert "goes to one of its expert's copies at random" in shown
    again = epplan(
        *("replan", "plan.json", "--without", "host2", "--experts-per-gpu", "10"),
        *("--time-limit", "2", "-o", "next.json", "--json"),
        cwd=tmp_path,
    )
    assert again.returncode in (0, 4), again.stderr
    scope = json.loads((tmp_path / "next.json").read_text())["certificate"]["scope"]
    assert "replicas or fewer" in scope
    assert scope.endswith("with transfer node-dedup")


def test_topo_show_contract(tmp_path: Path) -> None:
    done = epplan("topo", "show", "hgx-h100-4nic-4", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["counts"] == {
        "hosts": 4,
        "gpus": 32,
        "nics": 16,
        "nvlinks": 576,
        "switches": 5,
        "pcie_switches": 16,
        "nvlink_planes": 4,
        "numa_nodes": 8,
    }
    host = result["hosts"][0]
    assert (host["name"], host["numa_nodes"]) == ("hgx01", [0, 1])
    assert (len(host["gpus"]), len(host["nics"])) == (8, 4)
    assert result["assumed"] == result["warnings"] == []
    text = epplan("topo", "show", "hgx-h100-4nic-4", cwd=tmp_path).stdout
    assert "NV18" in text
    assert "rail4" in text


def test_limit_writes_the_plan_and_exits_4(tmp_path: Path) -> None:
    done = epplan(
        *("solve", "--topology", "hgx-h200-2", "--model", "deepseek-v3", "--layers", "4"),
        *("--experts-per-gpu", "16", "--load", "lognormal:1,1", "--gap", "0"),
        *("--time-limit", "0.5", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 4
    result = json.loads(done.stdout)
    assert result["status"] == "limit"
    assert result["gap"] > 0
    assert (tmp_path / "plan.json").exists()


def test_groups_write_a_plan_each(tmp_path: Path) -> None:
    groups = ("--topology", "oversubscribed-leaf-4", "--ep", "8", "--experts", "8", "--groups", "3")
    done = epplan(*SOLVE, *groups, "-o", "p.json", "--json", cwd=tmp_path)
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert [group["plan"] for group in result["groups"]] == ["p.0.json", "p.1.json", "p.2.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.0.json", "p.1.json", "p.2.json"]
    slowest = result["groups"][result["slowest"]]
    assert result["objective_s"] == slowest["objective_s"]
    assert result["objective_s"] == max(group["objective_s"] for group in result["groups"])
    for group in result["groups"]:
        assert 0 < group["choice_bound_s"] <= group["objective_s"]
        plan = json.loads((tmp_path / group["plan"]).read_text())
        assert plan["sha256"] == group["sha256"]
        assert list(dict.fromkeys(rank["host"] for rank in plan["ranks"])) == group["hosts"]
        assert "all 3 groups have the same traffic at the same time" in plan["assumptions"]
    hosts = [host for group in result["groups"] for host in group["hosts"]]
    assert len(hosts) == len(set(hosts)) == 3
    table = epplan(*SOLVE, *groups, cwd=tmp_path)
    assert "3 groups, EP=8; the slowest is group" in table.stdout
    assert "plan.2.json" in table.stderr


def test_choice_of_gpus_is_certified(tmp_path: Path) -> None:
    larger = (*SOLVE, "--topology", "oversubscribed-leaf-4")
    result = json.loads(epplan(*larger, "--json", cwd=tmp_path).stdout)
    assert 0 < result["choice_bound_s"] <= result["objective_s"]
    assert result["choice_gap"] == pytest.approx(
        1 - result["choice_bound_s"] / result["objective_s"], abs=1e-9
    )
    shown = epplan("explain", "plan.json", cwd=tmp_path).stdout
    assert "bound, any GPUs" in shown
    assert "EP=16: 16 of 32 GPUs, " in shown
    whole = json.loads(epplan(*SOLVE, "--json", cwd=tmp_path).stdout)
    assert (whole["choice_bound_s"], whole["choice_gap"]) == (None, None)


def test_infeasible_exits_3_and_writes_nothing(tmp_path: Path) -> None:
    done = epplan(*SOLVE, "--experts", "32", "--json", cwd=tmp_path)
    assert done.returncode == 3
    result = json.loads(done.stdout)
    assert (result["status"], result["plan"], result["objective_s"]) == ("infeasible", None, None)
    assert done.stderr.startswith("error: 32 experts a layer do not fit on 16 GPUs")
    assert list(tmp_path.iterdir()) == []


def counts(folder: Path, shape: tuple[int, ...]) -> str:
    np.savez(folder / "counts.npz", counts=np.ones(shape, dtype=np.int64))
    return str(folder / "counts.npz")


BAD: list[tuple[tuple[str, ...], int, str]] = [
    (("solve", "--topology", "nope", "--model", "reference"), 2, "unknown topology: nope"),
    (("solve", "--topology", "cpu-16", "--model", "nope"), 2, "unknown model: nope"),
    (("solve", "--topology", "cpu-16"), 2, "Missing option '--model'"),
    (("solve", "--topology", "cpu-16", "--model", "reference"), 3, "fits on no GPU"),
    ((*SOLVE, "--ep", "17"), 2, "EP=17 needs 17 GPUs, dgx-h100-2 has 16"),
    ((*SOLVE, "--groups", "3", "--ep", "8"), 2, "3 groups of EP=8 need 24 GPUs"),
    ((*SOLVE, "--gap", "2"), 2, "Invalid value for '--gap'"),
    ((*SOLVE, "-o", "no/where.json"), 2, "folder no does not exist"),
    ((*SOLVE, "--load", "zipf:a"), 2, "load zipf:a is not valid"),
    (("explain", "nothing.json"), 2, "plan not found: nothing.json"),
    (("launch", "nothing.json", "--to", "local"), 2, "plan not found: nothing.json"),
    (("topo", "show", "nope"), 2, "unknown topology: nope"),
    (("frobnicate",), 2, "No such command 'frobnicate'"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = epplan(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_counts_file_for_another_model(tmp_path: Path) -> None:
    done = epplan(*SOLVE[:-1], counts(tmp_path, (1, 3, 2, 16)), cwd=tmp_path)
    assert done.returncode == 2
    assert "3 layers, but model reference has 4 MoE layers" in done.stderr
    assert "2 source ranks; the EP group has 16 (1 also fits)" in done.stderr


def test_unwritable_output_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    done = epplan(*SOLVE, cwd=tmp_path)
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


SOLVED_IN_PROCESSES = "--topology hgx-h200-2 --model deepseek-v3 --experts-per-gpu 16"
SOLVED_HERE = "--topology hgx-h100-4nic-4 --model qwen3-235b-a22b --layers 2 --experts-per-gpu 5"


@pytest.mark.parametrize(
    "problem", [pytest.param(SOLVED_IN_PROCESSES, marks=pytest.mark.slow), SOLVED_HERE]
)
def test_interrupt_exits_130_and_keeps_the_best_plan(tmp_path: Path, problem: str) -> None:
    command = [sys.executable, "-m", "epplan", "solve", *problem.split(), "--gap", "0"]
    command += ["--load", "lognormal:1,1"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--json"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    time.sleep(8)  # inside the solver
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    result = json.loads(stdout)
    assert result["status"] == "limit"
    assert 0 < result["gap"] < 1
    shown = json.loads(epplan("explain", "plan.json", "--json", cwd=tmp_path).stdout)
    assert "stopped by Ctrl-C" in shown["reasons"]
