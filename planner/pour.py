"""Chains poured full: every GPU of a chain takes exactly its part, without a loop over GPUs.

    L layers . G GPUs . K slots a GPU . B chains . a chain of n GPUs has n(K-1)+1 items

Of a chain's items in falling order the first, the lead, is set apart. The next n head a group
each; the others, in rows of n, give every group one more, K-1 in all. Let v be the chain's level
and s a group's load: it is heavy where s >= v, otherwise light. GPUs come one after another,
each takes a group and what it needs of one item carried on, the lead to begin with:

    light   takes v - s of the item carried
    heavy   takes the rest of the item carried, and carries on of its own head what passes v

A light group comes as soon as the rest c of the item carried is enough, c >= v - s; else a heavy
one. This always works. Heads are no lighter than any item behind them, and rows follow each other
in load, so two groups without their heads differ by no more than any head: a heavy group without
its head is no heavier than any light group whole. So when a heavy group comes, c < v - s(light),
and c and the group without its head do not pass v; with its head they do, and the head is the one
that is split. Once no light group is left, no heavy one passes v, as all groups and the lead
together are n v.

So supply (the lead and what heavy groups pass) and demand (what light groups lack) are two running
sums, and the order of GPUs is the merge of both.
"""

from functools import reduce

import numpy as np

from .chains import Chains, Floats, Ints, pick


def pour(chains: Chains) -> Floats:
    """Order every chain's items and fill its GPUs evenly; return the load of every slot [K, L, G].

    Args:
        chains: whose `item` changes: no slot stays empty, and no item is twice on one GPU.
    """
    slots, _, num_gpus = chains.item.shape
    queue = _queue(chains)
    load = pick(chains.load, queue)  # [L, N], by chain, falling
    chain, first_of_chain = chains.chain, chains.first
    first, size = pick(first_of_chain, chain), pick(chains.size, chain)  # of every GPU's, [L, G]
    lead = first * (slots - 1) + chain  # its place in the queue, [L, G]
    if slots == 1:
        chains.item[0] = pick(queue, lead)
        return (pick(load, lead) / size)[None]
    # 1. a group for every GPU, the lightest first: its head, then an item of every row
    gpu = np.arange(num_gpus)
    head = lead + size - (gpu - first)
    places = [head + size * row for row in range(slots - 1)]
    group = reduce(np.add, [pick(load, place) for place in places])
    lead_load = pick(load, lead)
    over = group - _level(chains, group + np.where(gpu == first, lead_load, 0))
    # 2. the order of groups in their chain: supply before a heavy one, demand with a light one
    supply, demand = np.maximum(over, 0), np.maximum(-over, 0)
    due = np.where(over >= 0, lead_load + _before(supply, first), _before(demand, first) + demand)
    most = 2 * load.sum(axis=1, keepdims=True)  # keeps chains apart
    order = np.argsort(chain + due / np.where(most > 0, most, 1), axis=1, kind="stable")
    over, head = pick(over, order), pick(head, order)
    # 3. what is carried to every GPU and from it
    heavy = over >= 0
    arrives = np.maximum(lead_load + _before(over, first), 0)
    leaves = np.clip(arrives + over, 0, np.where(heavy, pick(load, head), arrives))
    last = np.maximum.accumulate(np.where(heavy, gpu, -1), axis=1)
    last = np.concatenate([np.full_like(last[:, :1], -1), last[:, :-1]], axis=1)  # before this GPU
    carried = np.where(last >= first, pick(head, np.maximum(last, 0)), lead)
    part = np.empty(chains.item.shape)
    for row, place in enumerate([carried, *(pick(place, order) for place in places)]):
        chains.item[row], part[row] = pick(queue, place), pick(load, place)
    part[0] = np.where(heavy, arrives, arrives - leaves)
    part[1] -= np.where(heavy, leaves, 0)
    return part


def _level(chains: Chains, held: Floats) -> Floats:
    """Return the mean of what GPUs of a chain hold, for every GPU [L, G]."""
    num_layers, num_chains = chains.size.shape
    chain = chains.chain + (np.arange(num_layers) * num_chains)[:, None]
    total = np.bincount(chain.ravel(), held.ravel(), chains.size.size)
    level: Floats = (total / chains.size.ravel()).take(chain)
    return level


def _before(amount: Floats, first: Ints) -> Floats:
    """Return the sum over earlier GPUs of the same chain, [L, G]."""
    earlier = np.cumsum(amount, axis=1) - amount
    return earlier - pick(earlier, first)


def _queue(chains: Chains) -> Ints:
    """Return all items, chain by chain, heaviest first, [L, N]."""
    slots, num_layers, num_gpus = chains.item.shape
    numbers, num_chains = chains.load.shape[1], chains.size.shape[1]
    if num_chains == 1:
        return np.broadcast_to(np.arange(numbers - 1), (num_layers, numbers - 1))
    key = np.where(chains.item < numbers - 1, chains.chain, num_chains) * numbers + chains.item
    key = key.transpose(1, 0, 2).reshape(num_layers, slots * num_gpus)
    key.sort(axis=1)
    queue: Ints = key[:, : numbers - 1] % numbers
    return queue
