"""The fast rebalance: what must hold for any load, and how good it is where that is known."""

from itertools import combinations, product
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from epplan.errors import InputError
from epplan.planner.chains import Floats
from epplan.planner.copies.balance_bound import least_maximum
from epplan.planner.rebalance import Rebalanced, rebalance

Shares = Literal["free", "equal"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, int, int]:
    """Return a load [2, E], slots and GPUs that fit."""
    experts, gpus = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    each = draw(st.integers(-(-experts // gpus), experts))
    some = st.one_of(st.sampled_from([0.0, 1.0, 100.0]), st.floats(0.001, 1000))
    load = draw(st.lists(some, min_size=2 * experts, max_size=2 * experts))
    return np.array(load).reshape(2, experts), each * gpus, gpus


def assert_sound(load: Floats, slots: int, gpus: int, done: Rebalanced) -> None:
    layers, experts = load.shape
    assert done.expert_of_slot.shape == done.share_of_slot.shape == (layers, slots)
    for layer in range(layers):
        expert, share = done.expert_of_slot[layer], done.share_of_slot[layer]
        assert np.bincount(expert, share, experts) == pytest.approx(np.ones(experts))
        assert share.min() >= 0
        for held in expert.reshape(gpus, -1):
            assert len(set(held.tolist())) == len(held)  # no expert twice on a GPU
        on_gpu = (share * load[layer, expert]).reshape(gpus, -1).sum(axis=1)
        assert done.gpu_load[layer] == pytest.approx(on_gpu)


@settings(max_examples=150, deadline=None)
@given(case=cases(), shares=st.sampled_from(["free", "equal"]))
def test_every_layout_is_sound(case: tuple[Floats, int, int], shares: Shares) -> None:
    load, slots, gpus = case
    done = rebalance(load, slots, gpus, shares=shares)
    assert_sound(load, slots, gpus, done)
    again = rebalance(load, slots, gpus, shares=shares)
    assert (again.expert_of_slot == done.expert_of_slot).all()
    assert (again.share_of_slot == done.share_of_slot).all()
    assert ((done.balance > 0) & (done.balance <= 1 + 1e-9)).all()


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_enough_replicas_balance_any_load_exactly(case: tuple[Floats, int, int]) -> None:
    """With G - 1 splits all GPUs are one chain."""
    load, _, gpus = case
    experts = load.shape[1]
    each = -(-(experts + gpus - 1) // gpus)
    if each <= experts:
        assert rebalance(load, each * gpus, gpus).balance == pytest.approx(1.0, rel=1e-6)


def test_layers_do_not_depend_on_each_other_nor_on_the_unit() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (4, 16))
    whole = rebalance(load, 24, 8)
    alone = rebalance(load[2:3] * 1000, 24, 8)
    assert (whole.expert_of_slot[2] == alone.expert_of_slot[0]).all()


def optimum(load: Floats, slots: int, gpus: int) -> float:
    """Return the least possible maximum GPU load with free shares, by trying every layout."""
    experts, each = len(load), slots // gpus
    best = np.inf
    for layout in product(combinations(range(experts), each), repeat=gpus):
        if len({expert for held in layout for expert in held}) < experts:
            continue
        places = [(gpu, expert) for gpu, held in enumerate(layout) for expert in held]
        on_gpu = [[load[e] * (g == gpu) for g, e in places] + [-1.0] for gpu in range(gpus)]
        whole = [[float(e == expert) for _, e in places] + [0.0] for expert in range(experts)]
        cost = [0.0] * len(places) + [1.0]
        result = linprog(
            cost, A_ub=on_gpu, b_ub=[0.0] * gpus, A_eq=whole, b_eq=[1.0] * experts, method="highs"
        )
        assert result.fun is not None
        best = min(best, float(result.fun))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("experts", "slots", "gpus"), [(4, 4, 2), (3, 4, 2), (4, 6, 3), (5, 6, 3)])
def test_close_to_the_optimum_of_tiny_cases(experts: int, slots: int, gpus: int, seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 1, experts)
    best = optimum(load, slots, gpus)
    reached = float(rebalance(load[None], slots, gpus).gpu_load.max())
    assert reached >= best * (1 - 1e-9)
    assert reached <= best * 1.12  # greedy and swaps; exact wherever the replicas make one chain
    bound = least_maximum(load, gpus, slots // gpus, slots)
    assert best * 0.8 <= bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_bound_holds_where_light_experts_fill_the_slots(seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 0.2, 5)
    load[0] *= 2 + seed / 2
    assert least_maximum(load, 3, 2, 6) <= optimum(load, 6, 3) * (1 + 1e-9)


def test_free_shares_are_not_worse_than_equal_ones_where_hot_experts_limit() -> None:
    load = np.stack([np.random.default_rng(s).permutation(1 / np.arange(1, 257)) for s in range(4)])
    free, equal = (rebalance(load, 288, 72, shares=shares).balance for shares in ("free", "equal"))
    assert (free >= equal * (1 - 1e-9)).all()


@pytest.mark.slow
def test_zipf_cannot_be_balanced_better_than_it_is() -> None:
    """Few copies: each further GPU of a hot expert fills its other slots with light ones."""
    load = 1 / np.arange(1, 257)
    bound = least_maximum(load, 72, 4, 288) / (load.sum() / 72)
    assert 1.10 < bound < 1 / float(rebalance(load[None], 288, 72).balance[0]) < 1.01 * bound


def greedy(load: Floats, slots: int, gpus: int) -> float:
    """Return the busiest GPU where copies and GPUs are dealt out one at a time.

    What EPLB does globally: a copy more for the most load per copy; then the heaviest copy to the
    lightest GPU with a free slot, even if that GPU has the expert.
    """
    count = np.ones(len(load))
    for _ in range(slots - len(load)):
        count[np.argmax(load / count)] += 1
    held, free = np.zeros(gpus), np.full(gpus, slots // gpus)
    for copy in np.sort(np.repeat(load / count, count.astype(int)))[::-1]:
        gpu = np.where(free > 0, held, np.inf).argmin()
        held[gpu] += copy
        free[gpu] -= 1
    return float(held.max())


@pytest.mark.parametrize("sigma", [0.3, 1, 1.5, 2])
@pytest.mark.parametrize(
    ("experts", "slots", "gpus"),
    [(256, 288, 72), (256, 288, 48), (256, 288, 144), (384, 416, 104), (60, 64, 32), (8, 16, 8)],
)
def test_never_worse_than_one_copy_at_a_time(
    experts: int, slots: int, gpus: int, sigma: float
) -> None:
    load = np.random.default_rng(1).lognormal(0, sigma, (3, experts))
    busiest = rebalance(load, slots, gpus).gpu_load.max(axis=1)
    assert (busiest <= [greedy(layer, slots, gpus) * (1 + 1e-9) for layer in load]).all()


def test_replicas_beyond_one_chain_help_when_loads_change() -> None:
    random = np.random.default_rng(3)
    load = random.lognormal(0, 1, (20, 32))
    later = load * random.lognormal(0, 0.3, load.shape)

    def judged(slots: int) -> float:
        done = rebalance(load, slots, 16)
        assert done.balance == pytest.approx(1.0)
        part = done.share_of_slot * np.take_along_axis(later, done.expert_of_slot, axis=1)
        on_gpu = part.reshape(20, 16, -1).sum(axis=2)
        return float((on_gpu.mean(axis=1) / on_gpu.max(axis=1)).mean())

    assert judged(64) > judged(48) + 0.02


@pytest.mark.parametrize("gpus", [32, 72])
@pytest.mark.parametrize("shares", ["free", "equal"])
def test_deepseek_size_is_balanced(gpus: int, shares: Shares) -> None:
    load = np.random.default_rng(1).lognormal(0, 1, (58, 256))
    assert rebalance(load, 288, gpus, shares=shares).balance.mean() >= 0.99


def test_degenerate_loads() -> None:
    idle = rebalance(np.zeros((1, 8)), 12, 4)
    assert_sound(np.zeros((1, 8)), 12, 4, idle)
    assert idle.balance.tolist() == [1.0]
    one_hot = np.eye(1, 8)
    assert rebalance(one_hot, 12, 4).balance == pytest.approx(1.0)
    assert rebalance(one_hot, 8, 4).balance == pytest.approx(0.25)  # no replica: it stays whole


@pytest.mark.parametrize(
    ("load", "slots", "gpus", "message"),
    [
        (np.ones(4), 4, 2, r"load is \[4\]; it must be \[layers, experts\], not empty"),
        (
            np.ones((1, 4)),
            5,
            2,
            "5 slots do not divide evenly among 2 GPUs\nhint: take 4 or 6 slots",
        ),
        (np.ones((1, 4)), 2, 2, r"2 slots for 4 experts on 2 GPUs; it must be 4 \(one each\) to 8"),
        (np.ones((1, 4)), 10, 2, r"10 slots for 4 experts on 2 GPUs"),
        (np.array([[1, -1.0]]), 2, 2, "load of expert 1 in layer 0 is -1.0; loads are finite and"),
        (np.array([[np.nan, 1]]), 2, 2, "load of expert 0 in layer 0 is nan"),
    ],
)
def test_bad_input(load: Floats, slots: int, gpus: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        rebalance(load, slots, gpus)
    assert caught.match(message)
