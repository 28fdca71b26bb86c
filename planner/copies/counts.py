"""How many copies of which expert: counted by rows, and the counts near to some."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Floats
from epplan.planner.placement.rows import Ints


def count_copies(load: Floats, extra: int, least: int, most: int) -> npt.NDArray[np.int64]:
    """Return how many copies every expert gets: the next one to whom a copy relieves most.

    Args:
        load: rows of every expert, [experts].
        extra: copies on top of one each.
        least: copies of every expert at least.
        most: at most, one a GPU.
    """
    copies = np.full(len(load), least)
    for _ in range(extra - (least - 1) * len(load)):
        relief = np.where(copies < most, load / copies, -1.0)
        hottest = int(relief.argmax())
        if relief[hottest] <= 0:
            break  # a copy of an expert without rows helps nobody
        copies[hottest] += 1
    return copies


def near_counts(load: Floats, copies: Ints, total: int, least: int, most: int) -> Iterator[Ints]:
    """Yield the counts, and those one exchange away, what promises most first, [experts].

    Args:
        load: rows of every expert, [experts].
        copies: of every expert, [experts].
        total: copies of all experts at most.
        least: copies of every expert at least.
        most: at most, one a GPU.
    """
    yield copies
    fewer = np.flatnonzero(copies > least)
    fewer = fewer[np.argsort(load[fewer] / (copies[fewer] - 1 + 1e-9), kind="stable")]
    more = np.flatnonzero(copies < most)
    more = more[np.argsort(-load[more] / copies[more], kind="stable")]
    step = np.eye(len(copies), dtype=copies.dtype)
    for one in fewer:
        yield copies - step[one]
    if copies.sum() < total:
        for other in more:
            yield copies + step[other]
    for other, one in product(more, fewer):
        if one != other:
            yield copies + step[other] - step[one]
