"""Chains of GPUs that share experts, filled row by row; all layers at once.

    L layers . N items (experts, or copies) . G GPUs . K slots a GPU . B chains

GPUs that share an expert form a chain, and a chain of n GPUs and n(K-1)+1 experts can be filled
evenly by splitting n - 1 of them, whatever their loads (`pour`). `swaps` evens chains out.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Number = TypeVar("Number", np.float64, np.float32, np.int64)

_LATER = 1e6  # added to a level: after all without


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """Chains of GPUs and the items in them; item 0 is a layer's heaviest.

    Attributes:
        load: of every item, falling, [L, N + 1]; item N is an empty slot of load 0.
        size: GPUs of every chain, [L, B]; sums to G. Chain 0 has the first GPUs, and so on.
        item: of every slot, contiguous, [K, L, G]; a chain of n GPUs has n - 1 empty slots.
    """

    load: Floats
    size: Ints
    item: Ints

    @property
    def first(self) -> Ints:
        """Every chain's first GPU in its layer, [L, B]."""
        return np.cumsum(self.size, axis=1) - self.size

    @property
    def chain(self) -> Ints:
        """Every GPU's chain in its layer, [L, G]."""
        return chain_of_gpu(self.size)


def pick(rows: npt.NDArray[Number], index: Ints) -> npt.NDArray[Number]:
    """Return `rows[i, index[..., i, :]]` for every i; faster than `np.take_along_axis`."""
    offset = (np.arange(len(rows)) * rows.shape[1])[:, None]
    picked: npt.NDArray[Number] = rows.ravel().take(index + offset)
    return picked


def rising_order(amount: Floats) -> Ints:
    """Return the order of every row's amounts from the smallest, the first of equal ones first.

    Amounts are not negative, so their bits rise with them. The column takes the place of the
    lowest bits: a sort of whole numbers, all different, is the fastest there is and the same on
    every processor. Amounts that differ by less than 2^-40 of themselves (rows of up to 4096)
    count as equal.
    """
    return _order(amount.view(np.int64))


def falling_order(amount: Floats) -> Ints:
    """Return the order from the largest, otherwise like `rising_order`."""
    return _order(~amount.view(np.int64))


def _order(bits: Ints) -> Ints:
    columns = bits.shape[1]
    mask = (1 << (columns - 1).bit_length()) - 1
    key = (bits & ~mask) | np.arange(columns)
    key.sort(axis=1)
    order: Ints = key & mask
    return order


def chain_of_gpu(size: Ints) -> Ints:
    """Return every GPU's chain in its layer, [L, G], of the sizes of all chains [L, B]."""
    num_layers, num_chains = size.shape
    chain: Ints = np.repeat(np.tile(np.arange(num_chains), num_layers), size.ravel())
    return chain.reshape(num_layers, -1)


def least_level(load: Floats, size: Ints, slots: int) -> tuple[Floats, Bools]:
    """Return the level worth reaching where item b leads chain b, and the chains that set it.

    Even; or that of the fullest chains together, with the lightest items in their other slots.

    Returns:
        The level [L]; which chains are among those fullest ones, [L, B]: none where it is even.
    """
    lead = load[:, : size.shape[1]]
    fullest = falling_order(lead / size)
    gpus = np.cumsum(pick(size, fullest), axis=1)
    held = np.cumsum(pick(lead, fullest), axis=1)
    least = np.cumsum(load[:, ::-1], axis=1)
    others = gpus * (slots - 1)
    light = np.where(others > 0, pick(least, np.maximum(others - 1, 0)), 0)
    level = (held + light) / gpus
    last = level.argmax(axis=1)[:, None]
    goal: Floats = pick(level, last)
    is_fullest = np.empty(size.shape, dtype=np.bool_)
    np.put_along_axis(is_fullest, fullest, np.arange(size.shape[1]) <= last, axis=1)
    return np.maximum(1, goal[:, 0]), is_fullest & (goal > 1 + 1e-6)


def fill(load: Floats, size: Ints, slots: int, goal: Floats, sets_goal: Bools) -> Chains:
    """Put item b into chain b, and the rest on the GPUs, a row of G at a time.

    The heaviest of a row goes to the lightest chain, once for each of its GPUs. A GPU that would
    pass the level worth reaching takes from the lightest items instead; the very lightest are for
    the chains that set this level.

    Args:
        load: of every item, falling, [L, N].
        size: GPUs of every chain, [L, B].
        slots: K.
        goal: the level worth reaching, [L].
        sets_goal: the chains that set it, [L, B].
    """
    num_layers, num_items = load.shape
    num_chains, num_gpus = size.shape[1], int(size[0].sum())
    layer, place = np.arange(num_layers)[:, None], np.arange(num_gpus)
    first = np.cumsum(size, axis=1) - size
    chain = chain_of_gpu(size) + layer * num_chains  # through all layers
    item = np.full((slots, num_layers * num_gpus), num_items)
    item[0, first + layer * num_gpus] = np.arange(num_chains)
    total, inverse = load[:, :num_chains].ravel(), 1 / size.ravel()
    ahead = (place - first.ravel().take(chain)) * inverse.take(chain)  # items of the same row
    upto = np.concatenate([np.zeros((num_layers, 1)), np.cumsum(load, axis=1)], axis=1)
    is_last = sets_goal.ravel().take(chain)
    num_last = is_last.sum(axis=1, keepdims=True)
    head, end = np.full((num_layers, 1), num_chains), np.full((num_layers, 1), num_items)
    tail = end - (slots - 1) * num_last
    for row in range(1, slots):
        level = (total * inverse).take(chain)
        mean = (pick(upto, head + num_gpus) - pick(upto, head)) / num_gpus
        least = pick(load, head + num_gpus - 1) + (slots - 1 - row) * pick(load, tail - 1)
        is_full = is_last | (level + least >= goal[:, None])
        room = num_gpus - is_full.sum(axis=1, keepdims=True)
        level = np.where(is_full, level + _LATER, level + ahead * mean) + is_last * _LATER
        gpu = rising_order(level) + layer * num_gpus
        taken = np.where(
            place < room,
            head + place,
            np.where(place < num_gpus - num_last, tail + num_last, end) - num_gpus + place,
        )  # [L, G]
        head, tail, end = head + room, tail - (num_gpus - num_last - room), end - num_last
        item[row, gpu] = taken
        total = total + np.bincount(chain.take(gpu).ravel(), pick(load, taken).ravel(), size.size)
    return Chains(
        load=np.pad(load, ((0, 0), (0, 1))),
        size=size,
        item=item.reshape(slots, num_layers, num_gpus),
    )


def fill_copies(load: Floats, expert: Ints, num_gpus: int) -> Chains:
    """Put copies on single GPUs, a row of G at a time, the heaviest of a row on the lightest GPU.

    Copies of an expert follow each other in load, so those that two rows share are at the end of
    one and the start of the next: GPUs that have it take theirs after all others.

    Args:
        load: of every copy, falling, [L, N].
        expert: of every copy, [L, N].
        num_gpus: G, by which N can be divided.
    """
    num_layers, num_items = load.shape
    item = np.empty((num_items // num_gpus, num_layers, num_gpus), dtype=np.int64)
    total = np.zeros((num_layers, num_gpus))
    has = np.full((num_layers, num_gpus), -1)
    for row, held in enumerate(item):
        taken = row * num_gpus + np.arange(num_gpus)
        level = np.where(has == expert[:, taken[:1]], total + _LATER, total)
        gpu = rising_order(level)
        np.put_along_axis(held, gpu, taken[None], axis=1)
        total += pick(load, held)
        has = pick(expert, held)
    return Chains(
        load=np.pad(load, ((0, 0), (0, 1))),
        size=np.ones((num_layers, num_gpus), dtype=np.int64),
        item=item,
    )
