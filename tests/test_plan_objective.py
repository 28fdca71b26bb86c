"""Windows of traffic and overlap of phases: the objective, and the solver against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.cost import evaluate_layer, one_copy
from epplan.planner.objective import Objective
from epplan.planner.solve import Solution, solve_placement
from tests.tiny import brute_force, price, random_counts, tiny_cluster, tiny_problem

OBJECTIVES = [
    Objective(overlap=overlap, worst=worst)
    for overlap in (False, True)
    for worst in (1.0, 0.5, 0.1)
]


def solve(counts: np.ndarray, objective: Objective, **options: object) -> tuple[Solution, float]:
    problem = tiny_problem(counts, objective=objective, **options)  # type: ignore[arg-type]
    solution = solve_placement(problem, gap=0, time_limit_s=60, seed=0, progress=lambda line: None)
    return solution, brute_force(problem)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("ffn", [64, 4096])
@pytest.mark.parametrize("gpus", [(2, 2), (3, 1), (4,)])
def test_solver_finds_the_optimum(objective: Objective, ffn: int, gpus: tuple[int, ...]) -> None:
    counts = np.stack([random_counts(seed, 1, 4, 4) for seed in range(3)])
    solution, best = solve(counts, objective, cluster=tiny_cluster(gpus), ffn=ffn)
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.bound_s == pytest.approx(best, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    objective=st.sampled_from(OBJECTIVES),
    experts=st.integers(2, 6),
)
def test_bound_and_objective_hold_the_optimum_between_them(
    seed: int, windows: int, objective: Objective, experts: int
) -> None:
    counts = np.stack([random_counts(seed + w, 1, 3, experts) for w in range(windows)])
    solution, best = solve(
        counts, objective, cluster=tiny_cluster((2, 1)), experts_per_gpu=2, ffn=1024
    )
    assert solution.bound_s <= best * (1 + 1e-6)
    assert solution.objective_s == pytest.approx(best, rel=1e-5)


def test_seconds_of_windows_and_overlap_by_hand() -> None:
    transfer, compute = np.array([1.0, 4.0, 2.0]), np.array([3.0, 1.0, 2.0])
    totals = {True: [3.0, 4.0, 2.0], False: [4.0, 5.0, 4.0]}
    for overlap, expected in totals.items():
        objective = Objective(overlap=overlap)
        of_window = objective.window_seconds(transfer, compute)
        assert of_window.tolist() == expected
        assert objective.seconds(of_window) == pytest.approx(np.mean(expected))
    assert Objective(worst=0.1).seconds(np.array([3.0, 4.0, 2.0])) == 4.0
    assert Objective(worst=0.5).seconds(np.array([3.0, 4.0, 2.0])) == 3.5
    assert [Objective(worst=0.25).num_worst(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_evaluation_reports_the_windows_that_count() -> None:
    counts = np.stack([random_counts(0, 1, 4, 4) * factor for factor in (1, 3, 2)])
    problem = tiny_problem(counts, objective=Objective(worst=0.5))
    evaluation = evaluate_layer(problem, 0, one_copy(np.arange(4), 4))
    assert len(evaluation.windows) == 2
    assert evaluation.worst.seconds > evaluation.windows[1].seconds
    assert sum(evaluation.phase_seconds()) == pytest.approx(evaluation.seconds)
    assert evaluation.seconds == price(problem, np.arange(4))


def test_planning_for_the_worst_windows_makes_them_better() -> None:
    """Windows whose best placements differ: the mean's plan is worse on the worst ones."""
    found = 0
    for seed in range(12):
        counts = np.stack([random_counts(seed + 31 * w, 1, 4, 4, skew=1.5) for w in range(4)])
        mean, _ = solve(counts, Objective())
        robust, _ = solve(counts, Objective(worst=0.25))
        judge = tiny_problem(counts, objective=Objective(worst=0.25))
        seconds = [
            evaluate_layer(judge, 0, solution.layers[0].shares).seconds
            for solution in (mean, robust)
        ]
        assert seconds[1] <= seconds[0] * (1 + 1e-9)
        found += seconds[1] < seconds[0] * 0.999
    assert found
