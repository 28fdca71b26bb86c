"""What every placement loads, in sparse form: the linear rows behind the worst resource.

A row is a resource's time. What expert e adds to row r on GPU g is the same for almost all g: a
NIC's outgoing row grows by e's traffic wherever e sits, except on the NIC's own host. So a row is

    base[r, e]  everywhere,  plus  extra[p, e]  on the few GPUs g of its pairs p = (r, g)

and a placement's load is  sum over e of base[r, e] + sum over pairs (r, gpu of e) of extra[p, e].
`row_builder` makes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Placement, Shares
from epplan.planner.objective import Objective, layer_seconds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRows:
    """One phase of one layer: the maximum over its rows, and over what single experts cause.

    Attributes:
        name: dispatch, compute, combine, or the latency of one of them.
        window: of the traffic.
        weight: how often the phase counts (2 where combine is the mirror of dispatch).
        base: seconds, [rows, experts].
        pair_row: row of every pair, [pairs].
        pair_gpu: GPU of every pair, [pairs].
        extra: seconds on top of base, [pairs, experts].
        per_copy: rows that a copy loads whole, whatever its share of the traffic, [rows].
        capacity: of every row, to weigh rows that are added up, [rows].
        alone: the phase lasts at least this long when expert e sits on GPU g, [experts, gpus].
    """

    name: str
    window: int
    weight: float
    base: Floats
    pair_row: Ints
    pair_gpu: Ints
    extra: Floats
    per_copy: npt.NDArray[np.bool_]
    capacity: Floats
    alone: Floats

    @property
    def is_compute(self) -> bool:
        """Whether it is the experts' and not a transfer's."""
        return self.name == "compute"

    @property
    def floor_s(self) -> float:
        """No placement makes the phase shorter: the expert that costs most where it costs least."""
        return float(self.alone.min(axis=1).max())

    def load(self, placement: Placement) -> Floats:
        """Return every row's seconds for ranks of experts, [rows]."""
        load: Floats = self.base.sum(axis=1)
        pair, expert = np.nonzero(self.pair_gpu[:, None] == placement[None, :])
        np.add.at(load, self.pair_row[pair], self.extra[pair, expert])
        return load

    def seconds(self, placement: Placement) -> float:
        """Return the phase's duration for ranks of experts, [experts]."""
        alone = self.alone[np.arange(len(placement)), placement].max()
        return max(float(self.load(placement).max(initial=0.0)), float(alone))

    def load_of_shares(self, shares: Shares) -> Floats:
        """Return every row's seconds for shares of experts on GPUs, [rows]."""
        load: Floats = (self.base * shares.sum(axis=1)).sum(axis=1)
        whole = self.per_copy[self.pair_row][:, None]
        at = np.where(whole, shares.T[self.pair_gpu] > 0, shares.T[self.pair_gpu])
        np.add.at(load, self.pair_row, (self.extra * at).sum(axis=1))
        return load

    def seconds_of_shares(self, shares: Shares) -> float:
        """Return the phase's duration for shares of experts on GPUs, [experts, gpus]."""
        if not len(self.base):  # latency: a path is used or not
            return float(self.alone[shares > 0].max())
        return float(self.load_of_shares(shares).max())

    def floor_with_copies(self, num_copies: int) -> float:
        """Return what the phase lasts at least with so many copies of all experts, shares free.

        Each of n copies of an expert loads its own GPU's rows; the largest has a share of 1/n at
        least. So within L, expert e needs alone[e] / L copies, and all of them need num_copies.
        """
        if not len(self.base):
            return self.floor_s
        whole = self.copies(np.arange(self.alone.shape[0]), np.zeros(self.alone.shape[0])).floor_s
        alone = self._alone_of_traffic().min(axis=1)
        return max(least_with_copies(alone, self.alone.shape[1], num_copies), whole)

    def own_rows(self) -> Floats | None:
        """Return what experts add to each GPU's heaviest row that only its own experts load.

        In seconds, [experts, gpus]; None where some GPU has no such row.
        """
        num_gpus = self.alone.shape[1]
        of_row = np.bincount(self.pair_row, minlength=len(self.base))
        own = (of_row == 1) & ~self.base.any(axis=1) & ~self.per_copy
        pairs = np.flatnonzero(own[self.pair_row])
        total = self.extra[pairs].sum(axis=1)
        heaviest: dict[int, int] = {}
        for number in np.argsort(total, kind="stable").tolist():
            heaviest[int(self.pair_gpu[pairs[number]])] = int(pairs[number])
        if len(heaviest) < num_gpus:
            return None
        amounts: Floats = self.extra[[heaviest[gpu] for gpu in range(num_gpus)]].T
        return amounts

    def _alone_of_traffic(self) -> Floats:
        """Return `alone` without the rows that a copy loads whole, [experts, gpus]."""
        pairs = ~self.per_copy[self.pair_row]
        return alone_rows(
            self.base,
            self.pair_row[pairs],
            self.pair_gpu[pairs],
            self.extra[pairs],
            self.alone.shape[1],
        )

    def copies(self, expert: Ints, share: Floats) -> "PhaseRows":
        """Return the phase with copies in the place of experts."""
        base = self.base[:, expert] * share
        part = np.where(self.per_copy[self.pair_row][:, None], 1.0, share)
        extra = self.extra[:, expert] * part
        num_gpus = self.alone.shape[1]
        alone = (
            alone_rows(base, self.pair_row, self.pair_gpu, extra, num_gpus)
            if len(base)
            else self.alone[expert]  # latency: a path is used or not
        )
        return replace(self, base=base, extra=extra, alone=alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """All phases of one layer, and the transfer seconds that no placement changes, [windows]."""

    phases: tuple[PhaseRows, ...]
    constant_s: Floats
    objective: Objective

    @property
    def num_experts(self) -> int:
        """Experts to place."""
        return len(self.phases[0].alone)

    @property
    def floor_s(self) -> float:
        """A lower bound on any placement, from single experts."""
        return self.total([phase.floor_s for phase in self.phases])

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        return self.total([phase.seconds(placement) for phase in self.phases])

    def copies(self, expert: Ints, share: Floats) -> "LayerRows":
        """Return the rows of copies: `share` [items] of `expert` [items]."""
        return replace(self, phases=tuple(phase.copies(expert, share) for phase in self.phases))

    def seconds_of_shares(self, shares: Shares) -> float:
        """Return the cost of shares of experts on GPUs, [experts, gpus]."""
        return self.total([phase.seconds_of_shares(shares) for phase in self.phases])

    def total(self, durations: Sequence[float]) -> float:
        """Return the layer's seconds from its phases'."""
        return float(layer_seconds(self.objective, self.constant_s, self.phases, durations))


def least_with_copies(alone: Floats, num_gpus: int, num_copies: int) -> float:
    """Return what the copy that takes longest takes at least, whatever shares they have.

    Args:
        alone: seconds of every expert's whole share, where it takes least, [experts].
        num_gpus: most copies of one expert.
        num_copies: copies of all experts at most.
    """
    low, high = float(alone.max()) / num_gpus, float(alone.max())
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.maximum(1, np.ceil(alone / max(middle, 1e-300) - 1e-9)).sum() <= num_copies
        low, high = (low, middle) if enough else (middle, high)
    return low


def alone_rows(
    base: Floats, pair_row: Ints, pair_gpu: Ints, extra: Floats, num_gpus: int
) -> Floats:
    """Return the largest row an expert causes on a GPU by itself, [experts, gpus].

    Rows without a pair on the GPU are left out: the result is a lower bound, and tight because an
    expert's own link carries more of its traffic than any other.
    """
    alone = np.zeros((num_gpus, base.shape[1]))
    np.maximum.at(alone, pair_gpu, base[pair_row] + extra)
    return alone.T
