"""Load, balance and the printed summary, from counts small enough to check by hand."""

import torch

from epplan.planner.model import ModelSpec
from epplan.runtime.monitor import measure_load
from epplan.runtime.result import PhaseTime, Result, summary_lines
from tests.runtime_cases import REFERENCE, make_plan

SPEC: ModelSpec = REFERENCE.with_overrides(layers=1, experts=4)
PLAN = make_plan(SPEC, 4).model_copy(update={"expert_of_slot": ((2, 0, 3, 1),)})
# Rows from rank (line) to slot (column); ranks 0, 1 are on node0 and 2, 3 on node1.
COUNTS = torch.tensor([[1, 2, 1, 0], [4, 0, 0, 0], [3, 0, 1, 0], [0, 2, 2, 0]]).view(1, 4, 4, 1)


def test_load_from_counts() -> None:
    load = measure_load(PLAN, COUNTS)
    assert load.rank_load == [[8, 4, 4, 0]]
    assert load.expert_load == [[4, 0, 8, 4]]
    (balance,) = load.balance
    assert balance.layer == 0
    assert balance.max_over_mean == 2.0
    assert balance.jain == 16**2 / (4 * (64 + 16 + 16))
    assert balance.idle_experts == (1,)
    assert balance.cross_host_share == (1 + 3 + 2) / 16


def test_summary() -> None:
    load = measure_load(PLAN, COUNTS)
    result = Result(
        plan_sha256="0",
        model=SPEC.name,
        ranks=4,
        backend="gloo",
        backend_reason="0 visible CUDA GPUs for 4 ranks on this machine",
        device="cpu",
        dtype="float32",
        dispatcher="alltoall",
        dispatcher_reason="rows travel without padding",
        micro_batches=1,
        micro_batches_reason="asked for",
        seed=0,
        sequences=1,
        sequence_length=4,
        steps=3,
        tokens_per_step=16,
        tokens_per_s=3200.0,
        step_s=0.005,
        phases={
            "attention": PhaseTime(mean_s=0.001, max_s=0.002),
            "experts": PhaseTime(mean_s=0.003, max_s=0.004),
        },
        max_abs_error=2.4e-7,
        tolerance=4.1e-4,
        verified=True,
        problems=(),
        routing_ties=0,
        expert_load=load.expert_load,
        rank_load=load.rank_load,
        balance=load.balance,
        notes=("computed in float32",),
    )
    assert "\n".join(summary_lines(result, PLAN)) == (
        "4 ranks, gloo (0 visible CUDA GPUs for 4 ranks on this machine)\n"
        "computed on cpu in float32\n"
        "dispatcher alltoall (rows travel without padding)\n"
        "1 micro-batch (asked for)\n"
        "3,200 tokens/s: 16 tokens a step, 5.0 ms (median of 3)\n"
        "mean ms by phase: attention 1.0, experts 3.0\n"
        "verified against the dense model: largest difference 2.4e-07, tolerance 0.00041, "
        "0 routing ties\n"
        "note: computed in float32\n"
        "\n"
        "layer  rank max/mean  Jain   across hosts  idle  busiest experts (rows)\n"
        "    0           2.00  0.667         37.5%     1  2 (8), 0 (4), 3 (4)\n"
        "\n"
        "rank  host   rows of a step  of mean\n"
        "   0  node0               8     2.00\n"
        "   1  node0               4     1.00\n"
        "   2  node1               4     1.00\n"
        "   3  node1               0     0.00"
    )
