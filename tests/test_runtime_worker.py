"""The worker as a launcher starts it: environment, exit codes, messages, result file."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epplan.launcher.targets.local import free_port
from epplan.planner.model import ModelSpec
from epplan.planner.plan import write_plan
from epplan.planner.traffic import make_traffic
from epplan.runtime import worker
from epplan.runtime.worker import main
from tests.fork_ranks import fork_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

RANKS = 4
SPEC: ModelSpec = REFERENCE.with_overrides(experts=RANKS, layers=2)
Ended = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(path, make_plan(SPEC, RANKS))
    return path


def start(rank: int, variables: dict[str, str], arguments: list[list[str]]) -> Ended:
    """Be one rank; `arguments` holds every rank's."""
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(arguments[rank])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return code, stdout.getvalue(), stderr.getvalue()


def launch(*arguments: str | int | Path, world_size: int = RANKS) -> list[Ended]:
    return launch_each([list(map(str, arguments))] * RANKS, world_size)


def launch_each(arguments: list[list[str]], world_size: int = RANKS) -> list[Ended]:
    variables = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    anywhere = [["--no-identity", *own] for own in arguments]  # the plan names other hosts
    return fork_ranks(start, RANKS, variables, anywhere)


def test_result(plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    ended = launch(
        plan, "--backend", "gloo", "--sequences", 3, "--sequence-length", 8, "--result", path
    )
    assert [code for code, _, _ in ended] == [0] * RANKS
    assert [(stdout, stderr) for _, stdout, stderr in ended[1:]] == [("", "")] * (RANKS - 1)
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["ranks"] == RANKS
    assert result["backend"] == "gloo"
    assert result["backend_reason"] == "asked for"
    assert result["dtype"] == "float32"
    assert result["notes"] == [
        "computed in float32, not in the plan's float16: half-precision matrix products can be 65 "
        "to 150 times slower on a CPU",
        "routers have seeded random weights: the load is theirs, not the plan's traffic",
    ]
    assert result["tokens_per_step"] == RANKS * 3 * 8
    assert result["tokens_per_s"] == pytest.approx(RANKS * 3 * 8 / result["step_s"])
    assert result["verified"] is True
    assert 0 <= result["max_abs_error"] <= result["tolerance"]
    assert [sum(layer) for layer in result["expert_load"]] == [RANKS * 3 * 8] * 2
    assert set(result["phases"]) == {"attention", "route", "dispatch", "experts", "combine"}
    assert f"{result['tokens_per_s']:,.0f} tokens/s" in ended[0][1]


def test_no_verify(plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    ended = launch(plan, "--no-verify", "--result", path)
    assert [code for code, _, _ in ended] == [0] * RANKS
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["verified"] is result["max_abs_error"] is result["tolerance"] is None
    assert "not verified against the dense model (--no-verify)" in ended[0][1]


def test_a_wrong_run_fails_with_its_result_written(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epplan.runtime.layer.experts.mlp", lambda rows, weights: rows * 0)
    path = tmp_path / "result.json"
    ended = launch(plan, "--result", path)
    assert [code for code, _, _ in ended] == [1, 0, 0, 0]
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["verified"] is False
    assert "NOT VERIFIED against the dense model" in ended[0][1]
    lines = ended[0][2].splitlines()
    assert lines[0] == "error: the distributed run differs from the dense model"
    assert lines[1] == f"  - {result['problems'][0]}"


def test_counts_of_skewed_routers_are_traffic_for_the_planner(plan: Path, tmp_path: Path) -> None:
    counts, result = tmp_path / "counts.npz", tmp_path / "result.json"
    common = ["--sequence-length=32", "--steps=2", f"--result={result}", f"--counts={counts}"]
    popularity = []
    for skew in (0.0, 3.0):
        ended = launch(plan, *common, f"--router-skew={skew}")
        assert [code for code, _, _ in ended] == [0] * RANKS, ended
        traffic = make_traffic(str(counts), SPEC, RANKS, None, 0)
        assert traffic.windows == 2
        assert traffic.tokens_per_rank == 2 * 32
        load = json.loads(result.read_text())["expert_load"]
        assert traffic.counts[-1].sum(axis=1).tolist() == load
        popularity.append(max(max(layer) / sum(layer) for layer in load))
    assert popularity[1] > popularity[0] + 0.2


def test_plan_for_another_world_size(plan: Path) -> None:
    for code, stdout, stderr in launch(plan, world_size=8):
        assert code == 2
        assert stdout == ""
        assert stderr == (
            f"error: plan {plan} is for 4 ranks, WORLD_SIZE is 8\n"
            "hint: start 4 ranks, or make a plan for 8 with `epplan solve`\n"
        )


def test_ranks_with_different_plans(plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    write_plan(other, make_plan(SPEC, RANKS, seed=1))
    for code, _, stderr in launch_each([[str(plan)], [str(plan)], [str(other)], [str(plan)]]):
        assert code == 2
        first, of_rank_0, of_rank_2 = stderr.splitlines()
        assert first == "error: ranks were started with different plans or options"
        assert of_rank_0.startswith("  - rank 0: plan ")
        assert of_rank_2.startswith("  - rank 2: plan ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"},
            "error: not started as a rank: LOCAL_RANK, MASTER_PORT not set in the environment\n"
            "hint: start the ranks with `epplan launch PLAN`, or with torchrun\n",
        ),
        (
            {
                "RANK": "first",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "-4",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "29500",
            },
            "error: the environment of this rank is not valid\n"
            "  - RANK is 'first', not a whole number\n"
            "  - WORLD_SIZE is '-4', not a whole number\n",
        ),
        (
            {
                "RANK": "4",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "4",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "29500",
            },
            "error: the environment of this rank is not valid\n  - RANK is 4, WORLD_SIZE is 4\n",
        ),
    ],
)
def test_bad_environment(
    variables: dict[str, str],
    message: str,
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    with pytest.raises(SystemExit) as end:
        main([str(plan)])
    assert end.value.code == 2
    assert capsys.readouterr().err == message


def test_nccl_without_enough_gpus(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    monkeypatch.setattr(os, "environ", variables | {"MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(SystemExit) as end:
        main([str(plan), "--backend", "nccl"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: backend nccl needs a GPU for every rank: 2 visible CUDA GPUs for 4 ranks on this "
        "machine\n"
        "hint: take --backend gloo, which computes on the CPU\n"
    )


def test_import_starts_nothing() -> None:
    program = (
        "import threading, epplan.runtime.worker, sys, torch\n"
        "assert threading.active_count() == 1\n"
        "assert not torch.cuda.is_initialized()\n"
        "unwanted = {'pulp', 'networkx', 'scipy', 'highspy'} & set(sys.modules)\n"
        "assert not unwanted, unwanted\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (REFERENCE, "float16"),
        (MIXTRAL, "bfloat16"),
        (QWEN, "float16"),
        (DEEPSEEK, "bfloat16"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_gpu_equals_the_dense_model(spec: ModelSpec, dtype: str, tmp_path: Path) -> None:
    """One rank over NCCL; a process of its own, because CUDA does not survive a fork."""
    path, result_path = tmp_path / "plan.json", tmp_path / "result.json"
    wide = spec.with_overrides(scale=8.0).model_copy(update={"dtype": dtype})
    write_plan(path, make_plan(wide, 1, slots_per_rank=spec.num_experts, num_hosts=1))
    command = [sys.executable, "-m", worker.__name__, str(path), "--no-identity"]
    command += ["--result", str(result_path)]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ended = subprocess.run(
        [*command, "--sequence-length", "200"],
        env={**os.environ, **variables, "MASTER_PORT": "29511"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(result_path.read_text())
    assert result["verified"] is True
    assert result["backend"] == "nccl"
    assert result["dtype"] == dtype
