"""A fast rebalance for online use: all layers at once, in milliseconds, in plain numpy.

    L layers . E experts . S slots . G GPUs . K = S / G slots a GPU . R = S - E extra replicas

Shares are free: a replica may take any part of its expert's traffic. GPUs that share an expert form
a chain, and a chain of n GPUs and n(K-1)+1 experts can be filled evenly by splitting n - 1 of them,
whatever their loads (`pour`). R extra replicas therefore leave G - R chains to balance against
each other, and with R >= G - 1 there is one chain and the balance is exact for every load.

    1. size    the hottest experts start a chain each; GPUs are apportioned to them
    2. fill    heaviest expert to the lightest chain, all layers and GPUs a row at a time
    3. swap    experts between heavy and light chains, while the heavier one falls
    4. pour    along each chain: every GPU takes exactly its part

With equal shares a replica takes 1 / count of its expert: chains are single GPUs, and what is
swapped are replicas. GPUs are interchangeable here; hosts and links are the business of
`planner/solve.py`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError

from .chains import Floats, Ints, fill, least_level, pick, pour, swap

# A copy more for the expert with most load / (count + offset); see `_equal`.
_EVEN, _ROUNDED = 0.0, -0.5
_GOOD = 0.98  # balance of equal shares from which no other counts are tried
_HOT = 1.02  # GPU means: where hot experts allow no lower level, equal shares are tried too
_NEAR = 1.005  # of that level: good enough


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
    num_layers, num_experts = amounts.shape
    mean = amounts.sum(axis=1, keepdims=True) / num_gpus
    scaled = amounts / np.where(mean > 0, mean, 1)  # in GPU means: 1 is a GPU's fair part
    order = np.argsort(-scaled, axis=1, kind="stable")
    falling = np.take_along_axis(scaled, order, axis=1)
    extra = num_slots - num_experts
    if shares == "free" or not extra:
        item, part = _free(falling, num_slots, num_gpus)
    else:
        item, part = _equal(falling, num_slots, num_gpus)
    expert = np.take_along_axis(order, item.reshape(num_layers, num_slots), axis=1)
    share = _shares(expert, part.reshape(num_layers, num_slots), num_experts)
    gpu_load = (share * np.take_along_axis(amounts, expert, axis=1)).reshape(
        num_layers, num_gpus, -1
    )
    return Rebalanced(expert_of_slot=expert, share_of_slot=share, gpu_load=gpu_load.sum(axis=2))


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


def _free(falling: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Floats]:
    """Return rank of the expert by load, and the load taken, of every slot, both [L * G, K].

    Where hot experts keep the level high, chains are long and coarse to balance; equal shares of
    the same copies, levelled, are sometimes a little better, and there they are tried first.

    Args:
        falling: load of every expert in GPU means, falling, [L, E].
        num_slots: S.
        num_gpus: G.
    """
    num_layers, num_experts = falling.shape
    extra = num_slots - num_experts
    num_chains = max(1, num_gpus - extra)
    size = _apportion(falling[:, :num_chains], num_gpus - num_chains, num_gpus, _EVEN)
    level = least_level(falling, size, num_slots // num_gpus) if num_chains > 1 else np.ones(1)
    hot = np.flatnonzero(level > _HOT)
    if not extra or not hot.size:
        return _chained(falling, size, num_slots // num_gpus)
    item = np.zeros((num_layers, num_gpus, num_slots // num_gpus), dtype=np.int64)
    part = np.zeros(item.shape)
    item[hot], part[hot] = (
        x.reshape(item[hot].shape) for x in _levelled(falling[hot], num_gpus, num_slots)
    )
    busiest = np.full(num_layers, np.inf)
    busiest[hot] = part[hot].sum(axis=2).max(axis=1)
    rest = np.flatnonzero(busiest > level * _NEAR)
    if rest.size:
        shape = (rest.size, *item.shape[1:])
        found, taken = _chained(falling[rest], size[rest], num_slots // num_gpus)
        found, taken = found.reshape(shape), taken.reshape(shape)
        better = taken.sum(axis=2).max(axis=1) < busiest[rest]
        item[rest[better]], part[rest[better]] = found[better], taken[better]
    return item.reshape(-1, item.shape[2]), part.reshape(-1, item.shape[2])


def _chained(falling: Floats, size: Ints, slots: int) -> tuple[Ints, Floats]:
    """Return the same by chains of `size` GPUs [L, B]."""
    num_layers, num_experts = falling.shape
    num_gpus = int(size[0].sum())
    # Replicas beyond the G - 1 splits of a single chain: items without load, [L, N].
    spare = np.zeros((num_layers, max(0, slots * num_gpus - num_experts - num_gpus + 1)))
    load = np.concatenate([falling, spare], axis=1)
    level = least_level(load, size, slots)
    chains = fill(load, size, slots, level, None)
    swap(chains, level, None)
    part = pour(chains)
    return _spares_to_hottest(chains.item, num_experts), part


def _levelled(falling: Floats, num_gpus: int, num_slots: int) -> tuple[Ints, Floats]:
    """Return equal shares, shifted so that GPUs with copies of the same expert are level."""
    num_layers, num_experts = falling.shape
    of_layer, taken = _equal_by(falling, num_slots, num_gpus, _EVEN)
    item = of_layer.reshape(num_layers * num_gpus, -1)
    part = taken.reshape(num_layers * num_gpus, -1)
    load = part.sum(axis=1)
    key = item + (np.repeat(np.arange(num_layers), num_gpus) * num_experts)[:, None]
    count = np.bincount(key.ravel(), minlength=falling.size)
    gpu = np.arange(len(item))
    slot = np.where(count[key] > 1, part, -1.0).argmax(axis=1)  # of a GPU's hottest split expert
    expert, copy = key[gpu, slot], part[gpu, slot]
    split = count[expert] > 1
    number = np.bincount(expert[split], minlength=falling.size)
    mean = np.bincount(expert[split], load[split], falling.size) / np.maximum(number, 1)
    shifted = np.where(split, copy + mean[expert] - load, copy)
    short = np.bincount(expert[shifted < 0], minlength=falling.size) > 0
    part[gpu, slot] = np.where(short[expert], copy, shifted)
    return item, part


def _equal(falling: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Floats]:
    """Return the same as `_free`, where all replicas of an expert take the same.

    Copies go one by one to the largest load / count, which keeps the hottest copy coolest; where
    GPUs remain uneven, the largest load / (count - 1/2) is tried too (Webster's apportionment): it
    leaves copies more alike, which pack better in few slots.
    """
    item, part = _equal_by(falling, num_slots, num_gpus, _EVEN)
    uneven = np.flatnonzero(_busiest(part, num_gpus) * _GOOD > 1)
    if uneven.size:
        found, taken = _equal_by(falling[uneven], num_slots, num_gpus, _ROUNDED)
        better = _busiest(taken, num_gpus) < _busiest(part[uneven], num_gpus)
        item[uneven[better]], part[uneven[better]] = found[better], taken[better]
    return item, part


def _busiest(part: Floats, num_gpus: int) -> Floats:
    busiest: Floats = part.reshape(len(part), num_gpus, -1).sum(axis=2).max(axis=1)
    return busiest


def _equal_by(falling: Floats, num_slots: int, num_gpus: int, offset: float) -> tuple[Ints, Floats]:
    num_layers, num_experts = falling.shape
    count = _apportion(falling, num_slots - num_experts, num_gpus, offset)
    # Replicas in expert order, then by falling load; those of an expert stay together. [L, S]
    copies = np.repeat(np.tile(np.arange(num_experts), num_layers), count.ravel())
    expert: Ints = copies.reshape(num_layers, num_slots)
    each = pick(falling / count, expert)
    order = np.argsort(-each, axis=1, kind="stable")
    expert, each = pick(expert, order), pick(each, order)
    single = np.ones((num_layers, num_gpus), dtype=np.int64)
    level = least_level(each, single, num_slots // num_gpus)
    chains = fill(each, single, num_slots // num_gpus, level, expert)
    swap(chains, level, expert)
    slots = chains.item.reshape(num_layers, num_slots)
    return pick(expert, slots), pick(each, slots)


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
    best = np.argsort(-falling[:, item] / (count + offset), axis=1, kind="stable")[:, :extra]
    lifted = item[best] + (np.arange(num_layers) * num_items)[:, None]
    return 1 + np.bincount(lifted.ravel(), minlength=falling.size).reshape(falling.shape)


def _spares_to_hottest(item: Ints, num_experts: int) -> Ints:
    """Replace items without load by the hottest experts that the GPU does not have, [L * G, K].

    Of the K hottest experts at least as many are missing as the GPU has spare slots.
    """
    spare = item >= num_experts
    if not spare.any():
        return item
    hottest = np.arange(item.shape[1])
    here = (item[:, :, None] == hottest).any(axis=1)
    missing = np.argsort(here, axis=1, kind="stable")  # hottest first
    number = np.cumsum(spare, axis=1) - 1
    return np.where(spare, np.take_along_axis(missing, np.maximum(number, 0), axis=1), item)


def _shares(expert: Ints, part: Floats, num_experts: int) -> Floats:
    """Return parts of loads as parts of 1, [L, S]; an expert without load is shared equally."""
    key = (expert + (np.arange(len(expert)) * num_experts)[:, None]).ravel()
    total = np.bincount(key, part.ravel())[key].reshape(part.shape)
    count = np.bincount(key)[key].reshape(part.shape)
    return np.where(total > 0, part / np.where(total > 0, total, 1), 1 / count)
