"""A fast rebalance for online use: all layers at once, in milliseconds, in plain numpy.

    L layers . E experts . S slots . G GPUs . K = S / G slots a GPU . R = S - E extra replicas

Shares are free: a replica may take any part of its expert's traffic. GPUs that share an expert form
a chain, and a chain of n GPUs and n(K-1)+1 experts can be filled evenly by splitting n - 1 of them,
whatever their loads (`pour`). R extra replicas therefore leave G - R chains to balance against
each other, and with R >= G - 1 there is one chain and the balance is exact for every load.

    1. size    the hottest experts start a chain each; GPUs are apportioned to them
    2. fill    heaviest expert to the lightest chain, all layers and GPUs a row at a time
    3. swap    experts between heavy and light chains, while the heavier one falls
    4. pour    every GPU takes exactly its part of its chain

One chain needs neither 2 nor 3. Time goes into calls of numpy more than into arithmetic, so there
are few of them and each is for all layers.

With equal shares a replica takes 1 / count of its expert: chains are single GPUs, and what is
swapped are replicas. GPUs are interchangeable here; hosts and links are the business of
`planner/solve.py`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError

from .chains import (
    Chains,
    Floats,
    Ints,
    Number,
    falling_order,
    fill,
    fill_copies,
    least_level,
    pick,
)
from .pour import pour
from .swaps import swap

# A copy more for the expert with most load / (count + offset); see `_equal`.
_EVEN, _ROUNDED = 0.0, -0.5
_GOOD = 0.98  # balance of equal shares from which no other counts are tried
# Free shares this much above the mean, and above the level worth reaching: equal ones are tried.
_UNEVEN, _MISSED = 1.005, 1.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """A layout of replicas on GPUs, with the part of the traffic each takes.

    Attributes:
        expert_of_slot: [L, S], slots in GPU order, K each; no expert twice on one GPU.
        share_of_slot: part of its expert's load that a replica takes, [L, S]; sums to 1 per expert.
        gpu_load: [L, G].
    """

    expert_of_slot: Ints
    share_of_slot: Floats
    gpu_load: Floats

    @property
    def balance(self) -> Floats:
        """Mean over max GPU load of every layer, [L]; 1 is perfect, and an idle layer is too."""
        busiest = self.gpu_load.max(axis=1)
        return np.where(busiest > 0, self.gpu_load.mean(axis=1) / np.where(busiest, busiest, 1), 1)


def rebalance(
    load: npt.ArrayLike,
    num_slots: int,
    num_gpus: int,
    *,
    shares: Literal["free", "equal"] = "free",
) -> Rebalanced:
    """Return a layout that keeps the busiest GPU of every layer low; the same input, the same one.

    Args:
        load: of every expert, in any unit, [L, E].
        num_slots: S, a multiple of num_gpus, from E to E * num_gpus.
        num_gpus: G.
        shares: whether replicas may take different parts of their expert's load.

    Raises:
        InputError: the load is no such matrix, or the slots do not fit.
    """
    amounts = _checked(load, num_slots, num_gpus)
    num_experts = amounts.shape[1]
    mean = amounts.sum(axis=1, keepdims=True) / num_gpus
    scaled = amounts / np.where(mean > 0, mean, 1)  # in GPU means: 1 is a GPU's fair part
    order = falling_order(scaled)
    falling = pick(scaled, order)
    if shares == "free" or num_slots == num_experts:
        item, part = _free(falling, num_slots, num_gpus)
    else:
        item, part = _equal(falling, num_slots, num_gpus)
    return Rebalanced(
        expert_of_slot=pick(order, _by_slot(item)),
        share_of_slot=_shares(_by_slot(item), _by_slot(part), num_experts),
        gpu_load=part.sum(axis=0) * mean,
    )


def _checked(load: npt.ArrayLike, num_slots: int, num_gpus: int) -> Floats:
    amounts = np.asarray(load, dtype=np.float64)
    if amounts.ndim != 2 or not amounts.size:
        raise InputError(f"load is {list(amounts.shape)}; it must be [layers, experts], not empty")
    if not np.isfinite(amounts).all() or amounts.min() < 0:
        layer, expert = np.argwhere(~(np.isfinite(amounts) & (amounts >= 0)))[0]
        raise InputError(
            f"load of expert {expert} in layer {layer} is {amounts[layer, expert]}; "
            "loads are finite and not negative"
        )
    experts = amounts.shape[1]
    if num_gpus < 1 or num_slots % num_gpus:
        below = num_slots // max(num_gpus, 1) * num_gpus
        raise InputError(
            f"{num_slots} slots do not divide evenly among {num_gpus} GPUs",
            hints=[f"take {below} or {below + num_gpus} slots"] if num_gpus > 0 else [],
        )
    if not experts <= num_slots <= experts * num_gpus:
        raise InputError(
            f"{num_slots} slots for {experts} experts on {num_gpus} GPUs; it must be {experts} "
            f"(one each) to {experts * num_gpus} (one each on every GPU)"
        )
    return amounts


def _by_slot(rows: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return [L, S], GPU by GPU, of [K, L, G]."""
    return rows.transpose(1, 2, 0).reshape(rows.shape[1], -1)


def _free(falling: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Floats]:
    """Return rank of the expert by load, and the load taken, of every slot, both [K, L, G].

    Where chains stay above the level worth reaching, equal shares, levelled, are tried too.

    Args:
        falling: load of every expert in GPU means, falling, [L, E].
        num_slots: S.
        num_gpus: G.
    """
    slots, extra = num_slots // num_gpus, num_slots - falling.shape[1]
    if extra >= num_gpus - 1:
        return _one_chain(falling, num_gpus, slots)
    size = _apportion(falling[:, : num_gpus - extra], extra, num_gpus, _EVEN)
    goal, sets_goal = least_level(falling, size, slots)
    chains = fill(falling, size, slots, goal, sets_goal)
    swap(chains, None)
    part = pour(chains)
    missed = np.flatnonzero(_busiest(part) > np.maximum(goal * _MISSED, _UNEVEN))
    if missed.size:
        other = _levelled(falling[missed], num_gpus, num_slots)
        _take_better(chains.item, part, missed, *other)
    return chains.item, part


def _one_chain(falling: Floats, num_gpus: int, slots: int) -> tuple[Ints, Floats]:
    """Return the same where there are replicas enough for a single chain, which is exact.

    Replicas beyond its G - 1 splits are made before, of experts that hardly any split would reach:
    those within a GPU's part. That changes nothing now, and less when loads change.
    """
    num_experts = falling.shape[1]
    extra = (slots - 1) * num_gpus + 1 - num_experts
    cool = np.where(falling > 1, 0, falling)
    order = falling_order(cool)
    count = np.empty(falling.shape, dtype=np.int64)
    lifted = _apportion(pick(cool, order), extra, num_gpus, _EVEN)
    np.put_along_axis(count, order, lifted, axis=1)
    expert, each = _copies(falling, count)
    chains = Chains(
        load=np.pad(each, ((0, 0), (0, 1))),
        size=np.full((len(falling), 1), num_gpus),
        item=np.empty((slots, len(falling), num_gpus), dtype=np.int64),
    )
    part = pour(chains)
    item = _merge(pick(expert, chains.item), part, num_experts)
    _spares_to_hottest(item, num_experts)
    return item, part


def _merge(expert: Ints, part: Floats, spare: int) -> Ints:
    """Return the experts of slots [K, L, G], `spare` where a GPU had one twice.

    Slots of a GPU are sorted by expert, and `part` with them, in place.
    """
    order = np.argsort(expert, axis=0, kind="stable")
    expert = np.take_along_axis(expert, order, axis=0)
    part[:] = np.take_along_axis(part, order, axis=0)
    twice = expert[1:] == expert[:-1]
    for slot in np.flatnonzero(twice.any(axis=(1, 2)))[::-1]:
        moved = np.where(twice[slot], part[slot + 1], 0)
        part[slot] += moved
        part[slot + 1] -= moved
    expert[1:][twice] = spare
    return expert


def _copies(falling: Floats, count: Ints) -> tuple[Ints, Floats]:
    """Return the expert and the load of every copy, the heaviest first, both [L, copies]."""
    num_layers, num_experts = falling.shape
    # In expert order; those of an expert stay together in the order by load.
    copies = np.repeat(np.tile(np.arange(num_experts), num_layers), count.ravel())
    expert: Ints = copies.reshape(num_layers, -1)
    each = pick(falling / count, expert)
    order = falling_order(each)
    return pick(expert, order), pick(each, order)


def _levelled(falling: Floats, num_gpus: int, num_slots: int) -> tuple[Ints, Floats]:
    """Return equal shares, shifted so that GPUs with copies of the same expert are level."""
    num_layers, num_experts = falling.shape
    count = _apportion(falling, num_slots - num_experts, num_gpus, _EVEN)
    item, part = _placed(falling, count, num_gpus)
    load = part.sum(axis=0)
    key = item + (np.arange(num_layers) * num_experts)[:, None]  # experts of all layers
    slot = np.where(count.take(key) > 1, part, -1.0).argmax(axis=0)[None]  # a GPU's hottest split
    expert, copy = (np.take_along_axis(rows, slot, axis=0)[0] for rows in (key, part))
    split = count.take(expert) > 1
    number = np.bincount(expert[split], minlength=falling.size)
    mean = np.bincount(expert[split], load[split], falling.size) / np.maximum(number, 1)
    shifted = np.where(split, copy + mean[expert] - load, copy)
    short = np.bincount(expert[shifted < 0], minlength=falling.size) > 0
    np.put_along_axis(part, slot, np.where(short[expert], copy, shifted)[None], axis=0)
    return item, part


def _equal(falling: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Floats]:
    """Return the same as `_free`, where all replicas of an expert take the same.

    Copies go one by one to the largest load / count, which keeps the hottest copy coolest; where
    GPUs remain uneven, the largest load / (count - 1/2) is tried too (Webster's apportionment): it
    leaves copies more alike, which pack better in few slots.
    """
    extra = num_slots - falling.shape[1]
    item, part = _placed(falling, _apportion(falling, extra, num_gpus, _EVEN), num_gpus)
    busiest = _busiest(part)
    count = _apportion(falling, extra, num_gpus, _ROUNDED)
    hottest = (falling / count).max(axis=1)  # copy; no use where it alone is hotter
    uneven = np.flatnonzero((busiest * _GOOD > 1) & (hottest < busiest))
    if uneven.size:
        _take_better(item, part, uneven, *_placed(falling[uneven], count[uneven], num_gpus))
    return item, part


def _take_better(item: Ints, part: Floats, layers: Ints, found: Ints, taken: Floats) -> None:
    """Replace what is worse, in place, by what was found for the layers given."""
    better = _busiest(taken) < _busiest(part)[layers]
    item[:, layers[better]], part[:, layers[better]] = found[:, better], taken[:, better]


def _busiest(part: Floats) -> Floats:
    busiest: Floats = part.sum(axis=0).max(axis=1)
    return busiest


def _placed(falling: Floats, count: Ints, num_gpus: int) -> tuple[Ints, Floats]:
    """Return the expert and the load of every slot for copies of equal shares, `count` [L, E]."""
    expert, each = _copies(falling, count)
    chains = fill_copies(each, expert, num_gpus)
    swap(chains, expert)
    return pick(expert, chains.item), pick(each, chains.item)


def _apportion(falling: Floats, extra: int, most: int, offset: float) -> Ints:
    """Hand out `extra` replicas, each where load / (count + offset) is most; return counts [L, B].

    The same as one at a time, which needs a loop: a replica that lifts item j from count k ranks
    behind all lifts of items 0 .. j from counts 1 .. k, so only (j + 1) k <= extra can be among the
    first `extra`.
    """
    num_layers, num_items = falling.shape
    if not extra:
        return np.ones((num_layers, num_items), dtype=np.int64)
    lifts = np.minimum(most - 1, extra // np.arange(1, min(num_items, extra) + 1))
    item = np.repeat(np.arange(len(lifts)), lifts)
    count = np.arange(len(item)) - np.repeat(np.cumsum(lifts) - lifts, lifts) + 1
    best = falling_order(falling[:, item] / (count + offset))[:, :extra]
    lifted = item[best] + (np.arange(num_layers) * num_items)[:, None]
    return 1 + np.bincount(lifted.ravel(), minlength=falling.size).reshape(falling.shape)


def _spares_to_hottest(item: Ints, num_experts: int) -> None:
    """Replace items without load by the hottest experts that the GPU does not have, in place.

    Of the K hottest experts at least as many are missing as the GPU has spare slots.
    """
    slots = len(item)
    layer, gpu = np.nonzero((item >= num_experts).any(axis=0))
    some = item[:, layer, gpu]  # [K, those with a spare]
    spare = some >= num_experts
    here = (some == np.arange(slots)[:, None, None]).any(axis=1)
    missing = np.argsort(here, axis=0, kind="stable")  # hottest first
    number = np.maximum(np.cumsum(spare, axis=0) - 1, 0)
    item[:, layer, gpu] = np.where(spare, np.take_along_axis(missing, number, axis=0), some)


def _shares(item: Ints, part: Floats, num_experts: int) -> Floats:
    """Return parts of loads as parts of 1, [L, S]; an expert without load is shared equally."""
    key = item + (np.arange(len(item)) * num_experts)[:, None]
    total = np.bincount(key.ravel(), part.ravel(), len(item) * num_experts)
    if total.all():
        return part / total.take(key)
    count = np.bincount(key.ravel()).take(key)
    total = total.take(key)
    return np.where(total > 0, part / np.where(total > 0, total, 1), 1 / count)
