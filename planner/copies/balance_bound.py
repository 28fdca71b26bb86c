"""A lower bound on the busiest GPU's load, whatever copies are made, wherever, with any shares.

    E experts with loads w . G GPUs of K slots . C copies of all experts at most

Draw an edge from an expert to each GPU on which a copy of it has a share, and take the connected
parts of that graph. A part of n GPUs and m experts has n + m - 1 edges or more, and K n at most:

    s = (K - 1) n + 1 - m >= 0                                                                  (1)

Over all parts, n adds up to G and m to E. So n - 1 + s = K n - m adds up to K G - E, and because
edges are copies, n - 1 adds up to C - E at most. No term is negative, so over some of the parts

    sum of (n - 1 + s) <= K G - E          sum of (n - 1) <= C - E                               (2)

Within a maximum of M, a part's experts have a load of M n at most. Now take the parts that the h
hottest experts are in. Which of them are together, how large the parts are, and how many of the
other experts each has by (1) are variables of a small integer program; others come in classes, all
as light as the lightest of their class, and may be divided. It minimises the first sum of (2)
within the second. Where its proven minimum is above K G - E, no copies reach M, and M is a lower
bound.

A light expert has to fill each slot that none of the few copies fills: that is what a hot expert on
many GPUs runs into, and what a bound from single experts does not see.
"""

import time
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pulp

from epplan.planner.placement.highs import least

Floats = npt.NDArray[np.float64]

_HOTTEST = 14  # experts in the program
_CLASSES = 10  # of the others
_HOT = 0.7  # of the mean GPU load: cooler ones hardly need a second copy
_STEP_S = 5.0  # for one program; what is proven by then counts
_CLOSE = 1e-4  # of the limit: far above the solver's tolerances


def least_maximum(
    load: npt.ArrayLike,
    num_gpus: int,
    slots_per_gpu: int,
    copies: int,
    *,
    precision: float = 1e-3,
    most: float = np.inf,
    time_limit_s: float = np.inf,
) -> float:
    """Return a load that the busiest GPU has at least.

    Args:
        load: of every expert, not negative, [E].
        num_gpus: G.
        slots_per_gpu: K.
        copies: C.
        precision: relative, of the search for the largest bound.
        most: a maximum that can be reached: nothing above is looked for.
        time_limit_s: what is proven by then is returned.
    """
    falling = tuple(np.sort(np.asarray(load, dtype=np.float64))[::-1].tolist())
    return _least_maximum(falling, num_gpus, slots_per_gpu, copies, precision, most, time_limit_s)


@lru_cache(maxsize=256)  # layers differ in which expert is hot, and not always in more
def _least_maximum(
    falling: tuple[float, ...],
    num_gpus: int,
    slots_per_gpu: int,
    copies: int,
    precision: float,
    most: float,
    time_limit_s: float,
) -> float:
    deadline = time.monotonic() + time_limit_s
    load = np.array(falling)
    mean = load.sum() / num_gpus
    low = max(mean, load[0] / num_gpus)
    num_hot = min(_HOTTEST, int((load > _HOT * mean).sum()))
    # With G - 1 further copies all GPUs can be one part, which shares level exactly.
    if not num_hot or load[0] <= low or copies - len(load) >= num_gpus - 1:
        return float(low)
    high = min(most, load[0] + load.sum())
    step = precision
    first = most / (1 + precision)  # what can be reached is often nearly the least
    while low * (1 + precision) < high and time.monotonic() < deadline:
        left_s = min(_STEP_S, deadline - time.monotonic())
        # Small steps up first: most loads can be balanced, and then one program says so.
        middle = min((low + high) / 2, low * (1 + step))
        if low < first < high:
            middle, first = first, 0.0
        if _is_impossible(load, middle, num_hot, num_gpus, slots_per_gpu, copies, left_s):
            low, step = middle, 4 * step
        else:
            high = middle
    return float(low)


def _is_impossible(
    load: Floats,
    maximum: float,
    num_hot: int,
    num_gpus: int,
    slots: int,
    copies: int,
    left_s: float,
) -> bool:
    """Return whether the program proves that no copies keep every GPU within `maximum`."""
    hot, rest = load[:num_hot] / maximum, load[num_hot:][::-1] / maximum
    classes = [part for part in np.array_split(rest, _CLASSES) if len(part)]
    lp = pulp.LpProblem("parts", pulp.LpMinimize)
    experts = range(num_hot)
    # A part is named by the hottest expert in it.
    inside = {
        (expert, part): lp.add_variable(f"x_{expert}_{part}", cat="Binary")
        for part in experts
        for expert in range(part, num_hot)
    }
    sums = []
    used: list[list[pulp.LpVariable]] = [[] for _ in classes]
    for part in experts:
        there = inside[part, part]
        gpus = lp.add_variable(f"n_{part}", 0, num_gpus, cat="Integer")
        spare = lp.add_variable(f"s_{part}", lowBound=0)
        others = [
            lp.add_variable(f"y_{part}_{number}", 0, len(members))
            for number, members in enumerate(classes)
        ]
        for number, variable in enumerate(others):
            used[number].append(variable)
        members = [inside[expert, part] for expert in range(part, num_hot)]
        for member in members[1:]:
            lp += member <= there
        lp += gpus <= num_gpus * there
        lp += gpus >= there
        lp += (
            pulp.lpSum(float(hot[part + n]) * member for n, member in enumerate(members))
            + pulp.lpSum(float(c.min()) * y for c, y in zip(classes, others, strict=True))
            <= gpus
        )
        lp += pulp.lpSum(members) + pulp.lpSum(others) + spare == (slots - 1) * gpus + there
        sums.append((gpus - there, spare))
    for expert in experts:
        lp += pulp.lpSum(inside[expert, part] for part in range(expert + 1)) == 1
    for number, members_used in enumerate(used):
        lp += pulp.lpSum(members_used) <= len(classes[number])
    lp += pulp.lpSum(further for further, _ in sums) <= copies - len(load)
    lp.setObjective(pulp.lpSum(further + spare for further, spare in sums))
    limit = slots * num_gpus - len(load)
    return least(lp, time_limit_s=left_s) > limit + _CLOSE * max(1, limit)
