"""Load, balance and the printed summary, from counts small enough to check by hand."""

import time

import pytest
import torch
import torch.distributed as dist

from epplan.planner.model import ModelSpec
from epplan.runtime.balancing.monitor import Monitor, drift, measure_load
from epplan.runtime.balancing.waits import STAGES, Key, WaitLog, Waits, find_waits
from epplan.runtime.clock import PhaseClock, Place
from epplan.runtime.result import PhaseTime, Result, summary_lines
from tests.fork_ranks import run_ranks
from tests.plans import bare_plan
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


def test_rows_are_added_up_by_expert_across_slot_tables() -> None:
    """A window may span a change of the slot table."""
    moved = PLAN.model_copy(update={"expert_of_slot": ((0, 1, 2, 3),)})
    monitor = Monitor(window=2)
    assert not monitor.after_step(PLAN, COUNTS, 0.25)
    assert monitor.after_step(moved, COUNTS, 0.5)
    window, counts_LWE = monitor.close_window(moved)
    assert (window.step, window.steps, window.seconds) == (2, 2, 0.75)
    assert window.load.expert_load == [[4 + 8, 0 + 4, 8 + 4, 4 + 0]]
    assert window.load.rank_load == [[16, 8, 8, 0]]
    assert counts_LWE[0, 0].tolist() == [2 + 1, 0 + 2, 1 + 1, 1 + 0]  # of rank 0
    assert window.load.balance[0].cross_host_share == (1 + 3 + 2) / 16


def test_replicas_and_empty_slots() -> None:
    plan = bare_plan(SPEC, [("a", 0), ("b", 0)], [(0, 1, 2, 2, 3, None)], [(1, 1, 0.5, 0.5, 1, 0)])
    counts_LWWP = torch.tensor([[[1, 2, 3], [4, 5, 0]], [[6, 7, 8], [9, 1, 0]]])[None]
    load = measure_load(plan, counts_LWWP)
    assert load.expert_load == [[7, 9, 3 + 4 + 8 + 9, 6]]
    assert load.rank_load == [[27, 19]]
    assert load.balance[0].cross_host_share == (4 + 5 + 6 + 7 + 8) / 46


def test_a_layer_without_rows_is_even() -> None:
    (balance,) = measure_load(PLAN, torch.zeros_like(COUNTS)).balance
    assert (balance.max_over_mean, balance.jain, balance.cross_host_share) == (1.0, 1.0, 0.0)
    assert balance.idle_experts == (0, 1, 2, 3)


def test_drift_is_the_share_of_rows_that_changed_experts() -> None:
    mix = torch.tensor([[8, 0, 0], [5, 5, 0], [0, 0, 0], [1, 2, 3]])
    reference = torch.tensor([[0, 0, 3], [10, 0, 0], [1, 2, 3], [10, 20, 30]])
    assert drift(mix, reference) == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_drift_is_unknown_until_there_is_something_to_compare_with() -> None:
    monitor = Monitor(window=1)
    monitor.after_step(PLAN, COUNTS, 1.0)
    window, counts_LWE = monitor.close_window(PLAN)
    assert window.drift == (None,)
    monitor.compare_with(counts_LWE)
    monitor.after_step(PLAN, COUNTS.flip(2), 1.0)  # experts 1, 3, 0, 2 get what 2, 0, 3, 1 got
    window, _ = monitor.close_window(PLAN)
    assert window.drift == pytest.approx(((8 - 0 + 4 - 4 + 4 - 4 + 8 - 0) / 2 / 16,))


SECONDS_CW = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.4, 0.9], [0.7, 0.2, 0.2]])
KEYS: list[Key] = [(0, 0, 3, "dispatch"), (0, 0, 5, "dispatch"), (0, 0, 3, "combine")]


def test_waits_are_what_exceeds_the_rank_that_came_last() -> None:
    waits = find_waits(KEYS, SECONDS_CW, (3, 5))
    assert waits.seconds["dispatch"][0] == pytest.approx([0, 0.4, 0.2])
    assert waits.seconds["dispatch"][1] == pytest.approx([0, 0.2, 0.7])
    assert waits.seconds["combine"][0] == pytest.approx([0.5, 0, 0])
    assert waits.seconds["combine"][1] == [0, 0, 0]
    assert waits.last_share == pytest.approx([2 / 3, 1 / 3, 0])
    assert waits.straggler == 0


def test_no_straggler_among_equals() -> None:
    seconds_CW = torch.eye(4).repeat(3, 1).double()
    waits = find_waits([(0, 0, 0, "dispatch")] * 12, 1 - seconds_CW, (0,))
    assert waits.last_share == [0.25] * 4
    assert waits.straggler is None
    assert find_waits([], torch.zeros(0, 4), (0,)).straggler is None


def late(rank: int, straggler: int) -> Waits:
    clock, log = PhaseClock(torch.device("cpu")), WaitLog((1,), 4)
    for _ in range(3):
        clock.start()
        for micro_batch in range(2):
            place = Place(1, micro_batch)
            for stage in STAGES:
                if rank == straggler:
                    time.sleep(0.02)
                clock.mark("experts", place)
                dist.all_reduce(torch.ones(1))
                clock.mark(stage, place)
        log.after_step(clock.spans())
    return log.gather()


def test_the_rank_that_never_waits_is_the_straggler() -> None:
    for waits in run_ranks(late, 4, 2):
        assert waits.straggler == 2
        for stage in STAGES:
            waited = waits.seconds[stage][0]
            assert waited[2] == min(waited)
            assert all(waited[rank] > 3 * 2 * 0.01 for rank in (0, 1, 3))
