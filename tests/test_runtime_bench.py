"""`epplan bench` on real ranks, and its counts against torch's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from epplan.planner.model import ModelSpec
from epplan.planner.plan import write_plan
from epplan.runtime.clock import PhaseClock
from epplan.runtime.dispatchers.one_rank import OneRank
from epplan.runtime.layer.filled_cache import filled_cache
from epplan.runtime.layer.layers import build_layers
from epplan.runtime.model import ExpertParallelModel
from epplan.runtime.pipeline import NO_TURNS, Schedule
from epplan.runtime.timing.bench_result import RankRun, phase_result
from epplan.runtime.timing.workload import cache_bytes, step_flops, tensor_bytes
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.runtime_cases import MIXTRAL, QWEN, REFERENCE, make_plan

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(path, make_plan(REFERENCE, 4, slots_per_rank=4))
    return path


def bench(plan: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "epplan", "bench", str(plan), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def result_of(plan: Path, *options: str) -> dict[str, Any]:
    done = bench(plan, "--json", "--steps=2", "--sequence-length=8", "--context=5", *options)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_plan_is_timed_in_both_phases(plan: Path) -> None:
    result = result_of(plan, "--sequences=3")
    assert (result["layout"], result["ranks"], result["backend"]) == ("ep4", 4, "gloo")
    prefill, decode = result["phases"]
    assert (prefill["phase"], prefill["tokens_per_step"], prefill["tpot_s"]) == (
        "prefill",
        4 * 3 * 8,
        None,
    )
    assert (decode["phase"], decode["tokens_per_step"], decode["context"]) == ("decode", 12, 5)
    assert decode["tpot_s"] == decode["step_s"] > 0
    assert decode["tokens_per_s"] == pytest.approx(12 / decode["step_s"])
    for phase in result["phases"]:
        assert {"attention", "route", "dispatch", "experts", "combine"} <= set(phase["parts"])
        assert 0 < phase["gemm_share"] < 1
        assert 0 < phase["copy_share"] < 1


def test_the_baseline_is_timed_with_the_same_sequences(plan: Path) -> None:
    result = result_of(plan, "--sequences=2", "--baseline=tp2pp2", "--phase=decode")
    assert result["layout"] == "tp2pp2"
    assert result["how"] == "decode in 2 micro-batches, two in flight"
    (decode,) = result["phases"]
    assert decode["tokens_per_step"] == 8
    assert {"attention", "all_reduce", "transfer", "experts"} <= set(decode["parts"])


def test_one_rank_is_timed_without_others(plan: Path) -> None:
    done = bench(plan, "--one-rank=3", "--steps=1", "--phase=decode", "--context=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rank 3 of ep4 of reference-tiny: no transfers\n1 ranks, none")
    assert "note: one rank alone: transfers are excluded" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--baseline=tp4pp2"],
            "tp4pp2 is for 8 ranks, there are 4",
        ),
        (
            ["--baseline=8x2"],
            "Invalid value for '--baseline': '8x2' is not of the form tp8pp2",
        ),
        (
            ["--baseline=tp2pp2", "--one-rank=0"],
            "--one-rank times a rank of the plan, not of the baseline",
        ),
        (["--one-rank=4"], "--one-rank is 4, the plan has ranks 0 to 3"),
    ],
)
def test_what_cannot_be_timed_is_refused(plan: Path, options: list[str], message: str) -> None:
    done = bench(plan, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spec", [REFERENCE, MIXTRAL, QWEN], ids=lambda spec: spec.name)
def test_flops_are_those_torch_counts(spec: ModelSpec) -> None:
    sequences, context = 3, 6
    weights = SeededWeights(spec=spec, seed=0, device=CPU, dtype=torch.float32)
    layers = build_layers(
        make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1), 0, weights
    )
    schedule = Schedule(micro_batches=1, in_flight=1, turns=NO_TURNS, reason="test")
    model = ExpertParallelModel(spec, layers, OneRank(), schedule, PhaseClock(CPU))
    cache = filled_cache(
        spec.attention,
        num_layers=spec.num_layers,
        sequences=sequences,
        context=context,
        device=CPU,
        dtype=torch.float32,
    )
    shape = (sequences, 1, spec.hidden_size)
    x_B1H = seeded_hidden(0, 0, shape, device=CPU, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.run(x_B1H, model.dispatcher, caches=[cache])
    routers = 2 * sequences * spec.hidden_size * spec.num_experts * spec.num_moe_layers
    expected = counter.get_total_flops() - routers
    assert step_flops(spec, sequences, 1, context) == expected


def test_bytes_are_those_of_tensors() -> None:
    spec = REFERENCE
    weights = SeededWeights(spec=spec, seed=0, device=CPU, dtype=torch.float16)
    layers = build_layers(make_plan(spec, 16), 2, weights)
    routers = spec.num_layers * spec.num_experts * spec.hidden_size
    experts = spec.num_layers * spec.expert_bytes
    # Routers are float32 here, and 2 bytes in the spec; tables of slots are small.
    least = experts + spec.replicated_bytes + 2 * routers
    assert least <= tensor_bytes(layers) < least + 4096
    cache = filled_cache(
        spec.attention, num_layers=4, sequences=3, context=5, device=CPU, dtype=torch.float16
    )
    held = cache.update(0, torch.empty(3, 4, 0, 8), torch.empty(3, 4, 0, 8))
    assert 4 * tensor_bytes(held) == cache_bytes(spec, 3, 5)


def test_the_slowest_rank_sets_the_step() -> None:
    runs = [
        RankRun(
            steps_s=steps,
            parts_s=[{"attention": 1.0, "experts": part} for part in parts],
            transfers_s=[[("dispatch", part), ("dispatch", 5 - part)] for part in parts],
            bytes_read=100,
            flop_per_s=1000.0,
            bytes_per_s=500.0,
        )
        for steps, parts in [([1.0, 5.0, 2.0], [1.0, 2.0, 9.0]), ([3.0, 2.0, 2.0], [4.0, 4.0, 4.0])]
    ]
    result = phase_result(
        "decode", runs, sequences=8, positions=1, context=3, flops=600.0, graph=True
    )
    assert result.step_s == 3.0  # of 3, 5 and 2
    assert result.step_min_s == 2.0
    assert result.tokens_per_s == pytest.approx(8 / 3)
    assert result.parts["experts"].mean_s == 3.0
    assert result.parts["experts"].max_s == 4.0
    # Steps take 1 + 1, 2 + 1 and 4 - 4: in each transfer one rank waited for the other.
    assert result.transfers == {"dispatch": 2.0}
    assert result.gemm_share == pytest.approx(300 / 3 / 1000)
    assert result.copy_share == pytest.approx(100 / 3 / 500)
