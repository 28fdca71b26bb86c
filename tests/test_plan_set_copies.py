"""Replicas where it matters what tokens choose together, and within whole routing groups."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.planner.copies.copy_search import CopySearch
from epplan.planner.copies.copy_state import CopyState
from epplan.planner.copies.copy_steps import CopyRules, CopySteps
from epplan.planner.copies.group_copies import copies_in_hosts
from epplan.planner.copies.set_shares import share_out
from epplan.planner.cost import Shares, evaluate_layer, rows_sent
from epplan.planner.forwarding import entry_ranks
from epplan.planner.plan import TransferMode
from epplan.planner.problem import Problem, Replication
from epplan.planner.routing_trace import from_topk
from epplan.planner.solve import Solution, solve_placement
from epplan.planner.together.pair_bound import (
    Reach,
    coactivation,
    most_at_home,
    most_pairs,
    most_pairs_within,
    spectrum,
)
from epplan.planner.together.set_rows import SetRowBuilder
from tests.tiny import tiny_cluster
from tests.tokens import (
    random_tokens,
    simulated_transfers,
    token_plan,
    token_problem,
    token_traffic,
)

SET_MODES: list[TransferMode] = ["direct", "node-dedup"]
CLUSTERS = {
    "slow shared NIC": tiny_cluster((2, 1), nic_rate="25Gb/s"),
    "three hosts": tiny_cluster((1, 1, 1), leafs=2, models=("h100-sxm", "l40s")),
}


def solve(problem: Problem, limit_s: float = 2.0, gap: float = 0.0) -> Solution:
    return solve_placement(
        problem, gap=gap, time_limit_s=limit_s, seed=0, progress=lambda line: None
    )


def price(problem: Problem, shares: Shares) -> float:
    return evaluate_layer(problem, 0, shares).seconds


def random_shares(random: np.random.Generator, experts: int, gpus: int, most: int) -> Shares:
    """Return shares of copies on one to three GPUs each, at most `most` on a GPU."""
    while True:
        shares = np.zeros((experts, gpus))
        for expert in range(experts):
            where = random.choice(gpus, size=random.integers(1, min(gpus, 3) + 1), replace=False)
            shares[expert, where] = random.dirichlet(np.ones(len(where)))
        if np.count_nonzero(shares, axis=0).max() <= most:
            return shares


def layouts(problem: Problem) -> Iterator[np.ndarray]:
    """Yield every choice of copies that keeps the rules, [experts, gpus]."""
    gpus, extra = range(problem.num_ranks), problem.replication.extra
    some = [set(c) for n in range(1, 2 + extra) for c in combinations(gpus, n)]
    experts = problem.model.num_experts
    for copies in product(some, repeat=experts):
        if sum(map(len, copies)) > experts + extra:
            continue
        held = np.array([[gpu in of for gpu in gpus] for of in copies])
        if held.sum(axis=0).max() <= problem.experts_per_gpu and keeps_groups(problem, held):
            yield held


def keeps_groups(problem: Problem, held: np.ndarray) -> bool:
    if not problem.keep_groups:
        return True
    size = problem.model.num_experts // problem.model.router.groups
    hosts = problem.host_of_gpu
    return all(
        len(set(hosts[np.flatnonzero(held[first : first + size].any(axis=0))])) == 1
        for first in range(0, problem.model.num_experts, size)
    )


def brute_force(problem: Problem, parts: list[float]) -> float:
    """Return the least cost of all layouts with one copy more at most, its share among `parts`."""
    best = np.inf
    for held in layouts(problem):
        twice = np.flatnonzero(held.sum(axis=1) == 2)
        for part in parts if len(twice) else parts[:1]:
            shares = held / held.sum(axis=1, keepdims=True)
            if len(twice):
                shares[twice[0], held[twice[0]]] = part, 1 - part
            best = min(best, price(problem, shares))
    return best


def with_tokens(problem: Problem, factor: float) -> Problem:
    """Return the problem with as many times the tokens."""
    assert problem.sets is not None
    sets = tuple(tuple(layer.scaled(factor) for layer in window) for window in problem.sets)
    return replace(problem, counts=problem.counts * factor, sets=sets)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), gpus=st.sampled_from([(2, 2), (3, 1), (2, 1, 1)]))
def test_expected_rows_are_those_of_all_draws(seed: int, gpus: tuple[int, ...]) -> None:
    cluster, topk = tiny_cluster(gpus), random_tokens(seed, 4, 5, top_k=3, tokens=4)
    shares = random_shares(np.random.default_rng(seed), 5, 4, 5)
    direct, dedup = np.zeros((4, 4)), np.zeros((4, 4))
    problems = {mode: token_problem(topk, 5, cluster, mode) for mode in SET_MODES}
    island = problems["direct"].routes.island
    entry = entry_ranks(island)
    for source, token in np.ndindex(topk.shape[2:4]):
        experts = topk[0, 0, source, token]
        for drawn in product(range(4), repeat=3):
            chance = float(np.prod(shares[experts, list(drawn)]))
            ranks = set(drawn)
            direct[source, list(ranks)] += chance
            for number in {int(island[rank]) for rank in ranks}:
                enters = int(entry[source, number])
                if island[source] != number:
                    dedup[source, enters] += chance
                inside = [rank for rank in ranks if island[rank] == number]
                dedup[source if island[source] == number else enters, inside] += chance
    assert rows_sent(problems["direct"], 0, 0, shares) == pytest.approx(direct)
    assert rows_sent(problems["node-dedup"], 0, 0, shares) == pytest.approx(dedup)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gpus=st.sampled_from([(2, 2), (3, 1), (1, 1, 2)]),
    ffn=st.sampled_from([16, 4096]),
    windows=st.integers(1, 2),
    mode=st.sampled_from(SET_MODES),
    hosts=st.integers(1, 2),
)
def test_every_step_of_a_copy_prices_like_the_evaluator(
    seed: int, gpus: tuple[int, ...], ffn: int, windows: int, mode: TransferMode, hosts: int
) -> None:
    cluster = tiny_cluster(gpus, leafs=2, nic_rate="50Gb/s", models=("h100-sxm", "l40s"))
    topk = random_tokens(seed, 4, 6, top_k=3, windows=windows)
    problem = token_problem(topk, 6, cluster, mode, experts_per_gpu=5, ffn=ffn)
    layer = SetRowBuilder(problem).layer(0)
    random = np.random.default_rng(seed)
    state = CopyState(layer, random_shares(random, 6, 4, 5))
    rules = CopyRules(
        allowed=random.random((6, 4)) < 0.8,
        capacity=np.full(4, 5),
        most_copies=20,
        host_of_gpu=problem.host_of_gpu,
        least_hosts=hosts,
        equal_shares=False,
    )
    assert state.price.seconds == pytest.approx(price(problem, state.shares), rel=1e-9)
    assert layer.seconds_of_shares(state.shares) == pytest.approx(state.price.seconds, rel=1e-9)
    for expert, gpu in np.argwhere(state.shares > 0).tolist()[::3]:
        steps = CopySteps(state, rules, expert, gpu)
        loads, work, paths = steps._loads(), steps._work(), steps._paths()
        least, _ = state.total(loads, work, paths)
        for step in range(len(steps)):
            changed, after = steps.after(step), state.shares.copy()
            for other, shares in changed.items():
                after[other] = shares
                assert rules.allowed[other, (shares > 0) & (state.shares[other] == 0)].all()
                assert rules.on_hosts(shares)
            assert np.count_nonzero(after, axis=0).max() <= 5
            seconds = price(problem, after)
            assert steps._exact(step, loads, work, paths).seconds == pytest.approx(seconds)
            assert least[step] <= seconds * (1 + 1e-9)
            tried = state.copy()
            tried.change(changed)
            assert tried.price.seconds == pytest.approx(seconds, rel=1e-9)
    expert = int(random.integers(6))
    after = np.repeat(state.shares[expert][None], 2, axis=0)
    after[1] = random.dirichlet(np.ones(4))
    along = state.along(expert, after)
    assert along[0].seconds == pytest.approx(state.price.seconds, rel=1e-9)
    changed_shares = state.shares.copy()
    changed_shares[expert] = after[1]
    assert along[1].seconds == pytest.approx(price(problem, changed_shares), rel=1e-9)
    shared = share_out(state, time.monotonic() + 5.0)
    assert shared.price.seconds <= state.price.seconds * (1 + 1e-9)
    assert ((shared.shares > 0) == (state.shares > 0)).all()
    assert shared.price.seconds == pytest.approx(price(problem, shared.shares), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(2, 4), places=st.integers(2, 4))
def test_no_copies_reach_fewer_places_than_the_pairs_allow(
    seed: int, top_k: int, places: int
) -> None:
    random = np.random.default_rng(seed)
    tokens = random_tokens(seed, places, 6, top_k=top_k, tokens=20)
    sets = from_topk(tokens, "test").sets[0][0]
    together, counts = coactivation(sets, 6), sets.counts(6)
    load = counts.sum(axis=0)
    shares = random_shares(random, 6, places, 6)
    room = np.count_nonzero(shares, axis=0)
    pairs = float(np.einsum("ep,ef,fp->", shares, together, shares)) / 2
    within = most_pairs_within(
        spectrum(together, load, places), float((load @ shares).max()), float(load.sum())
    )
    assert pairs <= within * (1 + 1e-9)
    assert pairs <= most_pairs(together, room) * (1 + 1e-9)
    known = Reach(tokens=sets.num_tokens, assignments=float(load.sum()), pairs=within, at_home=0.0)
    reached = sets.reached_by_shares(shares)
    assert reached.sum() >= known.least(top_k) * (1 - 1e-9)
    away = replace(known, at_home=most_at_home(counts, room)).least(top_k)
    assert reached.sum() - np.trace(reached) >= away - 1e-9 * sets.num_tokens


@pytest.mark.parametrize("mode", SET_MODES)
@pytest.mark.parametrize(
    ("name", "ffn", "equal"),
    [
        ("slow shared NIC", 64, False),
        ("three hosts", 64, True),
        pytest.param("slow shared NIC", 4096, False, marks=pytest.mark.slow),
        pytest.param("three hosts", 4096, False, marks=pytest.mark.slow),
        pytest.param("three hosts", 64, False, marks=pytest.mark.slow),
        pytest.param("slow shared NIC", 4096, True, marks=pytest.mark.slow),
    ],
)
def test_bound_and_plan_against_all_layouts(
    name: str, mode: TransferMode, ffn: int, equal: bool
) -> None:
    topk = random_tokens(len(name) + ffn, 3, 4, tokens=20)
    rule = Replication(extra=1, equal_shares=equal)
    problem = token_problem(topk, 4, CLUSTERS[name], mode, ffn=ffn, replication=rule)
    best = brute_force(problem, [0.5] if equal else [0.2, 0.5, 0.8])
    solution = solve(problem)
    assert solution.bound_s <= best * (1 + 1e-9)
    assert solution.objective_s <= best * (1 + 1e-3)
    if equal:
        assert solution.objective_s >= best * (1 - 1e-9)


@pytest.mark.parametrize("mode", ["per-choice", *SET_MODES])
def test_groups_with_copies_against_all_layouts(mode: TransferMode) -> None:
    topk = random_tokens(2, 3, 4, tokens=20)
    rule = Replication(extra=1, equal_shares=True)
    problem = token_problem(
        topk, 4, CLUSTERS["slow shared NIC"], mode, groups=2, experts_per_gpu=3, replication=rule
    )
    best = brute_force(problem, [0.5])
    solution = solve(problem)
    assert keeps_groups(problem, solution.layers[0].shares > 0)
    assert solution.bound_s <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= solution.objective_s <= best * (1 + 1e-3)
    free_s = solution.layers[0].free_bound_s
    assert (free_s is not None) == (mode == "per-choice")
    if free_s is not None:
        anywhere = brute_force(replace(problem, keep_groups=False), [0.5])
        assert free_s <= anywhere * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gpus=st.sampled_from([(2, 2), (2, 1, 1)]),
    extra=st.integers(1, 6),
    equal=st.booleans(),
    mode=st.sampled_from(["per-choice", *SET_MODES]),
    kept=st.sampled_from(["nothing", "groups", "a host"]),
)
def test_layouts_keep_all_rules_above_the_bound(
    seed: int, gpus: tuple[int, ...], extra: int, equal: bool, mode: TransferMode, kept: str
) -> None:
    survive = kept == "a host"
    rule = Replication(
        extra=6 if survive else extra, equal_shares=equal, survive_hosts=int(survive)
    )
    groups = 3 if kept == "groups" else 1
    problem = token_problem(
        random_tokens(seed, 4, 6, top_k=3),
        6,
        tiny_cluster(gpus, nic_rate="50Gb/s"),
        mode,
        experts_per_gpu=4,
        groups=groups,
        replication=rule,
        ffn=1024,
    )
    solution = solve(problem, limit_s=0.3)
    shares = solution.layers[0].shares
    assert shares.sum(axis=1) == pytest.approx(1.0)
    held = shares > 0
    assert held.sum() <= problem.copies_per_layer
    assert held.sum(axis=0).max() <= 4
    assert keeps_groups(problem, held)
    if survive:
        assert all(len(set(problem.host_of_gpu[row])) > 1 for row in held)
    if equal:
        assert shares[held] == pytest.approx((held / held.sum(axis=1, keepdims=True))[held])
    assert solution.bound_s <= solution.objective_s == pytest.approx(price(problem, shares))


def test_a_copy_of_the_hot_expert_takes_half_of_it_where_compute_binds() -> None:
    topk = random_tokens(0, 4, 4, tokens=40)
    topk[..., 0] = 0  # every token chooses expert 0
    topk[..., 1] = 1 + topk[..., 1] % 3
    few = token_problem(topk, 4, tiny_cluster(), "node-dedup", ffn=65536)
    alone = with_tokens(few, 1000.0)
    both = replace(alone, replication=Replication(extra=2))
    first, second = (solve(both, gap=0.2) for _ in range(2))
    assert first.objective_s < 0.65 * solve(alone).objective_s
    assert first.layers[0].shares.tobytes() == second.layers[0].shares.tobytes()


def test_a_light_copy_makes_room_where_one_of_the_hot_expert_helps() -> None:
    topk = random_tokens(0, 2, 4, top_k=1, tokens=40)
    topk[..., 0] = np.where(np.arange(40) < 28, 0, 1 + topk[..., 0] % 3)
    problem = with_tokens(token_problem(topk, 4, tiny_cluster((2,)), "direct", ffn=65536), 1000.0)
    rules = CopyRules(
        allowed=np.ones((4, 2), dtype=bool),
        capacity=np.full(2, 3),
        most_copies=5,
        host_of_gpu=problem.host_of_gpu,
        least_hosts=1,
        equal_shares=False,
    )
    alone = np.eye(2)[[0, 1, 1, 1]]  # no slot is free but beside the hot expert
    state = CopyState(SetRowBuilder(problem).layer(0), alone)
    search = CopySearch(state, rules, time.monotonic() + 20.0)
    more = search._added(state)
    assert more is not None
    assert (more.shares[0] > 0).all()
    assert more.held.tolist() == [2, 3]
    assert more.price.seconds == pytest.approx(price(problem, more.shares), rel=1e-9)
    search.improve()
    work = problem.counts[0, 0].sum(axis=0) @ search.state.shares
    assert work == pytest.approx(work.mean(), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(0, 12))
def test_copies_stay_on_the_hosts_of_their_groups(seed: int, extra: int) -> None:
    random = np.random.default_rng(seed)
    hosts, capacity = np.array([0, 0, 0, 1, 1]), np.array([3, 2, 3, 4, 3])
    host_of_expert = random.permutation(np.repeat([0, 1], [6, 5]))
    load = np.ceil(random.lognormal(4.0, 1.5, 11))
    shares = copies_in_hosts(load, host_of_expert, hosts, capacity, extra)
    held = shares > 0
    assert shares.sum(axis=1) == pytest.approx(1.0)
    assert (held.sum(axis=0) <= capacity).all()
    assert held.sum() <= 11 + extra
    assert (hosts[np.nonzero(held)[1]] == host_of_expert[np.nonzero(held)[0]]).all()


def test_whole_groups_that_survive_their_host_are_refused() -> None:
    rule = Replication(extra=4, survive_hosts=1)
    with pytest.raises(InputError) as caught:
        token_problem(
            random_tokens(0, 4, 4), 4, tiny_cluster(), "node-dedup", groups=2, replication=rule
        )
    assert "--survive 1-host cannot be had with --keep-groups" in str(caught.value)
    assert "leave out --keep-groups" in str(caught.value)


@pytest.mark.parametrize("mode", SET_MODES)
def test_the_plan_says_what_is_priced_and_the_simulator_prices_the_same(
    mode: TransferMode,
) -> None:
    cluster, topk = tiny_cluster((2, 2)), random_tokens(5, 4, 8, top_k=3)
    rule = Replication(extra=4)
    problem = token_problem(
        topk, 8, cluster, mode, experts_per_gpu=4, ffn=16384, groups=2, replication=rule
    )
    problem = with_tokens(problem, 1000.0)
    solution = solve(problem, limit_s=2.0)
    plan = token_plan(problem, token_traffic(topk, 8), solution, cluster)
    assert plan.share_of_slot is not None
    assert plan.workload.keep_groups
    assert plan.certificate.scope == (
        "all placements with 4 replicas or fewer of any experts, with any shares of their "
        "traffic, whole routing groups with all their copies on a host, and at most 4 of a layer "
        f"on a GPU, on these 4 GPUs and this traffic, with transfer {mode}"
    )
    said = " ".join(plan.assumptions)
    assert "each of a token's choices goes to one of its expert's copies at random" in said
    priced = solution.layers[0].evaluation.worst
    simulated = simulated_transfers(problem, solution.layers[0].shares)
    assert simulated == pytest.approx((priced.dispatch.seconds, priced.combine.seconds), rel=1e-12)
