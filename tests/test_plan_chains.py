"""Chains of GPUs: what each step promises, on small random layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.chains import (
    Chains,
    Floats,
    Ints,
    falling_order,
    fill,
    fill_copies,
    least_level,
    pick,
)
from epplan.planner.pour import pour
from epplan.planner.swaps import swap

LAYERS = 2
LOAD = st.one_of(st.sampled_from([0.0, 1.0, 50.0]), st.floats(2**-20, 100, width=32))


@st.composite
def filled(draw: st.DrawFn) -> Chains:
    """Return chains of any sizes, filled with items of any loads."""
    slots, num_chains = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=num_chains, max_size=num_chains))
    num_items = sum(sizes) * (slots - 1) + num_chains
    size = np.array([sizes, sizes[::-1]])
    amount = draw(st.lists(LOAD, min_size=LAYERS * num_items, max_size=LAYERS * num_items))
    load = np.array(amount).reshape(LAYERS, num_items)
    mean = load.sum(axis=1, keepdims=True) / sum(sizes)
    load = -np.sort(-load / np.where(mean > 0, mean, 1), axis=1)
    return fill(load, size, slots, *least_level(load, size, slots))


def contents(chains: Chains, layer: int) -> list[list[int]]:
    """Return the items of every chain, empty slots left out."""
    empty = chains.load.shape[1] - 1
    held = np.split(chains.item[:, layer], np.cumsum(chains.size[layer])[:-1], axis=1)
    return [sorted(items[items < empty].tolist()) for items in held]


def levels(chains: Chains, layer: int) -> list[float]:
    loads = [chains.load[layer, items].sum() for items in contents(chains, layer)]
    return [float(load) for load in np.array(loads) / chains.size[layer]]


@settings(max_examples=100, deadline=None)
@given(chains=filled())
def test_every_item_is_in_a_chain_that_has_room_for_it(chains: Chains) -> None:
    slots, num_items = len(chains.item), chains.load.shape[1] - 1
    for _ in ("filled", "swapped"):
        for layer in range(LAYERS):
            held = contents(chains, layer)
            assert sorted(item for items in held for item in items) == list(range(num_items))
            assert [len(items) for items in held] == (chains.size[layer] * (slots - 1) + 1).tolist()
        swap(chains, None)


@settings(max_examples=100, deadline=None)
@given(chains=filled())
def test_swaps_never_raise_the_heaviest_chain(chains: Chains) -> None:
    before = [max(levels(chains, layer)) for layer in range(LAYERS)]
    swap(chains, None)
    after = [max(levels(chains, layer)) for layer in range(LAYERS)]
    assert all(new <= old * (1 + 1e-5) for new, old in zip(after, before, strict=True))


@settings(max_examples=200, deadline=None)
@given(chains=filled())
def test_poured_gpus_have_their_chains_level_whatever_the_loads(chains: Chains) -> None:
    num_items = chains.load.shape[1] - 1
    expected = [levels(chains, layer) for layer in range(LAYERS)]
    part = pour(chains)
    assert part.min() >= 0
    assert chains.item.max() < num_items
    for layer in range(LAYERS):
        level = np.repeat(expected[layer], chains.size[layer])
        assert part[:, layer].sum(axis=0) == pytest.approx(level, abs=1e-9)
        total = np.bincount(chains.item[:, layer].ravel(), part[:, layer].ravel(), num_items)
        assert total == pytest.approx(chains.load[layer, :-1], abs=1e-9)
        for held in chains.item[:, layer].T.tolist():
            assert len(set(held)) == len(held)


@settings(max_examples=100, deadline=None)
@given(st.lists(LOAD, min_size=1, max_size=40))
def test_falling_order_is_a_stable_sort(amount: list[float]) -> None:
    rows = np.array([amount, amount[::-1]])
    assert (falling_order(rows) == np.argsort(-rows, axis=1, kind="stable")).all()


def test_the_lightest_items_go_to_the_chains_that_set_the_level() -> None:
    """Chain 1 is above the mean by itself; the hotter chain of five GPUs has room."""
    load = np.array([[3.0, 1.9, 0.4, 0.3, 0.2, 0.1, 0.1, 0.0]])
    size = np.array([[5, 1]])
    goal, sets_goal = least_level(load, size, 2)
    assert (goal.tolist(), sets_goal.tolist()) == ([pytest.approx(1.9)], [[False, True]])
    assert contents(fill(load, size, 2, goal, sets_goal), 0)[1] == [1, 7]


def copies(counts: list[int], amount: list[float]) -> tuple[Floats, Ints]:
    each = np.repeat(np.array([amount]) / counts, counts, axis=1)
    order = falling_order(each)
    return pick(each, order), pick(np.repeat([np.arange(len(counts))], counts, axis=1), order)


@pytest.mark.parametrize("gpus", [2, 3, 6])
def test_copies_are_on_different_gpus(gpus: int) -> None:
    counts = {2: [2, 2, 1, 1], 3: [3, 2, 2, 1, 1], 6: [5, 6, 4, 2, 1]}[gpus]
    load, expert = copies(counts, [9.0, 8.0, 5.0, 2.0, 2.0][: len(counts)])
    chains = fill_copies(load, expert, gpus)
    for _ in ("filled", "swapped"):
        held = pick(expert, chains.item)[:, 0].T.tolist()
        assert all(len(set(experts)) == len(experts) for experts in held)
        swap(chains, expert)
