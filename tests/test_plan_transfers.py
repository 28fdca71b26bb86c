"""Transfer modes: what they send, and the solver against brute force for each."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InfeasibleError, InputError
from epplan.planner.cost import evaluate_layer, one_copy, rows_sent
from epplan.planner.forwarding import entry_ranks, path_latency, through_islands
from epplan.planner.objective import Objective
from epplan.planner.placement.levels import LayerPlacement
from epplan.planner.plan import TransferMode
from epplan.planner.problem import Problem, make_problem
from epplan.planner.routing_trace import from_topk
from epplan.planner.solve import Solution, solve_placement
from epplan.planner.together.pair_bound import Reach, coactivation, most_at_home, most_pairs
from epplan.planner.together.set_rows import SetRowBuilder
from epplan.planner.together.set_search import SetSearch
from tests.tiny import all_placements, price, tiny_cluster
from tests.tokens import (
    random_tokens,
    simulated_transfers,
    token_model,
    token_plan,
    token_problem,
    token_traffic,
)

CLUSTERS = {
    "two hosts": tiny_cluster((2, 2)),
    "slow shared NIC": tiny_cluster((2, 1), nic_rate="25Gb/s"),
    "two leafs": tiny_cluster((1, 1, 1), leafs=2),
    "mixed GPUs": tiny_cluster((2, 1), models=("h100-sxm", "l40s")),
    "one host": tiny_cluster((3,)),
}
SET_MODES: list[TransferMode] = ["direct", "node-dedup"]


def solve(problem: Problem, gap: float = 0.0, limit_s: float = 60.0) -> Solution:
    return solve_placement(
        problem, gap=gap, time_limit_s=limit_s, seed=0, progress=lambda line: None
    )


@pytest.mark.parametrize("mode", SET_MODES)
@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("overlap", "windows", "worst"),
    [
        (False, 1, 1.0),
        pytest.param(True, 2, 1.0, marks=pytest.mark.slow),
        pytest.param(False, 2, 0.5, marks=pytest.mark.slow),
        pytest.param(True, 1, 1.0, marks=pytest.mark.slow),
    ],
)
def test_solver_finds_the_optimum(
    name: str, mode: TransferMode, overlap: bool, windows: int, worst: float
) -> None:
    cluster = CLUSTERS[name]
    topk = random_tokens(len(name) + windows, len(cluster.gpus()), 4, windows=windows)
    objective = Objective(overlap=overlap, worst=worst)
    problem = token_problem(topk, 4, cluster, mode, objective=objective, ffn=512)
    best = min(price(problem, placement) for placement in all_placements(problem))
    solution = solve(problem)
    assert solution.bound_s <= best * (1 + 1e-6)
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.status == "optimal"
    assert solution.bound_s == pytest.approx(best, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gpus=st.sampled_from([(2, 2), (3, 1), (1, 1, 2), (4,)]),
    nics=st.integers(1, 2),
    leafs=st.integers(1, 2),
    mode=st.sampled_from(SET_MODES),
    same_mix=st.booleans(),
)
def test_rows_and_every_step_price_like_the_evaluator(
    seed: int, gpus: tuple[int, ...], nics: int, leafs: int, mode: TransferMode, same_mix: bool
) -> None:
    cluster = tiny_cluster(gpus, nics=nics, leafs=leafs, models=("h100-sxm", "l40s"))
    topk = random_tokens(seed, 4, 6, top_k=3)
    problem = token_problem(topk, 6, cluster, mode, experts_per_gpu=3, ffn=2048)
    if same_mix:
        problem = one_source(problem)
    layer, ranks = SetRowBuilder(problem).layer(0), problem.num_ranks
    random = np.random.default_rng(seed)
    placement = random.permutation(np.repeat(np.arange(ranks), 3))[:6]
    search = SetSearch(layer, placement, np.full(ranks, 3))
    for _ in range(2):
        now = search.placement.copy()
        assert search.seconds == pytest.approx(price(problem, now), rel=1e-9)
        assert layer.floor_s <= search.seconds * (1 + 1e-9)
        expert = int(random.integers(6))
        seconds, _ = search._after(expert)
        for step in np.flatnonzero(search._allowed(expert)).tolist():
            after = now.copy()
            if step < 6:
                after[[expert, step]] = now[[step, expert]]
            else:
                after[expert] = step - 6
            assert seconds[step] == pytest.approx(price(problem, after), rel=1e-9)
        search.descend(lambda: False)
        assert np.bincount(search.placement, minlength=ranks).max() <= 3


def one_source(problem: Problem) -> Problem:
    """Return the problem with the same mix on all ranks."""
    assert problem.sets is not None
    sets = tuple(
        tuple(replace(layer, source=np.zeros_like(layer.source), num_sources=1) for layer in window)
        for window in problem.sets
    )
    mean = problem.counts.mean(axis=2, keepdims=True)
    return replace(problem, sets=sets, counts=np.repeat(mean, problem.num_ranks, axis=2))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), gpus=st.sampled_from([(2, 2), (3, 1), (1, 3), (2, 1, 1)]))
def test_fewer_rows_from_choices_to_ranks_to_islands(seed: int, gpus: tuple[int, ...]) -> None:
    cluster, topk = tiny_cluster(gpus), random_tokens(seed, 4, 8, top_k=3)
    placement = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 2))
    shares = one_copy(placement, 4)
    problems = {m: token_problem(topk, 8, cluster, m) for m in ("per-choice", *SET_MODES)}
    sent = {mode: rows_sent(problem, 0, 0, shares) for mode, problem in problems.items()}
    island = problems["direct"].routes.island
    network = island[:, None] != island[None, :]
    crossing = [(sent[mode] * network).sum() for mode in ("node-dedup", "direct", "per-choice")]
    assert crossing == sorted(crossing)
    # Every token reaches what it chose, forwarded or not, and the experts' work is the same.
    assert (sent["node-dedup"] * ~network).sum() == pytest.approx(sent["direct"].sum())
    tokens = topk[0, 0]
    expected = np.zeros((4, 4))
    for source, rank in np.ndindex(4, 4):
        expected[source, rank] = (placement[tokens[source]] == rank).any(axis=1).sum()
    assert sent["direct"] == pytest.approx(expected)
    compute = {evaluate_layer(p, 0, shares).worst.compute.seconds for p in problems.values()}
    assert len(compute) == 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_direct_with_one_expert_a_gpu_is_per_choice(seed: int) -> None:
    cluster, topk = CLUSTERS["two hosts"], random_tokens(seed, 4, 4)
    direct, each = (token_problem(topk, 4, cluster, m) for m in ("direct", "per-choice"))
    placement = np.random.default_rng(seed).permutation(4)
    assert price(direct, placement) == pytest.approx(price(each, placement), rel=1e-12)
    alone = token_problem(topk, 4, cluster, "direct", experts_per_gpu=1)
    assert alone.sets is None
    assert price(alone, placement) == price(each, placement)


def test_a_row_enters_at_the_rank_with_the_senders_number() -> None:
    island = np.array([0, 0, 0, 1, 1])
    assert entry_ranks(island).tolist() == [[0, 3], [1, 4], [2, 3], [0, 3], [1, 4]]
    to_rank, to_island = np.zeros((5, 5)), np.zeros((5, 2))
    to_rank[2, [3, 4]], to_island[2, 1] = (5.0, 7.0), 9.0  # 9 tokens, 3 of them for both ranks
    sent = through_islands(to_rank, to_island, island)
    assert sent[2, 3] == 9.0
    assert sent[3, 3] == 5.0  # rank 3 keeps what is for itself
    assert sent[3, 4] == 7.0
    assert sent.sum() == 21.0
    latency = np.where(island[:, None] == island, 1e-6, 5e-6) * ~np.eye(5, dtype=bool)
    paths = path_latency(latency, island)
    assert paths[2, 4] == pytest.approx(6e-6)  # over rank 3
    assert paths[2, 3] == pytest.approx(5e-6)
    assert paths[0, 1] == pytest.approx(1e-6)


@pytest.mark.parametrize("mode", SET_MODES)
def test_more_bandwidth_and_other_names_change_nothing_for_the_worse(mode: TransferMode) -> None:
    topk = random_tokens(7, 4, 6)
    times = [
        solve(token_problem(topk, 6, tiny_cluster(nic_rate=f"{rate}Gb/s"), mode)).objective_s
        for rate in (50, 200, 400)
    ]
    assert times == sorted(times, reverse=True)
    cluster = tiny_cluster()
    first = solve(token_problem(topk, 6, cluster, mode)).objective_s
    hosts_swapped = solve(token_problem(topk[:, :, [2, 3, 0, 1]], 6, cluster, mode)).objective_s
    assert first == pytest.approx(hosts_swapped, rel=1e-6)
    gpus_swapped = solve(token_problem(topk[:, :, [1, 0, 3, 2]], 6, cluster, mode)).objective_s
    assert first == pytest.approx(gpus_swapped, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(2, 3), places=st.integers(2, 3))
def test_no_placement_reaches_fewer_places_than_the_pairs_allow(
    seed: int, top_k: int, places: int
) -> None:
    tokens = random_tokens(seed, places, 6, top_k=top_k)
    sets = from_topk(tokens, "test").sets[0][0]
    random = np.random.default_rng(seed)
    room = random.integers(1, 4, places)
    room[0] += max(0, 6 - room.sum())
    together, counts = coactivation(sets, 6), sets.counts(6)
    pairs = most_pairs(together, room)
    known = Reach(tokens=sets.num_tokens, assignments=float(counts.sum()), pairs=pairs, at_home=0.0)
    everywhere = known.least(top_k)
    away = replace(known, at_home=most_at_home(counts, room)).least(top_k)
    for choice in np.ndindex(*[places] * 6):
        place = np.array(choice)
        if (np.bincount(place, minlength=places) > room).any():
            continue
        inside = sum(together[e, f] for e, f in combinations(range(6), 2) if place[e] == place[f])
        reached = sets.reached(place, places)
        assert inside <= pairs * (1 + 1e-9)
        assert reached.sum() >= everywhere * (1 - 1e-9)
        assert reached.sum() - np.trace(reached) >= away - 1e-9 * sets.num_tokens


@pytest.mark.parametrize("mode", ["per-choice", *SET_MODES])
def test_groups_stay_whole(mode: TransferMode) -> None:
    cluster, topk = tiny_cluster((2, 2)), random_tokens(3, 4, 8, top_k=3)
    problem = token_problem(topk, 8, cluster, mode, groups=4)
    allowed = []
    for first, second in combinations(range(4), 2):
        hosts = np.ones(8, dtype=int)
        hosts[[2 * first, 2 * first + 1, 2 * second, 2 * second + 1]] = 0
        allowed.append(hosts)
    best = min(price(problem, placement) for placement in all_placements_of(problem, allowed))
    solution = solve(problem)
    hosts = solution.layers[0].shares.argmax(axis=1) // 2
    assert (hosts[::2] == hosts[1::2]).all()
    assert solution.bound_s <= best * (1 + 1e-9)
    assert solution.objective_s >= best * (1 - 1e-9)
    if solution.status == "optimal":
        assert solution.objective_s == pytest.approx(best, rel=1e-6)


def all_placements_of(problem: Problem, hosts_of_expert: list[np.ndarray]) -> list[np.ndarray]:
    """Return every placement of 8 experts on 2 hosts of 2 GPUs for these hosts of experts."""
    found = []
    for hosts in hosts_of_expert:
        own, others = np.flatnonzero(hosts == 0), np.flatnonzero(hosts == 1)
        for first in combinations(own.tolist(), 2):
            for second in combinations(others.tolist(), 2):
                placement = 2 * hosts + 1
                placement[list(first)] = 0
                placement[list(second)] = 2
                found.append(placement)
    return found


def test_groups_that_fit_nowhere_are_refused_with_numbers() -> None:
    topk = random_tokens(0, 4, 8)
    problem = token_problem(topk, 8, tiny_cluster((3, 1)), "per-choice", groups=2)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    assert "layer 0 has 2 routing groups of 4 experts, and the hosts hold 1 whole ones" in str(
        caught.value
    )
    assert "h0 has room for 6 experts of a layer: 1 groups" in str(caught.value)
    assert "h1 has room for 2 experts of a layer: 0 groups" in str(caught.value)
    with pytest.raises(InputError, match="has one group; there is nothing to keep together"):
        make_problem(
            tiny_cluster(),
            tuple(tiny_cluster().gpus()),
            token_model(topk, 8),
            token_traffic(topk, 8),
            2,
            keep_groups=True,
        )


@pytest.mark.parametrize("mode", SET_MODES)
def test_the_plan_names_its_transfer_and_the_simulator_prices_the_same(mode: TransferMode) -> None:
    cluster, topk = tiny_cluster((2, 2)), random_tokens(5, 4, 8, top_k=3)
    problem, traffic = token_problem(topk, 8, cluster, mode), token_traffic(topk, 8)
    solution = solve(problem, gap=1.0)
    plan = token_plan(problem, traffic, solution, cluster)
    assert plan.workload.transfer == mode
    assert plan.certificate.scope.endswith(f"with transfer {mode}")
    priced = solution.layers[0].evaluation.worst
    simulated = simulated_transfers(problem, solution.layers[0].shares)
    assert simulated == pytest.approx((priced.dispatch.seconds, priced.combine.seconds), rel=1e-12)


@pytest.mark.parametrize("mode", SET_MODES)
def test_the_limit_is_kept_and_said(mode: TransferMode) -> None:
    topk = random_tokens(1, 8, 32, top_k=4, tokens=300)
    problem = token_problem(topk, 32, tiny_cluster((4, 4)), mode, experts_per_gpu=4)
    solution = solve(problem, limit_s=0.3)
    assert solution.status == "limit"
    assert 0 < solution.gap < 1
    assert solution.seconds < 15
    again = solve(problem, gap=0.9)
    assert again.layers[0].shares.tobytes() == solve(problem, gap=0.9).layers[0].shares.tobytes()


def test_ctrl_c_keeps_what_the_search_found(monkeypatch: pytest.MonkeyPatch) -> None:
    topk = random_tokens(1, 8, 32, top_k=4, tokens=100)
    problem = token_problem(topk, 32, tiny_cluster((4, 4)), "direct", experts_per_gpu=4)

    def stopped(*_: object) -> LayerPlacement:
        raise KeyboardInterrupt

    monkeypatch.setattr("epplan.planner.together.set_levels._shaken", stopped)
    solution = solve(problem)
    assert solution.interrupted
    assert solution.objective_s < solution.layers[0].contiguous_s * 0.95
    assert 0 < solution.bound_s <= solution.objective_s
