"""Replicas: against every layout on tiny clusters, and properties that must always hold."""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InfeasibleError
from epplan.planner.copies.counts import count_copies
from epplan.planner.copies.shares import best_shares
from epplan.planner.cost import Floats, Shares, evaluate_layer
from epplan.planner.groups.group import choose_groups
from epplan.planner.groups.sharing import share_links, solve_groups
from epplan.planner.objective import Objective
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.problem import Problem, Replication, make_problem
from epplan.planner.solve import Solution, solve_placement
from epplan.topologies.graph import Gpu
from tests.tiny import random_counts, tiny_cluster, tiny_model, tiny_problem, tiny_traffic


def solve(problem: Problem, limit_s: float = 10) -> Solution:
    return solve_placement(problem, gap=0, time_limit_s=limit_s, seed=0, progress=lambda line: None)


def all_layouts(problem: Problem) -> list[Shares]:
    """Return every allowed set of copies, in equal shares."""
    rule, gpus = problem.replication, range(problem.num_ranks)
    hosts = [gpu.host for gpu in problem.gpus]
    places = [set(s) for n in gpus for s in combinations(gpus, n + 1)]
    layouts = []
    for layout in product(places, repeat=problem.model.num_experts):
        copies = np.zeros((len(layout), problem.num_ranks))
        for expert, held in enumerate(layout):
            copies[expert, list(held)] = 1 / len(held)
        spread = all(len({hosts[g] for g in held}) > rule.survive_hosts for held in layout)
        within = np.count_nonzero(copies) <= problem.copies_per_layer
        if within and spread and np.count_nonzero(copies, axis=0).max() <= problem.experts_per_gpu:
            layouts.append(copies)
    return layouts


def brute_force(problem: Problem) -> float:
    """Return the least cost over all layouts; shares, where free, by the linear program."""
    rows = RowBuilder(problem).layer(0)
    return min(
        evaluate_layer(
            problem,
            0,
            layout if problem.replication.equal_shares else best_shares(rows, layout, 10),
        ).seconds
        for layout in all_layouts(problem)
    )


def problem_with(
    counts: Floats, gpus: tuple[int, ...], rule: Replication, *, per_gpu: int = 2, ffn: int = 64
) -> Problem:
    return tiny_problem(
        counts, cluster=tiny_cluster(gpus), experts_per_gpu=per_gpu, ffn=ffn, replication=rule
    )


RULES = [
    Replication(extra=1),
    Replication(extra=2),
    Replication(extra=1, equal_shares=True),
    Replication(extra=3, survive_hosts=1),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gpus", [(2, 1), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("ffn", [64, 4096])
def test_bound_holds_and_the_plan_is_near_the_optimum(
    rule: Replication, gpus: tuple[int, ...], ffn: int
) -> None:
    problem = problem_with(random_counts(3, 1, 3, 3), gpus, rule, per_gpu=3, ffn=ffn)
    best, solution = brute_force(problem), solve(problem)
    assert solution.bound_s <= best * (1 + 1e-6)
    limit = 1.001 if rule.equal_shares else 1.15
    assert best * (1 - 1e-3) <= solution.objective_s <= best * limit
    assert solution.layers[0].evaluation.seconds == pytest.approx(solution.objective_s)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gpus=st.sampled_from([(2, 2), (3, 1), (2, 2, 2), (4,)]),
    experts=st.integers(2, 7),
    extra=st.integers(1, 5),
    equal=st.booleans(),
    survive=st.booleans(),
    worst=st.sampled_from([1.0, 0.5]),
)
def test_layouts_keep_all_rules(
    seed: int,
    gpus: tuple[int, ...],
    experts: int,
    extra: int,
    equal: bool,
    survive: bool,
    worst: float,
) -> None:
    ranks, survive = sum(gpus), survive and len(gpus) > 1
    extra = max(extra, experts) if survive else extra
    extra = min(extra, experts * (ranks - 1))
    per_gpu = -(-(experts + extra) // ranks) + 1
    counts = np.stack([random_counts(seed + w, 1, ranks, experts) for w in range(2)])
    rule = Replication(extra=extra, equal_shares=equal, survive_hosts=int(survive))
    try:
        problem = tiny_problem(
            counts,
            cluster=tiny_cluster(gpus),
            experts_per_gpu=per_gpu,
            objective=Objective(worst=worst),
            replication=rule,
        )
    except InfeasibleError:
        assert survive  # uneven hosts: the small one has no room for a copy of everything
        return
    solution = solve(problem, limit_s=0.5)
    shares = solution.layers[0].shares
    assert shares.sum(axis=1) == pytest.approx(1.0)
    assert np.count_nonzero(shares) <= experts + extra
    assert np.count_nonzero(shares, axis=0).max() <= per_gpu
    assert solution.bound_s <= solution.objective_s
    hosts = np.array([gpu.host for gpu in problem.gpus])
    for of_expert in shares:
        held = of_expert[of_expert > 0]
        if equal:
            assert held == pytest.approx(1 / len(held))
        if survive:
            assert len(set(hosts[of_expert > 0])) > 1


@pytest.mark.parametrize("seed", range(2))
def test_groups_with_replicas_against_every_partition(seed: int) -> None:
    cluster, counts, rule = tiny_cluster((2, 2)), random_counts(seed, 1, 2, 3), Replication(extra=1)
    model, traffic = tiny_model(3), tiny_traffic(counts)

    def problems(groups: Sequence[tuple[Gpu, ...]]) -> list[Problem]:
        alone = [make_problem(cluster, g, model, traffic, 2, None, rule) for g in groups]
        return share_links(alone)

    first, *others = cluster.gpus()
    partitions = [((first, o), tuple(g for g in others if g != o)) for o in others]
    best = min(max(map(brute_force, problems(groups))) for groups in partitions)
    chosen = choose_groups(cluster, model, traffic, 2, num_groups=2, bounded=False)
    solutions = solve_groups(
        problems(chosen.gpus), gap=0, time_limit_s=2, seed=0, progress=lambda line: None
    )
    slowest = max(solution.objective_s for solution in solutions)
    assert best * (1 - 1e-3) <= slowest <= best * 1.05


def test_a_replica_of_the_hot_expert_halves_it() -> None:
    counts = np.full((1, 4, 4), 100.0)
    counts[:, :, 2] = 10_000
    alone = solve(problem_with(counts, (4,), Replication(), ffn=65536))
    helped = solve(problem_with(counts, (4,), Replication(extra=3), ffn=65536))
    compute = [s.layers[0].evaluation.worst.compute.seconds for s in (alone, helped)]
    assert np.count_nonzero(helped.layers[0].shares[2]) == 4
    assert compute[1] < 0.3 * compute[0]


def test_copies_go_to_whom_they_relieve() -> None:
    load = np.array([8.0, 4.0, 2.0, 0.0])
    assert count_copies(load, 4, 1, 4).tolist() == [4, 2, 1, 1]
    assert count_copies(load, 4, 2, 4).tolist() == [2, 2, 2, 2]
    assert count_copies(load, 9, 1, 3).tolist() == [3, 3, 3, 1]


def test_the_same_seed_gives_the_same_layout() -> None:
    problem = problem_with(random_counts(1, 1, 4, 8), (2, 2), Replication(extra=4), per_gpu=3)
    first, second = solve(problem), solve(problem)
    assert (first.layers[0].shares == second.layers[0].shares).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Replication(extra=20), "20 replicas are too many: 4 experts on 4 GPUs have 16 places"),
        (
            Replication(extra=3, survive_hosts=1),
            "every one of 4 experts needs two copies; 3 replicas are allowed",
        ),
    ],
)
def test_what_cannot_be_is_said(rule: Replication, message: str) -> None:
    with pytest.raises(InfeasibleError, match=message):
        problem_with(random_counts(0, 1, 4, 4), (2, 2), rule, per_gpu=8)


def test_one_host_survives_nothing() -> None:
    with pytest.raises(InfeasibleError, match="all GPUs are on one"):
        problem_with(random_counts(0, 1, 4, 4), (4,), Replication(extra=4, survive_hosts=1))
