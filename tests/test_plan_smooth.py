"""Swaps on the smooth objective: priced as if they were done, and never a step back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.objective import Objective
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.rows import LayerRows
from epplan.planner.placement.search import Limit, contiguous, descend, spread
from epplan.planner.placement.smooth import Smooth, descend_smoothly
from epplan.planner.placement.terms import gpu_terms
from tests.tiny import all_placements, random_counts, tiny_cluster, tiny_problem


def copies(seed: int, *, nics: int, leafs: int, objective: Objective) -> tuple[LayerRows, Limit]:
    """Return 10 copies of 7 experts for 6 GPUs with room for 2 each, and what keeps them apart."""
    counts = random_counts(seed, 2, 6, 7)[:, None]  # two windows of one layer
    cluster = tiny_cluster((4, 2), nics=nics, leafs=leafs)
    problem = tiny_problem(counts, cluster=cluster, experts_per_gpu=2, objective=objective)
    expert = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    share = np.array([0.5, 0.2, 0.3, 0.9, 0.1, 1, 1, 1, 1, 1])
    rows = RowBuilder(problem).layer(0).copies(expert, share)
    one_a_gpu = Limit(group=expert, domain=np.arange(6), most=np.ones((7, 6), dtype=np.int64))
    return rows, one_a_gpu


CLUSTERS = {
    "seed": st.integers(0, 10_000),
    "nics": st.sampled_from([1, 2, 4]),
    "leafs": st.integers(1, 2),
    "objective": st.sampled_from([Objective(), Objective(overlap=True), Objective(worst=0.5)]),
}


@settings(max_examples=15, deadline=None)
@given(**CLUSTERS, sharpness=st.sampled_from([5.0, 20.0]))
def test_every_step_is_priced_as_if_it_were_done(
    seed: int, nics: int, leafs: int, objective: Objective, sharpness: float
) -> None:
    rows, limit = copies(seed, nics=nics, leafs=leafs, objective=objective)
    capacity = np.full(6, 2)
    start = spread(10, capacity, [limit])
    state = Smooth(rows, start, capacity, [limit], sharpness)
    for item in range(10):
        state.placement = start.copy()
        state.price()
        expected = state.after(item)
        for other in range(16):  # ten items, and a slot on each of six GPUs
            after = start.copy()
            after[item] = start[other] if other < 10 else other - 10
            if other < 10:
                after[other] = start[item]
            allowed = (
                after[item] != start[item]
                and np.bincount(after, minlength=6).max() <= 2
                and (limit.count(after) <= 1).all()
            )
            if not allowed:
                assert expected[other] == np.inf
                continue
            state.placement = after
            state.price()
            assert expected[other] == pytest.approx(state.seconds, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(**CLUSTERS)
def test_descent_keeps_all_rules_and_is_no_worse(
    seed: int, nics: int, leafs: int, objective: Objective
) -> None:
    rows, limit = copies(seed, nics=nics, leafs=leafs, objective=objective)
    capacity = np.array([2, 1, 2, 2, 2, 2])
    start = spread(10, capacity, [limit])
    found = descend_smoothly(rows, start, capacity, [limit])
    assert rows.seconds(found) <= rows.seconds(start)
    assert (np.bincount(found, minlength=6) <= capacity).all()
    assert (limit.count(found) <= 1).all()
    assert (found == descend_smoothly(rows, start, capacity, [limit])).all()
    assert (start == descend_smoothly(rows, start, capacity, [limit], deadline=0.0)).all()


def test_descent_often_ends_at_the_optimum() -> None:
    """Five experts on four GPUs, against all placements."""
    over = []
    for seed in range(6):
        problem = tiny_problem(random_counts(seed, 1, 4, 5, 0.5), experts_per_gpu=2, ffn=4096)
        rows = RowBuilder(problem).layer(0)
        found = descend_smoothly(rows, np.array([0, 0, 1, 1, 2]), np.full(4, 2))
        over.append(rows.seconds(found) / min(map(rows.seconds, all_placements(problem))) - 1)
    assert min(over) >= -1e-9
    assert np.median(over) <= 1e-9
    assert np.mean(over) <= 0.05


def test_it_gets_on_where_descent_on_the_maximum_stalls() -> None:
    cluster = tiny_cluster((4,) * 4, nics=4)
    for seed in range(3):
        problem = tiny_problem(
            random_counts(seed, 1, 16, 64, 0.5), cluster=cluster, experts_per_gpu=4, ffn=4096
        )
        rows, capacity = RowBuilder(problem).layer(0), np.full(16, 4)
        start = contiguous(64, capacity)
        stalled = rows.seconds(descend(gpu_terms(rows), start, capacity))
        assert rows.seconds(descend_smoothly(rows, start, capacity)) < 0.995 * stalled


def test_what_is_enough_ends_the_descent() -> None:
    rows, limit = copies(3, nics=4, leafs=1, objective=Objective())
    capacity = np.full(6, 2)
    start = spread(10, capacity, [limit])
    enough_s = 0.99 * rows.seconds(start)
    some = descend_smoothly(rows, start, capacity, [limit], enough_s=enough_s)
    assert rows.seconds(some) <= enough_s
    assert rows.seconds(descend_smoothly(rows, start, capacity, [limit])) <= rows.seconds(some)


def test_without_traffic_nothing_is_swapped() -> None:
    problem = tiny_problem(np.zeros((1, 4, 4)))
    rows, start = RowBuilder(problem).layer(0), np.arange(4)
    assert (descend_smoothly(rows, start, np.ones(4, dtype=np.int64)) == start).all()
