"""A better slot table that moves few experts: what rebalancing means while a model runs.

The fast rebalance (`rebalance.py`) finds how even the GPUs can be, from nothing. Here three tables
are compared that start from the present one, and of those that come within a percent of the best
the one with the fewest moves is taken:

    shares     the present slots; only the replicas' shares change, by a linear program
    swaps      the present slots, swapped between the heaviest GPU and others while it falls
    rebalance  the fast rebalance's table, its GPUs renamed so that most experts stay where they are
               (assignment problem; among equals, so that most rows stay on their host)

A layer whose heaviest GPU would not fall by `min_gain` is left alone.

    L layers . E experts . S slots . G GPUs . K = S / G slots a GPU . W = G source ranks
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment, linprog

from epplan.planner.rebalance import rebalance

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EMPTY = -1
_AS_GOOD = 1.01  # of the best table's heaviest GPU
_SIGNIFICANT = 1 - 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layer's slots and what they carry.

    Attributes:
        expert: of every slot, EMPTY where there is none, [S].
        share: part of its expert's rows that a slot takes, [S].
        heaviest: rows of the busiest GPU.
    """

    expert: Ints
    share: Floats
    heaviest: float


def relayout(
    rows: Floats,
    layout: Layout,
    num_gpus: int,
    hosts: tuple[str, ...],
    *,
    may_replicate: bool,
    min_gain: float,
) -> Layout:
    """Return the layer's next table, or `layout` itself if none is worth its moves.

    Args:
        rows: by source rank and expert, [W, E].
        layout: the present table; its `heaviest` need not be for these rows.
        num_gpus: G.
        hosts: of every GPU.
        may_replicate: whether empty slots may take copies.
        min_gain: least fall of the heaviest GPU's rows, as a part of them.
    """
    load = rows.sum(axis=0)
    now = price(layout.expert, layout.share, load, num_gpus)
    found = [now, *_swaps(now, load, num_gpus)]
    found.append(_rebalanced(now, rows, num_gpus, hosts, may_replicate))
    if np.count_nonzero(now.expert != EMPTY) > len(load):  # there are replicas
        poured = _poured(now.expert, load, num_gpus)
        swapped = list(_swaps(poured, load, num_gpus))
        found += [
            poured,
            *swapped,
            *(_poured(last.expert, load, num_gpus) for last in swapped[-1:]),
        ]
    best = min(table.heaviest for table in found)
    if best > now.heaviest * (1 - min_gain):
        return now
    good = [table for table in found if table.heaviest <= best * _AS_GOOD]
    return min(good, key=lambda table: (num_moves(now, table, num_gpus), table.heaviest))


def price(expert: Ints, share: Floats, load: Floats, num_gpus: int) -> Layout:
    """Return the table with its heaviest GPU for this load, [E]."""
    heaviest = _slot_load(expert, share, load).reshape(num_gpus, -1).sum(axis=1).max()
    return Layout(expert=expert, share=share, heaviest=float(heaviest))


def num_moves(old: Layout, new: Layout, num_gpus: int) -> int:
    """Return how many experts come to a GPU that has them not."""
    pairs = zip(old.expert.reshape(num_gpus, -1), new.expert.reshape(num_gpus, -1), strict=True)
    return sum(len(set(after.tolist()) - set(before.tolist()) - {EMPTY}) for before, after in pairs)


def _slot_load(expert: Ints, share: Floats, load: Floats) -> Floats:
    """Return the rows of every slot, [S]."""
    return np.where(expert == EMPTY, 0.0, share * np.append(load, 0.0)[expert])


def _poured(expert: Ints, load: Floats, num_gpus: int) -> Layout:
    """Return the same slots with the shares that make the heaviest GPU lightest.

    minimise t   with   sum of share x load on a GPU <= t,   shares of an expert add up to 1
    """
    slots = np.flatnonzero(expert != EMPTY)
    held, number = expert[slots], np.arange(len(slots))
    below = np.zeros((num_gpus, len(slots) + 1))
    below[slots // (len(expert) // num_gpus), number] = load[held] / max(1.0, load.mean())
    below[:, -1] = -1.0
    whole = np.zeros((len(load), len(slots) + 1))
    whole[held, number] = 1.0
    solution = linprog(
        np.append(np.zeros(len(slots)), 1.0),
        A_ub=below,
        b_ub=np.zeros(num_gpus),
        A_eq=whole,
        b_eq=np.ones(len(load)),
        method="highs",
    )
    assert solution.x is not None, solution.message  # equal shares are always feasible
    share = np.zeros(len(expert))
    share[slots] = np.clip(solution.x[:-1], 0.0, 1.0)
    sums = np.bincount(held, share[slots], len(load))
    share[slots] /= sums[held]
    return price(expert, share, load, num_gpus)


def _swaps(layout: Layout, load: Floats, num_gpus: int) -> Iterator[Layout]:
    """Swap slots of the heaviest GPU with others' as long as the heavier of both falls.

    Yields:
        The table after every swap: an earlier one may do, with fewer moves.
    """
    expert, share = layout.expert.copy(), layout.share.copy()
    amount = _slot_load(expert, share, load)
    per_gpu = len(expert) // num_gpus
    gpu = np.arange(len(expert)) // per_gpu
    total = amount.reshape(num_gpus, -1).sum(axis=1)
    for _ in range(len(expert)):
        heavy = int(total.argmax())
        own = np.arange(heavy * per_gpu, (heavy + 1) * per_gpu)
        shift = amount[own, None] - amount  # [K, S]: what leaves the heavy GPU
        after = np.maximum(total[heavy] - shift, total[gpu] + shift)
        after[_doubles(expert, gpu, own)] = np.inf
        slot, other = np.unravel_index(after.argmin(), after.shape)
        if after[slot, other] >= total[heavy] * _SIGNIFICANT:
            break
        moved = shift[slot, other]
        total[heavy] -= moved
        total[gpu[other]] += moved
        for table in (expert, share, amount):
            table[[own[slot], other]] = table[[other, own[slot]]]
        yield Layout(expert=expert.copy(), share=share.copy(), heaviest=float(total.max()))


def _doubles(expert: Ints, gpu: Ints, own: Ints) -> npt.NDArray[np.bool_]:
    """Return which swaps are none, or bring an expert to a GPU that has it already, [K, S]."""
    held = [set(experts.tolist()) - {EMPTY} for experts in expert.reshape(gpu[-1] + 1, -1)]
    heavy = held[gpu[own[0]]]
    comes_back = np.isin(expert, list(heavy))
    goes_twice = np.array([[int(expert[slot]) in there for there in held] for slot in own])[:, gpu]
    none: npt.NDArray[np.bool_] = comes_back | goes_twice | (gpu == gpu[own[0]])
    return none


def _rebalanced(
    now: Layout, rows: Floats, num_gpus: int, hosts: tuple[str, ...], may_replicate: bool
) -> Layout:
    """Return the fast rebalance's table on the GPUs that hold most of its experts already."""
    load = rows.sum(axis=0)
    num_slots, num_experts = len(now.expert), len(load)
    # Without copies the empty slots are experts without rows.
    some = load if may_replicate else np.append(load, np.zeros(num_slots - num_experts))
    done = rebalance(some[None], num_slots, num_gpus)
    expert, share = done.expert_of_slot[0], done.share_of_slot[0]
    share = np.where(expert < num_experts, share, 0.0)
    expert = np.where(expert < num_experts, expert, EMPTY)
    order = _keeping_most(now.expert, expert, share, rows, num_gpus, hosts)
    shape = (num_gpus, -1)
    expert, share = expert.reshape(shape)[order].ravel(), share.reshape(shape)[order].ravel()
    expert, share = _in_place(now.expert, expert, share, num_gpus)
    return price(expert, share, load, num_gpus)


def _keeping_most(
    old: Ints, new: Ints, share: Floats, rows: Floats, num_gpus: int, hosts: tuple[str, ...]
) -> Ints:
    """Return which group of `new` each GPU takes: most experts kept, then most rows on the host."""
    num_experts = rows.shape[1]
    before = _members(old, np.ones(len(old)), num_experts, num_gpus)  # [G, E]
    after = _members(new, np.ones(len(new)), num_experts, num_gpus)
    on_host = np.array([rows[[other == host for other in hosts]].sum(axis=0) for host in hosts])
    local = on_host @ _members(new, share, num_experts, num_gpus).T  # [GPU, group]
    kept = before @ after.T
    worth = kept + local / (1 + rows.sum() * num_gpus)  # all local rows weigh less than one move
    _, order = linear_sum_assignment(worth, maximize=True)
    return np.asarray(order, dtype=np.int64)


def _members(expert: Ints, weight: Floats, num_experts: int, num_gpus: int) -> Floats:
    """Return the weight of every expert on every GPU, [G, E]."""
    table = np.zeros((num_gpus, num_experts + 1))
    gpu = np.arange(len(expert)) // (len(expert) // num_gpus)
    np.add.at(table, (gpu, expert), weight)  # EMPTY is the last column
    return table[:, :num_experts]


def _in_place(old: Ints, new: Ints, share: Floats, num_gpus: int) -> tuple[Ints, Floats]:
    """Return the new table with every expert that stays on its GPU in its old slot."""
    expert, shares = np.full_like(new, EMPTY), np.zeros_like(share)
    per_gpu = len(new) // num_gpus
    for first in range(0, len(new), per_gpu):
        span = slice(first, first + per_gpu)
        coming = dict(zip(new[span].tolist(), share[span].tolist(), strict=True))
        coming.pop(EMPTY, None)
        for slot in range(first, first + per_gpu):
            held = int(old[slot])
            if held in coming:
                expert[slot], shares[slot] = held, coming.pop(held)
        free = [slot for slot in range(first, first + per_gpu) if expert[slot] == EMPTY]
        for slot, (held, part) in zip(free, coming.items(), strict=False):
            expert[slot], shares[slot] = held, part
    return expert, shares
