"""What is minimised: how the durations of a layer's phases become its seconds.

    window    one sample of the traffic: a layer's phases are priced on every window by itself
    total     transfers + experts, or max(transfers, experts) where they overlap
    layer     mean over all windows, or over the worst share of them (CVaR: Rockafellar and Uryasev,
              "Optimization of conditional value-at-risk", 2000; here of equally likely windows)

A plan for the mean of the counts would price an average step that never happens: the mean of the
maxima is above the maximum of the means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which seconds of a layer count.

    Attributes:
        overlap: transfers run under the experts: the longer of both counts, not their sum.
        worst: share of the windows that counts, the worst ones; 1 is the mean over all.
    """

    overlap: bool = False
    worst: float = 1.0

    def num_worst(self, num_windows: int) -> int:
        """Return how many windows count."""
        return max(1, ceil(self.worst * num_windows - 1e-9))

    def window_seconds(self, transfer: Floats, compute: Floats) -> Floats:
        """Return a window's seconds from its transfers' and its experts'."""
        return np.maximum(transfer, compute) if self.overlap else transfer + compute

    def seconds(self, of_window: Floats) -> Floats:
        """Return what counts of [windows, ...]."""
        worst = self.num_worst(len(of_window))
        if worst < len(of_window):
            of_window = np.sort(of_window, axis=0)[-worst:]
        mean: Floats = of_window.mean(axis=0)
        return mean


class Timed(Protocol):
    """A phase that lasts as long as its worst row."""

    @property
    def window(self) -> int: ...
    @property
    def weight(self) -> float: ...
    @property
    def is_compute(self) -> bool: ...


def layer_seconds(
    objective: Objective,
    constant_s: Floats,
    phases: Sequence[Timed],
    durations: Sequence[npt.ArrayLike],
) -> Floats:
    """Return a layer's seconds for every candidate, [candidates]; arguments as below."""
    return objective.seconds(window_seconds(objective, constant_s, phases, durations))


def window_seconds(
    objective: Objective,
    constant_s: Floats,
    phases: Sequence[Timed],
    durations: Sequence[npt.ArrayLike],
) -> Floats:
    """Return a layer's seconds on every window, for every candidate, [windows, candidates].

    Args:
        objective: what counts.
        constant_s: transfers no placement changes, [windows].
        phases: P of them.
        durations: of every phase, P arrays that broadcast to [candidates].
    """
    shape = np.broadcast_shapes(*(np.shape(duration) for duration in durations))
    transfer = np.zeros((len(constant_s), *shape))
    compute = np.zeros_like(transfer)
    transfer.T[...] = constant_s
    for phase, duration in zip(phases, durations, strict=True):
        (compute if phase.is_compute else transfer)[phase.window] += phase.weight * np.asarray(
            duration
        )
    return objective.window_seconds(transfer, compute)
