"""Rebalancing from a present table: sound, no worse than the fast rebalance, and with few moves."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.moves.relayout import EMPTY, Floats, Ints, Layout, num_moves, price, relayout
from epplan.planner.moves.slot_transfers import layer_transfers
from epplan.planner.rebalance import rebalance


def present(random: np.random.Generator, experts: int, gpus: int, each: int) -> Layout:
    """Return a random valid table: every expert once, copies where slots are left."""
    while True:
        slots = np.full((gpus, each), EMPTY)
        for expert in random.permutation(experts):
            gpu = int(np.argmax((slots == EMPTY).sum(axis=1) + random.random(gpus)))
            slots[gpu, int(np.argmax(slots[gpu] == EMPTY))] = expert
        for gpu in range(gpus):
            for slot in range(each):
                extra = int(random.integers(experts))
                if slots[gpu, slot] == EMPTY and random.random() < 0.5 and extra not in slots[gpu]:
                    slots[gpu, slot] = extra
        expert = slots.ravel()
        copies = np.bincount(expert[expert != EMPTY], minlength=experts)
        if copies.min() > 0:
            share = np.where(expert == EMPTY, 0.0, 1 / copies[expert])
            return Layout(expert=expert, share=share, heaviest=0.0)


def assert_sound(table: Layout, rows: Floats, gpus: int) -> None:
    load = rows.sum(axis=0)
    held = table.expert != EMPTY
    assert np.bincount(table.expert[held], table.share[held], len(load)) == pytest.approx(1.0)
    assert (table.share[~held] == 0).all()
    assert table.share.min() >= 0
    for own in table.expert.reshape(gpus, -1):
        real = own[own != EMPTY].tolist()
        assert len(set(real)) == len(real)
    priced = price(table.expert, table.share, load, gpus)
    assert priced.heaviest == pytest.approx(table.heaviest)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.integers(2, 10),
    gpus=st.integers(1, 5),
    spare=st.integers(0, 2),
    may_replicate=st.booleans(),
)
def test_every_table_is_sound_and_as_even_as_the_fast_rebalance(
    seed: int, experts: int, gpus: int, spare: int, may_replicate: bool
) -> None:
    random = np.random.default_rng(seed)
    each = min(experts, -(-experts // gpus) + spare)
    rows = random.integers(0, 100, (gpus, experts)).astype(float) * random.random(experts) ** 3
    old = present(random, experts, gpus, each)
    hosts = tuple(f"h{gpu // 2}" for gpu in range(gpus))
    new = relayout(rows, old, gpus, hosts, may_replicate=may_replicate, min_gain=0.0)
    assert_sound(new, rows, gpus)
    before = price(old.expert, old.share, rows.sum(axis=0), gpus).heaviest
    assert new.heaviest <= before * (1 + 1e-9)
    if may_replicate:
        fast = rebalance(rows.sum(axis=0)[None], gpus * each, gpus).gpu_load.max()
        assert new.heaviest <= fast * 1.0101 + 1e-9


def test_nothing_moves_when_nothing_is_gained() -> None:
    rows = np.ones((4, 8))
    old = Layout(expert=np.arange(8), share=np.ones(8), heaviest=0)
    new = relayout(rows, old, 4, ("a",) * 4, may_replicate=True, min_gain=0.0)
    assert (new.expert == old.expert).all()
    one_hot = rows * np.eye(1, 8)  # no placement evens out a single hot expert
    new = relayout(one_hot, old, 4, ("a",) * 4, may_replicate=True, min_gain=0.01)
    assert (new.expert == old.expert).all()


def test_a_gain_below_the_least_one_is_left() -> None:
    load = np.array([4.0, 4, 3, 3, 3, 3, 3, 2])
    old = Layout(expert=np.arange(8), share=np.ones(8), heaviest=0)
    arguments = (load[None].repeat(4, axis=0), old, 4, ("a",) * 4)
    left = relayout(*arguments, may_replicate=True, min_gain=0.5)
    assert num_moves(old, left, 4) == 0
    taken = relayout(*arguments, may_replicate=True, min_gain=0.05)
    assert num_moves(old, taken, 4) == 2  # one swap
    assert taken.heaviest < left.heaviest


def test_replicas_may_only_need_other_shares() -> None:
    rows = np.array([[10.0, 5, 10, 5], [10, 5, 0, 0], [10, 0, 0, 5]])
    old = Layout(
        expert=np.array([0, 1, 0, 2, 0, 3]),
        share=np.array([1.0, 1, 0, 1, 0, 1]),
        heaviest=0,
    )
    new = relayout(rows, old, 3, ("a",) * 3, may_replicate=True, min_gain=0.01)
    assert (new.expert == old.expert).all()
    assert new.heaviest == pytest.approx(20.0)


def fewest_moves(old: Layout, load: Floats, gpus: int, heaviest: float) -> int:
    """Return the fewest moves to any table without copies that is at most this heavy."""
    best = len(load)
    for order in permutations(range(len(load))):
        expert: Ints = np.array(order)
        table = price(expert, np.ones(len(load)), load, gpus)
        if table.heaviest <= heaviest * (1 + 1e-9):
            best = min(best, num_moves(old, table, gpus))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_moves_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    load = random.lognormal(0, 1, 6)
    old = Layout(expert=np.arange(6), share=np.ones(6), heaviest=0)
    new = relayout(
        load[None].repeat(3, axis=0), old, 3, ("a",) * 3, may_replicate=False, min_gain=0.0
    )
    assert num_moves(old, new, 3) <= fewest_moves(old, 3 * load, 3, new.heaviest) + 1


def test_far_fewer_moves_than_the_fast_rebalance_at_deepseek_size() -> None:
    random = np.random.default_rng(0)
    load = random.lognormal(0, 1, 256)
    first = rebalance(load[None], 256, 32)
    old = Layout(expert=first.expert_of_slot[0], share=np.ones(256), heaviest=0)
    drifted = load * random.lognormal(0, 0.1, 256)
    rows = np.repeat(drifted[None] / 32, 32, axis=0)
    hosts = tuple(f"h{gpu // 8}" for gpu in range(32))
    new = relayout(rows, old, 32, hosts, may_replicate=True, min_gain=0.01)
    fast = rebalance(drifted[None], 256, 32)
    anew = Layout(expert=fast.expert_of_slot[0], share=fast.share_of_slot[0], heaviest=0)
    assert new.heaviest <= float(fast.gpu_load.max()) * 1.0101
    assert num_moves(old, new, 32) < num_moves(old, anew, 32) / 3


def test_transfers_come_from_the_own_host_and_spread() -> None:
    hosts = ("a", "a", "b", "b")
    old = (0, 1, 0, 2, 0, 3, None, None)
    new = (0, 1, 2, 0, 0, 3, 0, 1)
    found = layer_transfers(5, old, new, 2, hosts)
    assert [(t.expert, t.source_slot, t.target_slot) for t in found] == [(0, 4, 6), (1, 1, 7)]
    assert {t.layer for t in found} == {5}
    many = layer_transfers(0, (0, 0, None, None), (0, 0, 0, 0), 1, ("a", "a", "a", "a"))
    assert [(t.source_slot, t.target_slot) for t in many] == [(0, 2), (1, 3)]
