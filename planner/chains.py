"""Chains of GPUs that share experts: filled, balanced by swaps, poured full; all layers at once.

    L layers . N items (experts, or copies) . G GPUs . K slots a GPU . B chains

GPUs that share an expert form a chain, and a chain of n GPUs and n(K-1)+1 experts can be filled
evenly by splitting n - 1 of them, whatever their loads (`pour`).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", np.float64, np.float32, np.int64)

_CLOSE = 1 + 1e-6  # a layer this near its bound is not swapped any further
_SIGNIFICANT = 1 - 1e-6  # a swap must gain more than float32 rounding
# Each round swaps between the heaviest chains / divisor and the others: many swaps with few choices
# first, then few swaps with many choices.
_DIVISORS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32)
_MAX_PASSES = 8  # over the divisors
_PASS_SLOTS = 20_000  # slots of all layers from which one pass must do
_HUGE = 1e30  # load of an empty slot: never worth swapping, never worth pouring


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """Chains of GPUs and the items in them; item 0 is a layer's heaviest.

    Attributes:
        load: of every item, falling, [L, N + 1]; item N is an empty slot of load 0.
        size: GPUs of every chain, [L, B]; sums to G.
        first: its first GPU among all layers' L * G, [L, B].
        item: of every slot, [L * G, K].
    """

    load: Floats
    size: Ints
    first: Ints
    item: Ints


def pick(rows: npt.NDArray[Number], index: Ints) -> npt.NDArray[Number]:
    """Return `rows[i, index[i]]` for every i; faster than `np.take_along_axis`."""
    picked: npt.NDArray[Number] = rows.ravel()[
        index + (np.arange(len(rows)) * rows.shape[1])[:, None]
    ]
    return picked


def least_level(load: Floats, size: Ints, slots: int) -> Floats:
    """Return the level worth reaching, [L]: even, or the worst chain's with the least fill."""
    others = size * (slots - 1)
    least = np.cumsum(load[:, ::-1], axis=1)
    light = np.where(others > 0, pick(least, np.maximum(others - 1, 0)), 0)
    level: Floats = np.maximum(1, ((load[:, : size.shape[1]] + light) / size).max(axis=1))
    return level


def fill(load: Floats, size: Ints, slots: int, goal: Floats, expert: Ints | None) -> Chains:
    """Put item b into chain b, and the rest on the GPUs, a row of G at a time.

    The heaviest of a row goes to the lightest chain, once for each of its GPUs. A GPU that would
    pass the goal with its part of the row takes from the lightest of all items instead.
    """
    num_layers, num_items = load.shape
    num_chains, num_gpus = size.shape[1], int(size[0].sum())
    layer = np.arange(num_layers)[:, None]
    first = np.cumsum(size, axis=1) - size + layer * num_gpus
    chain = np.repeat(np.arange(size.size), size.ravel())  # of every GPU, [L * G]
    item = np.full((num_layers * num_gpus, slots), num_items)
    item[first, 0] = np.arange(num_chains)
    total, size_flat = load[:, :num_chains].ravel(), size.ravel()
    place = np.arange(num_gpus)
    head, tail = np.full((num_layers, 1), num_chains), np.full((num_layers, 1), num_items)
    for row in range(1, slots):
        level = (total / size_flat)[chain].reshape(num_layers, num_gpus)
        least = pick(load, head + num_gpus - 1)
        room = (level + least < goal[:, None]).sum(axis=1, keepdims=True)
        if expert is not None:
            last = pick(expert, item[:, row - 1].reshape(num_layers, num_gpus))
            level = np.where(last == pick(expert, head), _HUGE, level)
            room = np.full_like(head, num_gpus)
        gpu = np.argsort(level, axis=1, kind="stable") + layer * num_gpus
        taken = np.where(place < room, head + place, tail - num_gpus + place)  # [L, G]
        head, tail = head + room, tail - num_gpus + room
        item[gpu, row] = taken
        total = total + np.bincount(chain[gpu].ravel(), pick(load, taken).ravel(), size.size)
    nothing = np.zeros((num_layers, 1))
    return Chains(load=np.concatenate([load, nothing], axis=1), size=size, first=first, item=item)


def swap(chains: Chains, goal: Floats, expert: Ints | None) -> None:
    """Swap items between heavy and light chains, in place, until close to the goal.

    Args:
        chains: whose `item` changes.
        goal: no layer's heaviest chain can fall below it, [L].
        expert: of every item where several items are one expert, [L, N].
    """
    num_layers, num_chains = chains.size.shape
    num_gpus = len(chains.item) // num_layers
    layer = np.repeat(np.arange(num_layers), num_gpus)[:, None]
    load = chains.load.astype(np.float32)
    load[:, -1] = _HUGE
    load = load[layer, chains.item]  # [L * G, K]
    chain = np.repeat(np.arange(chains.size.size), chains.size.ravel())
    filled = np.where(load < _HUGE, load, 0).sum(axis=1)
    total = np.bincount(chain, filled, chains.size.size)
    level: Floats32 = (total / chains.size.ravel()).astype(np.float32)
    passes = max(1, min(_MAX_PASSES, _PASS_SLOTS // chains.item.size))
    for number, divisor in enumerate(_DIVISORS * passes):
        active = np.flatnonzero(level.reshape(num_layers, -1).max(axis=1) > goal * _CLOSE)
        if num_chains == 1 or not active.size:
            break
        num_heavy = max(1, num_chains // divisor)
        heavy, light = _pairs(level.reshape(num_layers, -1), active, num_heavy, number)
        _swap_round(chains, load, level, heavy, light, number, expert)


def _pairs(level: Floats32, active: Ints, num_heavy: int, number: int) -> tuple[Ints, Ints]:
    """Return active layers' heaviest chains [A, M], and as many lighter for each [A, M, J]."""
    num_chains = level.shape[1]
    each = (num_chains - num_heavy) // num_heavy
    chain = np.argsort(level[active], axis=1, kind="stable") + (active * num_chains)[:, None]
    light = chain[:, : num_heavy * each].reshape(len(active), each, num_heavy)
    return chain[:, : -num_heavy - 1 : -1], np.roll(light, number, axis=2).transpose(0, 2, 1)


def _swap_round(
    chains: Chains,
    load: Floats32,
    level: Floats32,
    heavy: Ints,
    light: Ints,
    number: int,
    expert: Ints | None,
) -> None:
    """Make the best swap of every heavy chain that helps; chains offer one GPU each, in turn."""
    size, first = chains.size.ravel(), chains.first.ravel()
    slots = load.shape[1]
    gpu_a, gpu_b = (first[chain] + number % size[chain] for chain in (heavy, light))
    # 1. the higher of both levels after every swap, [A * M, K, J * K]
    inverse = (1 / size).astype(np.float32)
    shift = load[gpu_a].reshape(heavy.size, -1, 1) - load[gpu_b].reshape(heavy.size, 1, -1)
    after_b = shift * np.repeat(inverse[light], slots, axis=2).reshape(heavy.size, 1, -1)
    after_b += np.repeat(level[light], slots, axis=2).reshape(heavy.size, 1, -1)
    after_a = np.multiply(shift, -inverse[heavy].reshape(-1, 1, 1), out=shift)
    after_a += level[heavy].reshape(-1, 1, 1)
    after = np.maximum(after_a, after_b, out=after_b).reshape(heavy.size, -1)
    # 2. the best swap of every heavy chain, [A * M]
    best = after.argmin(axis=1)
    lowest = after[np.arange(heavy.size), best]
    helps = np.flatnonzero(lowest < level[heavy].ravel() * _SIGNIFICANT)
    slot_a, partner, slot_b = np.unravel_index(best[helps], (slots, light.shape[2], slots))
    a, b = heavy.ravel()[helps], light.reshape(heavy.size, -1)[helps, partner]
    at_a = gpu_a.ravel()[helps], slot_a
    at_b = gpu_b.reshape(heavy.size, -1)[helps, partner], slot_b
    if expert is not None:
        keep = _stays_single(chains.item, expert, at_a, at_b)
        a, b = a[keep], b[keep]
        at_a, at_b = (at_a[0][keep], at_a[1][keep]), (at_b[0][keep], at_b[1][keep])
    # 3. make it
    moved = load[at_a] - load[at_b]
    level[a] -= moved * inverse[a]
    level[b] += moved * inverse[b]
    for table in (load, chains.item):
        table[at_a], table[at_b] = table[at_b], table[at_a]


def _stays_single(
    item: Ints, expert: Ints, at_a: tuple[Ints, Ints], at_b: tuple[Ints, Ints]
) -> npt.NDArray[np.bool_]:
    """Return which swaps bring no expert to a GPU that has it already."""
    num_gpus = len(item) // len(expert)
    there = [expert[(gpu // num_gpus)[:, None], item[gpu]] for gpu in (at_a[0], at_b[0])]
    rows = np.arange(len(at_a[0]))
    moving = there[0][rows, at_a[1]], there[1][rows, at_b[1]]
    doubled = (there[0] == moving[1][:, None]) | (there[1] == moving[0][:, None])
    single: npt.NDArray[np.bool_] = ~doubled.any(axis=1)
    return single


def pour(chains: Chains) -> Floats:
    """Fill every GPU of a chain to the chain's level; return the load of every slot [L * G, K].

    A GPU takes what is left of the expert split last and K-1 more: the lightest K-1 neighbours in
    load order that fill it, and the last of them is split. Where the lightest K-1 fill it already,
    it is the old one that is split again. With g GPUs to go, g(K-1) experts and the one split are
    left, and their load is g times the level; so K-1 neighbours that fill a GPU exist (the heaviest
    carry at least their average), and all but the split one fit (their next lighter neighbours did
    not fill it). Chains of all layers go together, GPU by GPU.
    """
    num_layers = len(chains.load)
    layer = np.repeat(np.arange(num_layers), len(chains.item) // num_layers)[:, None]
    part = chains.load[layer, chains.item]  # stays where a chain is one GPU
    longest = int(chains.size.max())
    while longest > 1:
        shortest = longest // 2 + 1
        chain = np.flatnonzero((chains.size >= shortest) & (chains.size <= longest))
        _pour_some(chains, chain[np.argsort(-chains.size.ravel()[chain], kind="stable")], part)
        longest = shortest - 1
    return part


def _pour_some(chains: Chains, chain: Ints, part: Floats) -> None:
    """Pour the chains given [C], the longest first; sets their items and `part`."""
    num_numbers, rest = chains.load.shape[1], chains.item.shape[1] - 1  # N + 1, K - 1
    size, gpu = chains.size.ravel()[chain], chains.first.ravel()[chain]
    split, queue, weight = _queues(chains, chain)
    left = chains.load.ravel()[split]
    level = (left + weight.sum(axis=1, where=weight < _HUGE)) / size
    for step in range(size.max(initial=0)):
        live = slice(0, np.count_nonzero(size > step))
        rows = np.arange(live.stop)
        # 1. the first window of K-1 neighbours that fills the GPU, [C]
        below = np.zeros((live.stop, weight.shape[1] + 1))
        np.cumsum(weight[live], axis=1, out=below[:, 1:])
        window = below[:, rest:] - below[:, : below.shape[1] - rest]
        start = (window < (level[live] - left[live])[:, None]).sum(axis=1)
        start = np.minimum(start, (size[live] - step - 1) * rest)
        # 2. its experts and the split one take the level; one of them has load left
        near = start[:, None] + np.arange(rest)
        taken = np.column_stack([split[live], queue[rows[:, None], near]])
        amount = np.column_stack([left[live], weight[rows[:, None], near]])
        cut = rows, np.where(start > 0, rest, 0)
        left = np.clip(amount.sum(axis=1) - level[live], 0, amount[cut])
        amount[cut] -= left
        split = taken[cut]
        chains.item[gpu[live] + step] = taken % num_numbers
        part[gpu[live] + step] = amount
        # 3. close the gap
        column = np.arange(weight.shape[1] - rest)
        column = column + rest * (column >= start[:, None])
        queue, weight = pick(queue[live], column), pick(weight[live], column)


def _queues(chains: Chains, chain: Ints) -> tuple[Ints, Ints, Floats]:
    """Return what the chains given hold, items numbered through all layers.

    Returns:
        Their heaviest item [C]; the others, lightest first [C, W]; the loads of these, huge where
        a chain is shorter than the longest.
    """
    num_numbers, num_chains = chains.load.shape[1], chains.size.shape[1]
    size = chains.size.ravel()[chain]
    others = size * (chains.item.shape[1] - 1)
    rank = np.full(chains.size.size, -1)
    rank[chain] = np.arange(len(chain))
    rank = np.repeat(rank, chains.size.ravel())  # of every GPU's chain
    held = (chains.item < num_numbers - 1) & (rank >= 0)[:, None]
    # One sort of unique keys: chain by chain, items from the last number (lightest) to the first.
    key = np.sort((rank[:, None] * num_numbers - chains.item)[held])
    layer = chain[-(-key // num_numbers)] // num_chains
    number = -key % num_numbers + layer * num_numbers
    heaviest = np.cumsum(others + 1) - 1
    column = np.arange(others.max(initial=0))
    real = column < others[:, None]
    queue = number[np.where(real, (heaviest - others)[:, None] + column, 0)]
    return number[heaviest], queue, np.where(real, chains.load.ravel()[queue], _HUGE)
