"""Copies of experts on the hosts of their routing groups, in equal shares: a start.

As EPLB's hierarchical mode: groups have hosts, the next copy goes to the expert with most rows a
copy whose host has a slot left, and inside a host the heaviest copy first to the emptiest GPU.
"""

import numpy as np

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.rows import Ints


def copies_in_hosts(
    load: Floats, host_of_expert: Ints, host_of_gpu: Ints, capacity: Ints, extra: int
) -> Shares:
    """Return shares of copies, [experts, gpus].

    Args:
        load: rows of every expert, [experts].
        host_of_expert: [experts]; no host has more experts than slots.
        host_of_gpu: [gpus].
        capacity: most copies on every GPU, [gpus].
        extra: copies on top of one each at most.
    """
    slots = np.bincount(host_of_gpu, weights=capacity).astype(np.int64)
    left = slots - np.bincount(host_of_expert, minlength=len(slots))
    most = np.bincount(host_of_gpu[capacity > 0], minlength=len(slots))[host_of_expert]
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(extra):
        able = (copies < most) & (left[host_of_expert] > 0)
        relief = np.where(able, load / copies, 0.0)
        hottest = int(relief.argmax())
        if not relief[hottest]:
            break
        copies[hottest] += 1
        left[host_of_expert[hottest]] -= 1
    held = np.zeros((len(load), len(capacity)), dtype=bool)
    busy = np.zeros(len(capacity))
    item = np.repeat(np.arange(len(load)), copies)
    part = load[item] / copies[item]
    for number in np.argsort(-part, kind="stable").tolist():
        expert = int(item[number])
        may = (host_of_gpu == host_of_expert[expert]) & ~held[expert]
        may &= held.sum(axis=0) < capacity
        if may.any():  # else it has copies elsewhere, and one less
            gpu = int(np.where(may, busy, np.inf).argmin())
            held[expert, gpu] = True
            busy[gpu] += part[number]
    shares: Shares = held / held.sum(axis=1, keepdims=True)
    return shares
