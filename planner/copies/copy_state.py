"""What copies with shares cost where it matters what tokens choose together, kept up to date.

A transfer's rows are linear in the tokens reached (`set_rows`), and these in each expert's shares
(`copy_reach`). So what another share of one expert costs is exact from the slopes at hand.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from epplan.planner.cost import Floats, Shares
from epplan.planner.objective import layer_seconds
from epplan.planner.placement.rows import Ints, PhaseRows
from epplan.planner.together.set_rows import SetLayer
from epplan.planner.together.set_search import levelness

from .copy_reach import CopyReach

Bools = npt.NDArray[np.bool_]


class Price(NamedTuple):
    """Seconds, and how level rows are: what decides between steps of equal seconds."""

    seconds: float
    level: float


class PlaceRows:
    """A transfer's rows by place, in seconds a token of each source; a path has few links."""

    def __init__(self, matrix: csc_array, num_sources: int) -> None:
        self._num_rows, self._num_sources = matrix.shape[0], num_sources
        self._whole = matrix.tocoo()
        self._by_row = matrix.tocsr()
        starts = range(0, matrix.shape[1], num_sources)
        self._blocks = [matrix[:, first : first + num_sources].tocsr() for first in starts]

    def at(self, place: int, tokens: Floats) -> Floats:
        """Return the rows of tokens that reach one place, [rows, n]; tokens [n, sources]."""
        rows: Floats = self._blocks[place] @ tokens.T
        return rows

    def each(self, places: Ints, tokens: Floats) -> Floats:
        """Return the rows of tokens that reach a place each, [rows, n]; [n], [n, sources]."""
        order = np.argsort(places, kind="stable")
        first = np.searchsorted(places[order], np.arange(len(self._blocks) + 1))
        rows, tokens = np.empty((self._num_rows, len(places))), tokens[order]
        for place in np.flatnonzero(np.diff(first)).tolist():
            own = slice(first[place], first[place + 1])
            rows[:, order[own]] = self.at(place, tokens[own])
        return rows

    def every(self, tokens: Floats) -> Floats:
        """Return the rows of what reaches each place, [rows, places]; tokens [sources, places]."""
        row, column = self._whole.coords
        cell = row * len(self._blocks) + column // self._num_sources
        rows = np.bincount(
            cell,
            weights=self._whole.data * tokens.T.ravel()[column],
            minlength=self._num_rows * len(self._blocks),
        )
        return rows.astype(np.float64).reshape(self._num_rows, -1)

    def row(self, row: int) -> Floats:
        """Return one row, [places, sources]."""
        whole: Floats = self._by_row[[row]].toarray()
        return whole.reshape(-1, self._num_sources)


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """The experts' work in a window, in seconds [gpus, experts]."""

    arithmetic: Floats
    reading: Floats

    @classmethod
    def of(cls, phase: PhaseRows) -> "ExpertWork":
        """Return the two rows a GPU that `compute_rows` makes."""
        return cls(*np.split(phase.extra, 2))

    def loads(self, shares: Shares) -> tuple[Floats, Floats]:
        """Return the seconds of arithmetic and reading, [gpus] each."""
        return (self.arithmetic * shares.T).sum(axis=1), (self.reading * (shares.T > 0)).sum(axis=1)


class CopyState:
    """Shares of one layer and what they cost.

    Args:
        layer: the layer.
        shares: to begin with, [experts, gpus].
    """

    def __init__(self, layer: SetLayer, shares: Shares) -> None:
        self.layer = layer
        self.rows = [
            [PlaceRows(matrix, layer.sets[t.window].num_sources) for matrix in t.matrices]
            for t in layer.transfers
        ]
        self.works = {
            number: ExpertWork.of(phase)
            for number, phase in enumerate(layer.others)
            if phase.is_compute
        }
        self.paths = {
            number: phase.alone for number, phase in enumerate(layer.others) if not phase.is_compute
        }
        self.restart(shares)

    def restart(self, shares: Shares) -> None:
        """Go on from other shares, with nothing of rounding left."""
        self.shares = shares.astype(np.float64)
        self.reach = [
            [CopyReach(sets, counts, place, self.shares) for place in self.layer.place_of_gpu]
            for sets, counts in zip(self.layer.sets, self.layer.counts, strict=True)
        ]
        self._settle()

    def copy(self) -> "CopyState":
        """Return the same, to go back to."""
        other = copy(self)
        other.shares = self.shares.copy()
        other.reach = [[level.copy() for level in levels] for levels in self.reach]
        return other

    def change(self, changes: Mapping[int, Floats]) -> None:
        """Change the shares of experts, [gpus] each."""
        for expert, shares in changes.items():
            for levels in self.reach:
                for level in levels:
                    level.change(expert, shares - self.shares[expert])
            self.shares[expert] = shares
        self._settle()

    def _settle(self) -> None:
        layer = self.layer
        self.loads = [
            t.load(tuple(level.reached for level in self.reach[t.window])) for t in layer.transfers
        ]
        self.work = {number: work.loads(self.shares) for number, work in self.works.items()}
        used = self.shares > 0
        seconds, level = self.total(
            [load[:, None] for load in self.loads],
            {
                n: (arithmetic[:, None], reading[:, None])
                for n, (arithmetic, reading) in self.work.items()
            },
            {number: np.array([alone[used].max()]) for number, alone in self.paths.items()},
        )
        self.price = Price(float(seconds[0]), float(level[0]))

    @property
    def held(self) -> Ints:
        """Copies on every GPU, [gpus]."""
        held: Ints = np.count_nonzero(self.shares, axis=0)
        return held

    def total(
        self,
        loads: list[Floats],
        work: dict[int, tuple[Floats, Floats]],
        paths: dict[int, Floats],
    ) -> tuple[Floats, Floats]:
        """Return seconds and levelness of n candidates, [n].

        Args:
            loads: of every transfer, [rows, n].
            work: arithmetic and reading of computing phases by number, [gpus, n].
            paths: longest path of the other phases by number, [n].
        """
        layer = self.layer
        durations = [load.max(axis=0, initial=0.0) for load in loads]
        level = np.zeros(loads[0].shape[1] if loads else next(iter(work.values()))[0].shape[1])
        for transfer, load in zip(layer.transfers, loads, strict=True):
            level += transfer.weight * levelness(load)
        for number in range(len(layer.others)):
            if number in work:
                arithmetic, reading = work[number]
                durations.append(np.maximum(arithmetic.max(axis=0), reading.max(axis=0)))
                level += levelness(arithmetic)
            else:
                durations.append(paths[number])
        seconds = layer_seconds(layer.objective, layer.constant_s, layer.phases, durations)
        return seconds, level

    def slopes(self, expert: int) -> list[Floats]:
        """Return what an expert's whole share on a GPU adds to each transfer, [rows, gpus]."""
        found = []
        for transfer, rows in zip(self.layer.transfers, self.rows, strict=True):
            levels = self.reach[transfer.window]
            parts = [
                of_level.every(level.slope[expert])[:, level.place_of_gpu]
                for level, of_level in zip(levels, rows, strict=True)
            ]
            found.append(np.sum(parts, axis=0))
        return found

    def along(self, expert: int, after: Floats) -> list[Price]:
        """Return the prices of other shares of one expert, [n, gpus]; these are exact."""
        more = (after - self.shares[expert]).T  # [gpus, n]
        loads = [
            load[:, None] + slope @ more
            for load, slope in zip(self.loads, self.slopes(expert), strict=True)
        ]
        copies = (after > 0).T.astype(np.float64) - (self.shares[expert] > 0)[:, None]
        work = {
            number: (
                self.work[number][0][:, None] + of.arithmetic[:, [expert]] * more,
                self.work[number][1][:, None] + of.reading[:, [expert]] * copies,
            )
            for number, of in self.works.items()
        }
        others = self.shares > 0
        others[expert] = False
        paths = {
            number: np.maximum(
                np.where(after > 0, alone[expert], 0.0).max(axis=1),
                alone[others].max(initial=0.0),
            )
            for number, alone in self.paths.items()
        }
        seconds, level = self.total(loads, work, paths)
        return [Price(*pair) for pair in zip(seconds.tolist(), level.tolist(), strict=True)]
