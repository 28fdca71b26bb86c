"""What a topology expects timed transfers to take, beside what they took."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from .host_paths import PATH_TYPES
from .routes import Routes
from .transfer_cost import transfer_cost

Point = tuple[int, float]  # bytes, seconds
Pair = tuple[int, int]  # numbers of two GPUs in the routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One size of message over one type of path."""

    path: str
    transfers: Literal["pairs", "all-to-all"]
    bytes: int  # that a rank sends to others
    measured_s: float  # of pairs the median
    expected_s: float

    @property
    def expected_over_measured(self) -> float:
        """Above 1 the topology says slower than the cluster is."""
        return self.expected_s / self.measured_s


def compare_pairs(routes: Routes, pairs: dict[Pair, list[Point]]) -> Iterator[Compared]:
    """Yield every size of pairs that are alike in type and rating of their path."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for points in pairs.values():
        for size, seconds in points:
            by_size[size].append(seconds)
    first, second = next(iter(pairs))  # stands for all
    for size, all_seconds in sorted(by_size.items()):
        sent = np.zeros(routes.path_type.shape)
        sent[first, second] = size
        yield Compared(
            path=PATH_TYPES[routes.path_type[first, second]],
            transfers="pairs",
            bytes=size,
            measured_s=median(all_seconds),
            expected_s=transfer_cost(routes, sent).seconds,
        )


def compare_all_to_all(routes: Routes, points: Iterable[Point]) -> Iterator[Compared]:
    """Yield every size of an all-to-all between all GPUs of the routes."""
    others = ~np.eye(len(routes.gpus), dtype=bool)
    paths = sorted({PATH_TYPES[path] for path in routes.path_type[others].tolist()})
    for size, seconds in points:
        yield Compared(
            path=", ".join(paths),
            transfers="all-to-all",
            bytes=size,
            measured_s=seconds,
            expected_s=transfer_cost(routes, others * (size / (len(routes.gpus) - 1))).seconds,
        )
