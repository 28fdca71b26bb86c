"""Swaps between heavy and light chains, many at a time, while the heavier of both falls.

    L layers . N items . G GPUs . K slots a GPU . B chains . M heavy ones, J light ones for each

Layers are the last axis everywhere: numpy is fast where that one is long.
"""

from dataclasses import dataclass

import numpy as np

from .chains import Bools, Chains, Floats, Floats32, Ints, pick, rising_order

_CLOSE = 1 + 1e-6  # a layer this near its bound is not swapped any further
_SIGNIFICANT = np.float32(1 - 1e-6)  # a swap must gain more than float32 rounding
# Each round swaps between the heaviest chains / divisor and the others: many swaps with few choices
# first, then few swaps with many choices.
_DIVISORS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36)
_MAX_PASSES = 6  # over the divisors
_PASS_SLOTS = 20_000  # slots of all layers from which one pass must do
_BLOCK = 40_000  # swaps compared at a time: more memory at once costs more than it saves
_HUGE = 1e30  # load of an empty slot: never worth swapping


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Chains in numbers that swaps change in place.

    Attributes:
        load: of every slot, huge where it is empty, [K, L * G].
        item: in it, [K, L * G].
        level: load per GPU of every chain, [B, L].
        size: GPUs of every chain, [B, L]; `inverse` is 1 / size.
        first: its first GPU among all layers' L * G, [B, L].
        expert: of every slot where several items are one expert, [K, L * G].
    """

    load: Floats32
    item: Ints
    level: Floats32
    size: Ints
    inverse: Floats32
    first: Ints
    expert: Ints | None


def swap(chains: Chains, expert: Ints | None) -> None:
    """Swap items between heavy and light chains, in place, until they are as even as they can be.

    Args:
        chains: whose `item` changes.
        expert: of every item where several items are one expert, [L, N].
    """
    num_chains = chains.size.shape[1]
    if num_chains == 1:
        return
    search = _start(chains, expert)
    enough = (_bound(chains) * _CLOSE).astype(np.float32)
    passes = max(1, min(_MAX_PASSES, _PASS_SLOTS // chains.item.size))
    for number, divisor in enumerate(_DIVISORS * passes):
        is_open = search.level.max(axis=0) > enough
        if not is_open.any():
            break
        heavy, light = _pairs(search.level, max(1, num_chains // divisor), number)
        _swap_round(search, heavy, light, number, is_open)


def _bound(chains: Chains) -> Floats:
    """Return a level that the heaviest chain has at least, [L]: the mean, or where item 0 is."""
    others = chains.size * (len(chains.item) - 1)
    least = np.cumsum(chains.load[:, ::-1], axis=1)  # of none, one, two items, as item N has none
    level: Floats = ((chains.load[:, :1] + pick(least, others)) / chains.size).min(axis=1)
    return np.maximum(1, level)


def _start(chains: Chains, expert: Ints | None) -> _Search:
    slots, num_layers, num_gpus = chains.item.shape
    layer = np.arange(num_layers)
    load = chains.load.astype(np.float32)
    held = pick(load, chains.item).sum(axis=0).ravel()
    first = chains.first + (layer * num_gpus)[:, None]
    total = np.add.reduceat(held, first.ravel()).reshape(first.shape)
    size = np.ascontiguousarray(chains.size.T)
    load[:, -1] = _HUGE
    copies = None if expert is None else np.pad(expert, ((0, 0), (0, 1)), constant_values=-1)
    return _Search(
        load=pick(load, chains.item).reshape(slots, -1),
        item=chains.item.reshape(slots, -1),  # a view
        level=(total.T / size).astype(np.float32, order="C"),  # changed through flat views
        size=size,
        inverse=(1 / size).astype(np.float32),
        first=np.ascontiguousarray(first.T),
        expert=None if copies is None else pick(copies, chains.item).reshape(slots, -1),
    )


def _pairs(level: Floats32, num_heavy: int, number: int) -> tuple[Ints, Ints]:
    """Return the heaviest chains [M, L], and as many lighter for each [J, M, L], of B * L."""
    num_chains, num_layers = level.shape
    each = (num_chains - num_heavy) // num_heavy
    rising = rising_order(level.T.astype(np.float64, order="C")).T
    chain = rising * num_layers + np.arange(num_layers)
    light = chain[: num_heavy * each].reshape(each, num_heavy, num_layers)
    turn = number % num_heavy
    turned = np.concatenate([light[:, num_heavy - turn :], light[:, : num_heavy - turn]], axis=1)
    return chain[: -num_heavy - 1 : -1], turned


def _swap_round(search: _Search, heavy: Ints, light: Ints, number: int, is_open: Bools) -> None:
    """Make the best swap of every heavy chain that helps; chains offer one GPU each, in turn."""
    slots, num_gpus = search.load.shape
    # By size of the chain; in time every GPU of a chain meets every GPU of another.
    size = np.maximum(1, np.arange(int(search.size.max()) + 1))
    gpu_a = (search.first + (number % size).take(search.size)).ravel()
    gpu_b = (search.first + ((number + number // size) % size).take(search.size)).ravel()
    level, inverse = search.level.ravel(), search.inverse.ravel()
    best, lowest = _best(search, gpu_a.take(heavy), gpu_b.take(light), heavy, light)
    wanted = np.where(is_open, level.take(heavy) * _SIGNIFICANT, 0).ravel()
    helps = np.flatnonzero(lowest < wanted)
    slot_a, slot_b, partner = np.unravel_index(best[helps], (slots, slots, len(light)))
    a, b = heavy.ravel()[helps], light.reshape(len(light), -1)[partner, helps]
    at_a, at_b = slot_a * num_gpus + gpu_a.take(a), slot_b * num_gpus + gpu_b.take(b)
    if search.expert is not None:
        keep = _stays_single(search.expert, at_a, at_b)
        a, b, at_a, at_b = a[keep], b[keep], at_a[keep], at_b[keep]
    load = search.load.ravel()
    moved = load[at_a] - load[at_b]
    level[a] -= moved * inverse[a]
    level[b] += moved * inverse[b]
    for table in (search.load, search.item, search.expert):
        if table is not None:
            flat = table.ravel()
            flat[at_a], flat[at_b] = flat[at_b], flat[at_a]


def _best(
    search: _Search, gpu_a: Ints, gpu_b: Ints, heavy: Ints, light: Ints
) -> tuple[Ints, Floats32]:
    """Return every heavy chain's swap after which the higher of both levels is lowest.

    Returns:
        The swap as a number [K of the heavy, K of the light, J], and that level; both [M * L].
    """
    level, inverse = search.level.ravel(), search.inverse.ravel()
    level_a, inverse_a, inverse_b = level.take(heavy), inverse.take(heavy), inverse.take(light)
    load_a, load_b = (search.load.take(gpu, axis=1) for gpu in (gpu_a, gpu_b))
    load_a = np.where(load_a < _HUGE, load_a, -_HUGE)  # huge levels, whatever is swapped for it
    less_a, less_b = level_a - load_a * inverse_a, level.take(light) - load_b * inverse_b
    more_a, more_b = load_b * inverse_a, load_a[:, None] * inverse_b
    block = max(1, _BLOCK // less_b.size)  # slots of the heavy chain at a time
    best, lowest = [], []
    for slot in range(0, len(load_a), block):
        some = slice(slot, slot + block)
        after = less_a[some, None, None] + more_a
        after_b = less_b + more_b[some, None]
        after = np.maximum(after, after_b, out=after).reshape(-1, heavy.size)
        found = after.argmin(axis=0)
        lowest.append(after[found, np.arange(heavy.size)])
        best.append(found + slot * (less_b.size // heavy.size))
    if len(best) == 1:
        return best[0], lowest[0]
    turn, column = np.argmin(lowest, axis=0), np.arange(heavy.size)
    return np.array(best)[turn, column], np.array(lowest)[turn, column]


def _stays_single(expert: Ints, at_a: Ints, at_b: Ints) -> Bools:
    """Return which swaps of two slots bring no expert to a GPU that has it already."""
    num_gpus, flat = expert.shape[1], expert.ravel()
    there_a, there_b = (expert.take(at % num_gpus, axis=1) for at in (at_a, at_b))
    doubled = (there_a == flat[at_b]) | (there_b == flat[at_a])
    single: Bools = ~doubled.any(axis=0)
    return single
