"""What every move and every swap of one expert would cost: all at once, from the sparse rows.

    R rows of a phase . G GPUs . E experts

`search.py` does the same on dense terms [R, E, G], which a large group has no memory for. Here only
[R, G] and [R, E] are made, for one expert at a time.
"""

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Placement
from epplan.planner.objective import layer_seconds
from epplan.planner.placement.rows import Floats, LayerRows, PhaseRows


class Neighbours:
    """The placements next to one placement of a layer; experts at -1 have no place yet."""

    def __init__(self, rows: LayerRows, placement: Placement) -> None:
        self._rows = rows
        self._placement = placement
        self._placed = placement >= 0
        self._own = [_own(phase, placement) for phase in rows.phases]

    def moves(self, expert: int) -> Floats:
        """Return the layer's seconds with the expert on every GPU, [G]."""
        return self._total([self._moved(*pair, expert) for pair in self._phases()])

    def swaps(self, expert: int) -> Floats:
        """Return the layer's seconds after the expert's swap with every other, [E].

        All experts must have a place.
        """
        return self._total([self._swapped(*pair, expert) for pair in self._phases()])

    def _phases(self) -> list[tuple[PhaseRows, Floats]]:
        return list(zip(self._rows.phases, self._own, strict=True))

    def _total(self, durations: list[Floats]) -> Floats:
        rows = self._rows
        return layer_seconds(rows.objective, rows.constant_s, rows.phases, durations)

    def _load(self, phase: PhaseRows, own: Floats, expert: int) -> Floats:
        """Return the rows without what the expert adds where it is, [R]."""
        others = self._placed.copy()
        others[expert] = True  # its base is the same everywhere
        load: Floats = phase.base[:, others].sum(axis=1) + own.sum(axis=1) - own[:, expert]
        return load

    def _moved(self, phase: PhaseRows, own: Floats, expert: int) -> Floats:
        there = np.zeros((len(phase.base), phase.alone.shape[1]))  # [R, G]
        np.add.at(there, (phase.pair_row, phase.pair_gpu), phase.extra[:, expert])
        worst = (self._load(phase, own, expert)[:, None] + there).max(axis=0, initial=0.0)
        others = np.flatnonzero(self._placed)
        others = others[others != expert]
        alone = phase.alone[others, self._placement[others]].max(initial=0.0)
        moved: Floats = np.maximum(np.maximum(worst, phase.alone[expert]), alone)
        return moved

    def _swapped(self, phase: PhaseRows, own: Floats, expert: int) -> Floats:
        placement, here = self._placement, self._placement[expert]
        experts = np.arange(len(placement))
        there = np.zeros((len(phase.base), phase.alone.shape[1]))  # the expert on any GPU, [R, G]
        np.add.at(there, (phase.pair_row, phase.pair_gpu), phase.extra[:, expert])
        coming = np.zeros_like(own)  # the others where the expert is now, [R, E]
        on_here = np.flatnonzero(phase.pair_gpu == here)
        np.add.at(coming, phase.pair_row[on_here], phase.extra[on_here])
        load = self._load(phase, own, expert)[:, None] - own + coming + there[:, placement]
        alone = phase.alone[experts, placement]
        swapped: Floats = np.maximum.reduce(
            [
                load.max(axis=0, initial=0.0),
                phase.alone[expert, placement],
                phase.alone[experts, here],
                _largest_without(alone, expert),
            ]
        )
        return swapped


def _own(phase: PhaseRows, placement: Placement) -> Floats:
    """Return what every expert adds to the rows where it is, beyond its base, [R, E]."""
    own = np.zeros_like(phase.base)
    pair, expert = np.nonzero(phase.pair_gpu[:, None] == placement[None, :])
    np.add.at(own, (phase.pair_row[pair], expert), phase.extra[pair, expert])
    return own


def _largest_without(values: npt.NDArray[np.float64], expert: int) -> Floats:
    """Return the largest value without `expert` and each other one, [E]."""
    rest = values.copy()
    rest[expert] = 0.0
    top = int(rest.argmax())
    largest = rest[top]
    rest[top] = 0.0
    without: Floats = np.where(np.arange(len(values)) == top, rest.max(), largest)
    return without
