"""The solver against brute force on tiny clusters, and properties that must always hold."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InfeasibleError
from epplan.planner.placement.highs import solve as run_highs
from epplan.planner.placement.program import build_program
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.search import best_start, contiguous
from epplan.planner.placement.terms import cell_terms, gpu_terms
from epplan.planner.problem import Problem, even_capacity, make_problem
from epplan.planner.solve import Solution, solve_placement
from epplan.planner.traffic import make_traffic
from epplan.topologies.sources import load_cluster
from tests.tiny import (
    all_placements,
    brute_force,
    price,
    random_counts,
    tiny_cluster,
    tiny_model,
    tiny_problem,
)


def solve(problem: Problem, gap: float = 0.0) -> Solution:
    return solve_placement(problem, gap=gap, time_limit_s=60, seed=0, progress=lambda line: None)


CLUSTERS = {
    "two hosts": tiny_cluster((2, 2)),
    "shared NIC, slow network": tiny_cluster((3, 2), nic_rate="25Gb/s"),
    "two leafs, thin uplink": tiny_cluster((2, 1, 1), leafs=2, nics=1, nic_rate="800Gb/s"),
    "mixed GPUs": tiny_cluster((2, 2), models=("h100-sxm", "l40s")),
    "degraded NVLink": tiny_cluster((2, 2), links=1),
}


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("experts_per_gpu", [1, 2])
@pytest.mark.parametrize("ffn", [64, 4096])
def test_solver_finds_the_optimum(name: str, experts_per_gpu: int, ffn: int) -> None:
    cluster = CLUSTERS[name]
    ranks = len(cluster.gpus())
    counts = random_counts(len(name), 1, ranks, ranks if ranks < 5 else 4)
    problem = tiny_problem(counts, cluster=cluster, experts_per_gpu=experts_per_gpu, ffn=ffn)
    best, solution = brute_force(problem), solve(problem)
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.bound_s == pytest.approx(best, rel=1e-5)
    assert solution.status == "optimal"


@settings(max_examples=30, deadline=None)
@given(
    gpus=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    experts=st.integers(1, 4),
    experts_per_gpu=st.integers(1, 3),
    leafs=st.integers(1, 2),
    seed=st.integers(0, 10_000),
)
def test_bound_and_objective_hold_the_optimum_between_them(
    gpus: list[int], experts: int, experts_per_gpu: int, leafs: int, seed: int
) -> None:
    cluster = tiny_cluster(tuple(gpus), leafs=leafs)
    ranks = sum(gpus)
    if ranks * experts_per_gpu < experts:
        experts = ranks * experts_per_gpu
    counts = random_counts(seed, 1, ranks, experts)
    counts[counts < np.quantile(counts, 0.3)] = 0  # some ranks send nothing to some experts
    counts[:, 0] += 1
    problem = tiny_problem(counts, cluster=cluster, experts_per_gpu=experts_per_gpu)
    best = brute_force(problem)
    for gap in (0.0, 0.2):
        solution = solve(problem, gap)
        assert solution.bound_s <= best * (1 + 1e-6)
        assert solution.objective_s >= best * (1 - 1e-6)
        assert solution.gap <= gap + 1e-5


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gpus=st.sampled_from([(2, 2), (3, 1), (1, 1, 2), (4,)]),
    nics=st.integers(1, 2),
    leafs=st.integers(1, 2),
)
def test_linear_forms_price_like_the_evaluator(
    seed: int, gpus: tuple[int, ...], nics: int, leafs: int
) -> None:
    cluster = tiny_cluster(gpus, nics=nics, leafs=leafs)
    problem = tiny_problem(random_counts(seed, 1, 4, 4), cluster=cluster, experts_per_gpu=2)
    builder = RowBuilder(problem)
    rows, cells = builder.layer(0), builder.cells()
    exact, relaxed = gpu_terms(rows), cell_terms(rows, cells)
    for placement in all_placements(problem)[::7]:
        seconds = price(problem, placement)
        assert exact.seconds(placement) == pytest.approx(seconds, rel=1e-9)
        assert rows.seconds(placement) == pytest.approx(seconds, rel=1e-9)
        assert relaxed.seconds(cells[placement]) <= seconds * (1 + 1e-9)
        assert max(exact.floor_s, rows.floor_s, relaxed.floor_s) <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("experts_per_gpu", [1, 2])
def test_integer_program_alone_finds_the_optimum(experts_per_gpu: int) -> None:
    """The search often meets the optimum first; here the program starts from the worst."""
    problem = tiny_problem(random_counts(5, 1, 4, 4), experts_per_gpu=experts_per_gpu)
    terms = gpu_terms(RowBuilder(problem).layer(0))
    worst = max(all_placements(problem), key=terms.seconds)
    program = build_program({0: terms}, np.full(4, experts_per_gpu))
    result = run_highs(
        program.lp, start=program.start_from({0: worst}), gap=0.0, time_limit_s=60, seed=0
    )
    found = program.placements(result.values)[0]
    assert terms.seconds(found) == pytest.approx(brute_force(problem), rel=1e-6)
    assert result.bound / 1e6 == pytest.approx(terms.seconds(found), rel=1e-5)


def test_memory_that_couples_layers() -> None:
    """GPU 0 has room for one expert of the two layers: it must sit out one of them."""
    problem = tiny_problem(random_counts(3, 2, 4, 3))
    slots = np.array([1, 2, 2, 2])
    coupled = Problem(
        **{
            **{name: getattr(problem, name) for name in Problem.__slots__},
            "slots_of_gpu": slots,
        }
    )
    assert coupled.layers_coupled
    best = min(
        price(coupled, first) + price(coupled, second, layer=1)
        for first in all_placements(coupled)
        for second in all_placements(coupled)
        if (np.bincount([*first, *second], minlength=4) <= slots).all()
    )
    solution = solve(coupled)
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.bound_s == pytest.approx(best, rel=1e-5)
    held = sum(np.count_nonzero(layer.shares, axis=0) for layer in solution.layers)
    assert (held <= slots).all()


def test_more_bandwidth_never_makes_the_plan_slower() -> None:
    counts = random_counts(7, 1, 4, 4)
    times = [
        solve(tiny_problem(counts, cluster=tiny_cluster(nic_rate=f"{rate}Gb/s"))).objective_s
        for rate in (50, 100, 200, 400)
    ]
    assert times == sorted(times, reverse=True)


def test_equal_hosts_are_interchangeable() -> None:
    counts = random_counts(8, 1, 4, 4)
    swapped = counts[:, [2, 3, 0, 1]]
    first, second = solve(tiny_problem(counts)), solve(tiny_problem(swapped))
    assert first.objective_s == pytest.approx(second.objective_s, rel=1e-6)


def test_layers_of_equal_traffic_share_a_solution() -> None:
    counts = np.repeat(random_counts(9, 1, 4, 4), 5, axis=0)
    solution = solve(tiny_problem(counts))
    assert len(solution.layers) == 5
    assert len({layer.shares.tobytes() for layer in solution.layers}) == 1
    assert solution.objective_s == pytest.approx(5 * brute_force(tiny_problem(counts[:1])))


def test_time_limit_is_not_called_optimal() -> None:
    """PuLP itself reports a run that stopped at its limit as Optimal."""
    cluster = load_cluster("hgx-h200-2")
    model = tiny_model(128, ffn=64)
    gpus = tuple(cluster.gpus())
    traffic = make_traffic("lognormal:1,1", model, 16, None, 0)
    problem = make_problem(cluster, gpus, model, traffic, 8)
    solution = solve_placement(
        problem, gap=0.0, time_limit_s=0.5, seed=0, progress=lambda line: None
    )
    assert solution.status == "limit"
    assert 0 < solution.gap < 1
    assert solution.seconds < 30


def test_search_keeps_capacity_and_never_loses_to_contiguous() -> None:
    problem = tiny_problem(random_counts(4, 1, 4, 6), experts_per_gpu=2)
    terms, capacity = gpu_terms(RowBuilder(problem).layer(0)), np.array([2, 1, 2, 2])
    _, placement = best_start(terms, capacity, seed=0)
    assert (np.bincount(placement, minlength=4) <= capacity).all()
    assert terms.seconds(placement) <= terms.seconds(contiguous(6, capacity))


def test_contiguous_is_even_and_in_order() -> None:
    assert contiguous(6, np.array([4, 1, 4, 4])).tolist() == [0, 0, 1, 2, 2, 3]
    assert contiguous(4, np.array([1, 1, 1, 1])).tolist() == [0, 1, 2, 3]


def test_memory_too_small_says_which_expert_which_gpu_and_how_many_bytes() -> None:
    cluster = load_cluster("mixed-h100-h200")
    model = tiny_model(16, layers=3, ffn=2_000_000)
    gpus = tuple(cluster.gpus()[:4])
    with pytest.raises(InfeasibleError) as caught:
        make_problem(cluster, gpus, model, make_traffic("uniform", model, 4, 100, 0), 4)
    text = str(caught.value)
    found = re.search(r"expert (\d+) of layer (\d) fits .*\((\d+) bytes\).*short by (\d+)", text)
    assert found
    expert, layer, size, short = map(int, found.groups())
    assert size == model.expert_bytes
    assert 0 < short <= size
    held = int(re.search(r"3 layers x 16 experts need 48 places; all 4 GPUs have (\d+)", text)[1])  # type: ignore[index]
    assert held == 16 * layer + expert  # all that came before it found room
    assert "h100-1/gpu0, where most is left, has" in text
    assert "memory of 4 GPUs (h100-1/gpu0, h100-1/gpu1, h100-1/gpu2, ...): each may use" in text
    assert "hint: keep fewer layers: --layers 1" in text  # one of more than one is not enough


def test_even_capacity_leaves_no_gpu_over_its_memory() -> None:
    problem = tiny_problem(random_counts(1, 3, 4, 4))
    slots = np.array([1, 3, 4, 4])
    fields = {name: getattr(problem, name) for name in Problem.__slots__}
    capacity = even_capacity(Problem(**{**fields, "slots_of_gpu": slots, "experts_per_gpu": 2}))
    assert (capacity.sum(axis=0) <= slots).all()
    assert (capacity.sum(axis=1) == 4).all()
