"""Survivors of plans with replicas: copies that are left stay, shares are made anew."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from epplan.planner.copies.shares import best_shares
from epplan.planner.cost import Shares, evaluate_layer, one_copy
from epplan.planner.moves.recopy import least_moved_copies
from epplan.planner.moves.repair import least_moved
from epplan.planner.moves.replan import Effort, Replanned, replan
from epplan.planner.moves.room import Copies, Held
from epplan.planner.moves.survivors import surviving_ranks
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.plan import Plan, plan_problems
from epplan.planner.problem import Problem, Replication
from epplan.planner.traffic import Floats
from tests.plans import bare_plan
from tests.tiny import random_counts, tiny_cluster, tiny_model, tiny_problem, tiny_traffic

CLUSTER = tiny_cluster((2, 2, 2), nic_rate="25Gb/s")
LEFT = tiny_cluster((2, 2), nic_rate="25Gb/s")
EFFORT = Effort(gap=0.0, time_limit_s=20, progress=lambda line: None)
SURVIVORS = [0, 1, 4, 5]  # without h1
EXPERTS, SLOTS = 4, 2


def plan_of(layers: list[list[set[int]]], *, equal: bool = False) -> Plan:
    """Return a plan with these experts on each rank; shares are uneven unless they are `equal`."""
    slots, shares = [], []
    for ranks in layers:
        row: list[int | None] = []
        weights: list[float] = []
        for rank, experts in enumerate(ranks):
            row += [*sorted(experts), *[None] * (SLOTS - len(experts))]
            weights += [1.0 if equal else 1.0 + rank] * SLOTS
        total = {e: sum(w for x, w in zip(row, weights, strict=True) if x == e) for e in row}
        slots.append(row)
        shares.append(
            [0.0 if e is None else w / total[e] for e, w in zip(row, weights, strict=True)]
        )
    gpus = [(gpu.host, gpu.index) for gpu in CLUSTER.gpus()]
    return bare_plan(tiny_model(EXPERTS, layers=len(layers)), gpus, slots, shares)


def random_layer(seed: int) -> list[set[int]]:
    """Return experts of the six ranks: all of them somewhere, most twice or more."""
    random = np.random.default_rng(seed)
    while True:
        ranks = [set(random.choice(EXPERTS, SLOTS, replace=False).tolist()) for _ in range(6)]
        ranks[int(random.integers(6))] = set()  # a rank with room
        if set().union(*ranks) == set(range(EXPERTS)):
            return ranks


def run(plan: Plan, counts: Floats, *, per_gpu: int = SLOTS, extra: int | None = 0) -> Replanned:
    return replan(
        plan,
        CLUSTER,
        "tiny",
        tiny_traffic(counts[:, SURVIVORS]),
        surviving_ranks(plan, ["h1"], CLUSTER),
        experts_per_gpu=per_gpu,
        extra_loads=extra,
        objective=problem_of(counts).objective,
        effort=EFFORT,
        command="epplan replan",
    )


def problem_of(counts: Floats, per_gpu: int = SLOTS) -> Problem:
    return tiny_problem(counts[:, SURVIVORS], cluster=LEFT, experts_per_gpu=per_gpu)


def held_by(layer: list[set[int]]) -> Copies:
    held = np.zeros((EXPERTS, len(SURVIVORS)), dtype=bool)
    for new, old in enumerate(SURVIVORS):
        held[sorted(layer[old]), new] = True
    return held


def shares_in(plan: Plan, layer: int = 0) -> Shares:
    shares = np.zeros((EXPERTS, plan.world_size))
    for slot, expert in enumerate(plan.expert_of_slot[layer]):
        if expert is not None:
            shares[expert, slot // plan.slots_per_rank] = plan.shares(layer)[slot]
    return shares


def layouts(held: Copies, loads: int, per_gpu: int, most: int) -> Iterator[Copies]:
    """Yield all copies of all experts that load at most so many."""
    ranks = held.shape[1]
    choices = [np.array(bits) for bits in product((False, True), repeat=ranks) if any(bits)]
    able = [[bits for bits in choices if (bits & ~own).sum() <= loads] for own in held]
    for chosen in product(*able):
        copies = np.array(chosen)
        fits = (copies.sum(axis=0) <= per_gpu).all() and copies.sum() <= most
        if fits and (copies & ~held).sum() <= loads:
            yield copies


def fastest(problem: Problem, candidates: Iterator[Copies]) -> float:
    """Return the least time of any of these copies with their best shares."""
    rows = RowBuilder(problem).layer(0)
    times = []
    for copies in candidates:
        shares = best_shares(rows, copies / copies.sum(axis=1, keepdims=True), 10)
        times.append(evaluate_layer(problem, 0, shares).seconds)
    return min(times)


@pytest.mark.parametrize("seed", range(6))
def test_the_least_is_loaded_and_as_well_as_can_be(seed: int) -> None:
    layer, counts = random_layer(seed), random_counts(seed, 1, 6, EXPERTS)
    plan, held = plan_of([layer]), held_by(layer)
    found = run(plan, counts)
    assert plan_problems(found.plan) == []
    lost = set(np.flatnonzero(~held.any(axis=1)).tolist())
    assert {transfer.expert for transfer in found.transfers} == lost
    assert all(transfer.source is None for transfer in found.transfers)
    shares = shares_in(found.plan)
    assert shares.sum(axis=1) == pytest.approx(1.0)
    assert not ((shares > 0) & ~held)[sorted(set(range(EXPERTS)) - lost)].any()
    most = len(SURVIVORS) * SLOTS
    best = fastest(problem_of(counts), layouts(held, len(lost), SLOTS, most))
    objective = found.plan.certificate.objective_s
    assert best * (1 - 2e-3) <= objective <= best * 1.05
    assert found.plan.certificate.bound_s <= best * (1 + 1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_budget_buys_copies(seed: int) -> None:
    layer, counts = random_layer(seed), random_counts(seed, 1, 6, EXPERTS, skew=2.0)
    plan, held = plan_of([layer]), held_by(layer)
    least, one, any_ = (run(plan, counts, per_gpu=3, extra=extra) for extra in (0, 1, None))
    times = [found.plan.certificate.objective_s for found in (least, one, any_)]
    assert times == sorted(times, reverse=True)
    lost = int((~held.any(axis=1)).sum())
    assert len(least.transfers) == lost
    assert len(one.transfers) <= lost + 1
    planned = sum(len(experts) for experts in layer)
    problem = problem_of(counts, per_gpu=3)
    best = fastest(problem, layouts(held, lost + 1, 3, planned))
    assert best * (1 - 2e-3) <= times[1] <= best * 1.05
    for found in (least, one, any_):
        assert plan_problems(found.plan) == []
        assert np.count_nonzero(shares_in(found.plan)) <= planned
        assert found.plan.certificate.bound_s <= best * (1 + 1e-6)
    for transfer in any_.transfers:
        holders = np.flatnonzero(held[transfer.expert])
        assert transfer.source == (holders[0] if holders.size else None)


def test_equal_shares_stay_equal() -> None:
    layer = [{0, 1}, {2, 3}, {0, 2}, {1}, {0, 3}, {1, 2}]
    found = run(plan_of([layer], equal=True), random_counts(1, 1, 6, EXPERTS))
    for of_expert in shares_in(found.plan):
        held = of_expert[of_expert > 0]
        assert held == pytest.approx(1 / len(held))
    assert found.transfers == ()
    free = run(plan_of([layer]), random_counts(1, 1, 6, EXPERTS))
    assert free.plan.certificate.objective_s < found.plan.certificate.objective_s
    assert "3 of 11 copies are not made again" in "\n".join(found.plan.reasons)


def test_copies_make_room_for_lost_experts() -> None:
    # Nothing is free; expert 3 is lost, and expert 0, with fewest rows, has copies to give.
    layer = [{0, 1}, {0, 2}, {3}, {3}, {0, 1}, {0, 2}]
    counts = np.tile([10.0, 500.0, 500.0, 500.0], (1, 6, 1))
    found = run(plan_of([layer]), counts)
    assert [(transfer.expert, transfer.source) for transfer in found.transfers] == [(3, None)]
    assert np.count_nonzero(shares_in(found.plan), axis=1).tolist() == [3, 2, 2, 1]


def test_a_host_that_takes_no_expert_with_it_costs_nothing() -> None:
    layer = [{0, 1}, {2, 3}, {0, 1}, {2, 3}, set[int](), set[int]()]
    found = run(plan_of([layer]), random_counts(2, 1, 6, EXPERTS))
    assert found.transfers == ()
    assert found.options[0].loads == 0
    assert found.options[0].name == "least moved"
    assert any(
        reason.startswith("4 experts have copies on one host") for reason in found.plan.reasons
    )


def has_room(held: Held, slots: list[int]) -> bool:
    """Return whether every expert can keep a copy, or find a place, by trying everything."""
    layers = [
        [
            used
            for places in product(*[np.flatnonzero(x) if x.any() else np.arange(4) for x in copies])
            if (used := np.bincount(np.array(places), minlength=4)).max() <= SLOTS
        ]
        for copies in held
    ]
    return any((first + second <= slots).all() for first in layers[0] for second in layers[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [[4, 4, 3, 3], [2, 3, 3, 2], [2, 2, 2, 2], [1, 3, 2, 3]])
def test_memory_that_couples_layers_is_kept(slots: list[int], seed: int) -> None:
    held = np.array([held_by(random_layer(seed)), held_by(random_layer(seed + 10))])
    problem = replace(
        problem_of(random_counts(seed, 2, 6, EXPERTS)),
        slots_of_gpu=np.array(slots),
        replication=Replication(extra=3),
    )
    placed = least_moved_copies(problem, held, [copies.astype(float) for copies in held])
    single = least_moved(replace(problem, replication=Replication()), held)
    assert (placed is not None) == (single is not None) == has_room(held, slots)
    if placed is None or single is None:
        return
    one_each = [one_copy(placement, len(SURVIVORS)) for placement in single]
    for layers in (placed, one_each):
        assert (sum(np.count_nonzero(shares, axis=0) for shares in layers) <= slots).all()
        for copies, shares in zip(held, layers, strict=True):
            assert shares.sum(axis=1) == pytest.approx(1.0)
            assert np.count_nonzero(shares, axis=0).max() <= SLOTS
            assert not ((shares > 0) & ~copies)[copies.any(axis=1)].any()
