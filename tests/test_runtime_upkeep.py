"""Balancing a real model between its steps: outputs stay, or change only where that is said."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from epplan.errors import EpplanError, PeerError
from epplan.launcher.targets.local import free_port
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan, write_plan
from epplan.runtime.balancing.monitor import measure_load
from epplan.runtime.balancing.upkeep import Upkeep
from epplan.runtime.build import build_model
from epplan.runtime.checks.verify import verify
from epplan.runtime.environment import Setting
from epplan.runtime.layer.layers import MoeWeights
from epplan.runtime.measure import run_rank
from epplan.runtime.model import ExpertParallelModel
from epplan.runtime.options import Options
from epplan.runtime.result import Result
from epplan.runtime.schedule import choose
from epplan.runtime.source import Source, open_source
from tests.fork_ranks import RankError, run_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

OPTIONS = Options(
    backend="gloo",
    sequences=3,
    sequence_length=8,
    steps=3,
    seed=1,
    verify=True,
    window=2,
    dispatcher="alltoall",
)
SETTING = Setting(
    backend="gloo",
    backend_reason="asked for",
    device=torch.device("cpu"),
    dtype=torch.float32,
    notes=(),
)


def run(rank: int, plan: Plan, options: Options) -> Result | None:
    return run_rank(plan, options, SETTING, rank)


def result_of(plan: Plan, options: Options) -> Result:
    result: Result | None = run_ranks(run, plan.world_size, plan, options)[0]
    assert result is not None
    return result


def built(plan: Plan, options: Options, rank: int) -> tuple[ExpertParallelModel, Source]:
    source = open_source(
        plan.model,
        SETTING,
        checkpoint=None,
        prompt=(),
        seed=options.seed,
        sequences=options.sequences,
        positions=options.positions,
        rank=rank,
    )
    choice = choose(plan, options, SETTING.device)
    return build_model(plan, options, choice, source.weights, rank), source


def move(rank: int, plan: Plan, options: Options) -> tuple[float, float, float, int, list[str]]:
    """Run until experts have moved.

    Returns:
        Largest difference of any step to the first, the least even layer's max/mean before and
        after, experts moved, and what the dense model finds wrong (rank 0).
    """
    model, source = built(plan, options, rank)
    x_BSH = source.hidden(rank)
    said: list[str] = []
    deadline, difference = time.monotonic() + 50, 0.0
    first = model.forward(x_BSH)
    before = worst(plan, first.counts_LWWP)

    def at(place: str, *, limited: bool = True) -> None:
        said.append(place)

    with Upkeep(plan, options, model, source.weights, at) as upkeep, upkeep.balancing():
        while not upkeep.progress.rebalances:
            assert time.monotonic() < deadline, "nothing has moved"
            upkeep.before_step()
            step = model.forward(x_BSH)
            difference = max(difference, float((step.hidden_BSH - first.hidden_BSH).abs().max()))
            upkeep.after_step(step, 0.01)
            dist.barrier()
        step = model.forward(x_BSH)
        difference = max(difference, float((step.hidden_BSH - first.hidden_BSH).abs().max()))
        after = worst(upkeep.plan, step.counts_LWWP)
        upkeep.finish()
        verification = verify(step, upkeep.plan, model.layers, source, rank)
    assert "step 1, layer 1" in said
    problems = list(verification.problems) if verification else []
    return difference, before, after, upkeep.progress.moved_experts, problems


def worst(plan: Plan, counts_LWWP: torch.Tensor) -> float:
    return max(balance.max_over_mean for balance in measure_load(plan, counts_LWWP).balance)


@pytest.mark.parametrize(
    ("model", "ranks", "per_rank", "micro_batches"),
    [pytest.param(QWEN, 4, 4, 1, marks=pytest.mark.slow), (DEEPSEEK, 4, 8, 2)],
)
def test_experts_move_and_outputs_stay_bit_by_bit(
    model: ModelSpec, ranks: int, per_rank: int, micro_batches: int
) -> None:
    options = replace(OPTIONS, rebalance_drift=0.2, micro_batches=micro_batches)
    plan = make_plan(model, ranks, slots_per_rank=per_rank, seed=3)
    outcomes = run_ranks(move, ranks, plan, options)
    for difference, before, after, moved, problems in outcomes:
        assert difference == 0.0
        assert after < before
        assert moved > 0
        assert problems == []


def test_replicas_take_other_shares_and_outputs_stay_within_rounding() -> None:
    """Copies share rows differently afterwards, so that products have other shapes."""
    options = replace(OPTIONS, rebalance_drift=0.2)
    plan = make_plan(MIXTRAL, 4, slots_per_rank=3, copies=3, seed=2)
    for difference, before, after, _, problems in run_ranks(move, 4, plan, options):
        assert difference < 1e-4
        assert after < before
        assert problems == []


def test_gating_bias_evens_out_ranks_and_says_that_it_changes_outputs() -> None:
    plan = make_plan(DEEPSEEK, 4, slots_per_rank=8)
    options = replace(OPTIONS, steps=60, gating_bias=0.01)
    plain, biased = result_of(plan, OPTIONS), result_of(plan, options)
    assert plain.output_changes == ()
    assert [change.split(",")[0] for change in biased.output_changes] == ["gating bias"]
    for without, balanced in zip(plain.expert_load, biased.expert_load, strict=True):
        assert max(balanced) < max(without)
    assert biased.verified is True  # of a step without it


def test_rows_beyond_the_capacity_are_dropped_and_that_is_said() -> None:
    plan = make_plan(MIXTRAL, 4, slots_per_rank=2)
    result = result_of(plan, replace(OPTIONS, drop_beyond=1.0))
    limit = 4 * (3 * 8 * 2 // 8)  # rows of four source ranks
    assert max(max(layer) for layer in result.expert_load) <= limit
    kept = sum(map(sum, result.expert_load))
    rows = 2 * 4 * 24 * 2  # layers, ranks, tokens, choices
    assert result.dropped_rows == OPTIONS.steps * (rows - kept) > 0
    assert result.output_changes[0].startswith("capacity 1: ")
    assert result.verified is True  # of a step without it


def test_a_capacity_that_nobody_reaches_changes_nothing() -> None:
    plan = make_plan(QWEN, 4, slots_per_rank=4)
    outputs = [
        run_ranks(one_step, 4, plan, replace(OPTIONS, drop_beyond=factor))
        for factor in (None, 16.0)
    ]
    for without, within in zip(*outputs, strict=True):
        torch.testing.assert_close(within, without, atol=1e-6, rtol=1e-5)


def one_step(rank: int, plan: Plan, options: Options) -> torch.Tensor:
    model, source = built(plan, options, rank)
    with (
        Upkeep(plan, options, model, source.weights, lambda place, **_: None) as upkeep,
        upkeep.balancing(),
    ):
        return model.forward(source.hidden(rank)).hidden_BSH


def poisoned(rank: int, plan: Plan, bad: int, where: str) -> tuple[str, bool]:
    """Return what a rank says about a NaN, and whether it takes the blame."""
    model, source = built(plan, OPTIONS, rank)
    x_BSH = source.hidden(rank)
    if rank == bad and where == "expert":
        feed_forward = model.layers[plan.model.moe_layers[1]].feed_forward
        assert isinstance(feed_forward, MoeWeights)
        expert = feed_forward.experts[-1]
        assert expert is not None
        expert.down_HF[0, 0] = float("nan")
    if rank == bad and where == "input":
        x_BSH[1, 3, 2] = float("inf")
    with Upkeep(plan, OPTIONS, model, source.weights, lambda place, **_: None) as upkeep:
        step = model.forward(x_BSH)
        message, is_own = "", False
        try:
            upkeep.after_step(step, 0.01)
        except EpplanError as error:
            message, is_own = error.message, not isinstance(error, PeerError)
    return message, is_own


def test_a_bad_expert_is_named_on_all_ranks() -> None:
    """Its rows spoil tokens of every rank a layer later; the first place is what counts."""
    plan = make_plan(QWEN.with_overrides(layers=2), 4, slots_per_rank=4)
    expert = plan.expert_of_slot[1][2 * 4 + 3]
    message = f"rank 2: outputs of expert {expert} of layer 1 are not finite"
    assert run_ranks(poisoned, 4, plan, 2, "expert") == [(message, rank == 2) for rank in range(4)]


def test_a_bad_input_is_named() -> None:
    plan = make_plan(MIXTRAL, 4, slots_per_rank=2)
    message = "rank 1: hidden states after attention of layer 0 are not finite"
    assert run_ranks(poisoned, 4, plan, 1, "input") == [(message, rank == 1) for rank in range(4)]


def test_windows_are_written_and_told(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    result = result_of(make_plan(REFERENCE, 16), replace(OPTIONS, steps=5, metrics=path))
    assert len(path.read_text().splitlines()) == 3  # two windows and what was left
    assert result.waits is not None
    assert len(result.waits.seconds["dispatch"]) == 4
    assert sum(result.waits.last_share) == pytest.approx(1.0)


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path: Path) -> None:
    options = replace(OPTIONS, metrics=tmp_path / "missing" / "file")
    with pytest.raises(RankError, match=r"InputError: --metrics .* cannot be written"):
        result_of(make_plan(MIXTRAL, 4, slots_per_rank=2), options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "options",
    [
        ["--dispatcher=alltoall", "--gating-bias=0.001", "--drop-beyond=1"],
        ["--dispatcher=padded", "--micro-batches=2", "--drop-beyond=1"],
        ["--dispatcher=padded", "--gating-bias=0.001"],
        ["--dispatcher=alltoall", "--rebalance-drift=0.1"],
    ],
)
def test_upkeep_on_a_gpu(tmp_path: Path, options: list[str]) -> None:
    """One rank and NCCL: nothing is on the wrong device, and the windows are written."""
    plan, windows, result = (tmp_path / name for name in ("plan", "windows", "result"))
    write_plan(plan, make_plan(QWEN, 1, slots_per_rank=16, num_hosts=1))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "epplan.runtime.worker", str(plan), "--backend=nccl"),
            *("--no-identity", "--steps=12", f"--metrics={windows}", f"--result={result}"),
            *options,
        ],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())["verified"] is True
    assert len(windows.read_text().splitlines()) == 2
