"""Placement by topology levels: cells, relaxations that bound, scale, processes."""

import os
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import EpplanError
from epplan.planner.placement.processes import run_in_processes
from epplan.planner.placement.program import sparse_row
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.terms import cell_terms
from epplan.planner.problem import Replication
from epplan.planner.solve import Solution, solve_placement
from epplan.planner.traffic import Floats
from epplan.topologies.sources import load_cluster
from tests.tiny import brute_force, price, random_counts, tiny_cluster, tiny_problem


def solve(counts: Floats, *, gap: float = 0.01, limit_s: float = 60, **options: object) -> Solution:
    problem = tiny_problem(counts, **options)  # type: ignore[arg-type]
    return solve_placement(
        problem, gap=gap, time_limit_s=limit_s, seed=0, progress=lambda line: None
    )


def test_cells_are_hosts_or_the_gpus_that_share_a_nic() -> None:
    own_nics = RowBuilder(
        tiny_problem(random_counts(0, 1, 8, 8), cluster=tiny_cluster((4, 4), nics=4))
    )
    assert own_nics.cells().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    shared = RowBuilder(
        tiny_problem(random_counts(0, 1, 8, 8), cluster=tiny_cluster((4, 4), nics=2))
    )
    assert shared.cells().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    one_nic = RowBuilder(
        tiny_problem(random_counts(0, 1, 8, 8), cluster=tiny_cluster((4, 4), nics=1))
    )
    assert one_nic.cells().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    nics=st.integers(1, 4),
    leafs=st.integers(1, 2),
    rate=st.sampled_from(["50Gb/s", "400Gb/s"]),
)
def test_relaxation_never_exceeds_the_cost(seed: int, nics: int, leafs: int, rate: str) -> None:
    cluster = tiny_cluster((4, 4), nics=nics, leafs=leafs, nic_rate=rate)
    problem = tiny_problem(random_counts(seed, 1, 8, 12), cluster=cluster, experts_per_gpu=2)
    builder = RowBuilder(problem)
    rows, cells = builder.layer(0), builder.cells()
    relaxed = cell_terms(rows, cells)
    random = np.random.default_rng(seed)
    for _ in range(20):
        placement = random.permutation(np.repeat(np.arange(8), 2))[:12]
        seconds = price(problem, placement)
        assert rows.seconds(placement) == pytest.approx(seconds, rel=1e-9)
        assert relaxed.seconds(cells[placement]) <= seconds * (1 + 1e-9)


def test_every_way_to_solve_agrees_with_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers as one process, in several processes, and with no program over GPUs."""
    counts = random_counts(11, 3, 4, 4)
    best = sum(brute_force(tiny_problem(counts[layer : layer + 1])) for layer in range(3))
    assert solve(counts, gap=0).objective_s == pytest.approx(best, rel=1e-6)
    monkeypatch.setattr("epplan.planner.solve._PROCESSES_SIZE", 0)
    apart = solve(counts, gap=0)
    assert apart.objective_s == pytest.approx(best, rel=1e-6)
    assert apart.bound_s == pytest.approx(best, rel=1e-5)
    monkeypatch.setattr("epplan.planner.solve._PROCESSES_SIZE", 10**9)
    monkeypatch.setattr("epplan.planner.placement.levels._FLAT_SIZE", 0)
    by_hosts = solve(counts, gap=0)
    assert by_hosts.bound_s <= best * (1 + 1e-6)
    assert by_hosts.objective_s >= best * (1 - 1e-6)


@pytest.mark.parametrize(
    ("name", "gap"), [("oversubscribed-leaf-4", 0.01), ("hgx-h100-4nic-4", 0.04)]
)
def test_small_gaps_are_proven_on_larger_clusters(name: str, gap: float) -> None:
    """32 GPUs, every rank with its own mix, transfers dominant."""
    solution = solve(random_counts(1, 1, 32, 32), gap=gap, cluster=load_cluster(name))
    assert solution.status in ("optimal", "feasible")
    assert solution.gap <= gap + 1e-6
    assert solution.objective_s <= solution.layers[0].contiguous_s


def test_64_ranks_with_a_mix_of_their_own() -> None:
    cluster = tiny_cluster((8,) * 8, nics=8)
    solution = solve(random_counts(2, 1, 64, 64), gap=0.005, cluster=cluster)
    assert solution.gap <= 0.005 + 1e-6
    assert (solution.layers[0].shares.sum(axis=0) == 1).all()


def test_same_seed_same_plan() -> None:
    counts = random_counts(3, 1, 32, 32)
    first, second = (solve(counts, cluster=load_cluster("oversubscribed-leaf-4")) for _ in range(2))
    assert (first.layers[0].shares == second.layers[0].shares).all()
    assert first.bound_s == second.bound_s


def power(base: int, exponent: int, report: Callable[[int], None]) -> int:
    report(base)
    return int(base**exponent)


def stuck(name: str, report: Callable[[str], None]) -> None:
    report(f"{name} so far")
    if name != "quick":
        time.sleep(600)


def fail(message: str, report: Callable[[str], None]) -> None:
    raise ValueError(message)


def leave(code: int, report: Callable[[str], None]) -> None:
    os._exit(code)


def test_processes_return_results_by_number_and_what_is_reported_before() -> None:
    results = list(run_in_processes(power, [(2, 3), (3, 3), (4, 3)], 2))
    for number, base in enumerate((2, 3, 4)):
        assert [value for task, value in results if task == number] == [base, base**3]


def test_a_task_that_does_not_end_is_ended_and_keeps_what_it_reported() -> None:
    began = time.monotonic()
    results = list(run_in_processes(stuck, [("first",), ("quick",)], 1, limit_s=lambda number: 6))
    assert results == [(0, "first so far"), (1, "quick so far"), (1, None)]
    assert time.monotonic() - began < 60


def test_a_failing_process_is_one_error() -> None:
    with pytest.raises(EpplanError, match=r"a solver process failed: ValueError"):
        list(run_in_processes(fail, [("no",)], 1))
    with pytest.raises(EpplanError, match="a solver process failed: EOFError"):
        list(run_in_processes(leave, [(3,)], 1))


@pytest.mark.parametrize("extra", [0, 16])
def test_the_time_limit_holds_where_the_program_is_far_from_proven(extra: int) -> None:
    """Dense rows once kept HiGHS's presolve busy for minutes, without a look at its limit."""
    cluster = load_cluster("hgx-h100-4nic-4")
    counts = random_counts(3, 2, 32, 96)
    problem = tiny_problem(
        counts, cluster=cluster, experts_per_gpu=4, replication=Replication(extra=extra)
    )
    solution = solve_placement(problem, gap=0, time_limit_s=3, seed=0, progress=lambda line: None)
    assert solution.status == "limit"
    assert solution.seconds < 3 + 3
    assert 0 < solution.gap < 1


def test_rows_of_the_program_hold_only_what_differs_between_cells() -> None:
    builder = RowBuilder(tiny_problem(random_counts(3, 1, 16, 16), cluster=tiny_cluster((2,) * 8)))
    rows, cells = builder.layer(0), builder.cells()
    placement = np.random.default_rng(0).permutation(16)
    for phase in cell_terms(rows, cells).phases:
        for row in phase.rows:
            constant, entries = sparse_row(row)
            assert len(entries) <= row.size / 8
            there = sum(more for e, c, more in entries if cells[placement[e]] == c)
            dense = row[np.arange(16), cells[placement]].sum() * 1e6
            assert constant + there == pytest.approx(dense, rel=1e-9)
