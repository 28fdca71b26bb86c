"""Swaps and moves over all GPUs at once, on a smooth form of the objective.

A phase lasts as long as its worst row. In a good placement many rows are nearly the worst, and a
swap that shortens one of them gains nothing: descent on the maximum stops early. Here a phase of
rows r lasts

    log(sum over r of exp(b load[r])) / b          b = sharpness / load of the worst row

which counts all of them, and comes near the maximum as the sharpness grows from stage to stage
(log-sum-exp; Nesterov, "Smooth minimization of non-smooth functions", 2005). A swap changes the
rows of two GPUs, so what all swaps of an item would do is priced in one go.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from epplan.planner.cost import Placement
from epplan.planner.objective import layer_seconds

from .rows import Floats, Ints, LayerRows, PhaseRows
from .search import Limit, forbid, largest_without

_SHARPNESS = (60.0, 200.0, 600.0, 1800.0)  # worst rows within about 1 / sharpness count alike
_PASSES = 20  # over all items at one sharpness: a guard, most stages need under ten
_GAIN = 1 - 3e-6  # what a step must reach at least: smaller ones cost passes and add up to little
_WEIGHTY = 0.5  # of the worst row: kinds of rows below do not come near it
_STEEP = 300.0  # exponent from which a row is too long in any case
_NOTHING = 1e-9  # of the worst row's term: below is rounding


def descend_smoothly(
    rows: LayerRows,
    start: Placement,
    capacity: npt.NDArray[np.int64],
    limits: Sequence[Limit] = (),
    *,
    enough_s: float = 0.0,
    deadline: float = inf,
) -> Placement:
    """Return the best placement on the way of swaps and moves, by the exact objective.

    Args:
        rows: of the items.
        start: GPU of every item, [items].
        capacity: most items on every GPU, [gpus].
        limits: on items that belong together.
        enough_s: a cost from which nothing better is looked for.
        deadline: time.monotonic() at which to stop.
    """
    best, least = start, rows.seconds(start)
    last = start
    for sharpness in _SHARPNESS:
        for placement in _passes(rows, last, capacity, limits, sharpness, deadline):
            last = placement
            if (seconds := rows.seconds(placement)) < least:
                best, least = placement, seconds
            if least <= enough_s or time.monotonic() >= deadline:
                return best
    return best


def _passes(
    rows: LayerRows,
    start: Placement,
    capacity: npt.NDArray[np.int64],
    limits: Sequence[Limit],
    sharpness: float,
    deadline: float,
) -> Iterator[Placement]:
    """Yield the placement after every pass over all items, until one changes nothing."""
    state = Smooth(rows, start, capacity, limits, sharpness)
    for _ in range(_PASSES):
        before = state.placement.copy()
        for item in range(len(start)):
            if time.monotonic() >= deadline:
                break
            state.improve(item)
        yield state.placement.copy()
        if (before == state.placement).all():
            return
        state.price()  # afresh: differences add up to rounding


class Smooth:
    """A placement, its smooth objective, and the steps that make it better.

    A free slot is an item without rows: a move is a swap with it.

    Attributes:
        placement: GPU of every item, [items]; `price` after it was changed.
        seconds: the smooth objective.
    """

    def __init__(
        self,
        rows: LayerRows,
        placement: Placement,
        capacity: npt.NDArray[np.int64],
        limits: Sequence[Limit],
        sharpness: float,
    ) -> None:
        self.placement = placement.copy()
        self._rows, self._capacity, self._limits = rows, capacity, limits
        free = len(capacity) if capacity.sum() > len(placement) else 0
        self._slots = np.arange(free)  # one a GPU; only some of them are free
        self._phases = [_phase(phase, placement, free, sharpness) for phase in rows.phases]
        self.price()

    def price(self) -> None:
        """Take stock of the placement."""
        for phase in self._phases:
            phase.place(self._at)
        self._full = [limit.count(self.placement) >= limit.most for limit in self._limits]
        self.seconds = float(self._total([phase.seconds for phase in self._phases]))

    @property
    def _at(self) -> Placement:
        """GPU of every item and slot."""
        return np.concatenate([self.placement, self._slots])

    def after(self, item: int) -> Floats:
        """Return the smooth objective after an item has gone where another is, or to a free slot.

        [items + slots], with one slot a GPU if any is free; infinity where it may not.
        """
        here = self.placement[item]
        seconds = self._total([phase.after(self._at, item) for phase in self._phases])
        swapped, moved = np.split(seconds, [len(self.placement)])
        swapped[self.placement == here] = np.inf
        if len(moved):
            held = np.bincount(self.placement, minlength=len(self._capacity))
            moved[held >= self._capacity] = np.inf
            moved[here] = np.inf
        gpus = moved if len(moved) else np.zeros(len(self._capacity))
        for limit, full in zip(self._limits, self._full, strict=True):
            forbid(limit, full, self.placement, item, gpus, swapped)
        return seconds

    def improve(self, item: int) -> None:
        """Do the best swap or move of an item, if there is a good one."""
        seconds, here = self.after(item), self.placement[item]
        other = int(seconds.argmin())
        if seconds[other] < self.seconds * _GAIN:
            self.placement[item] = self._at[other]
            if other < len(self.placement):
                self.placement[other] = here
            self.price()

    def _total(self, durations: Sequence[npt.ArrayLike]) -> Floats:
        rows = self._rows
        return layer_seconds(rows.objective, rows.constant_s, rows.phases, durations)


@dataclass(kw_only=True)
class _SmoothPhase:
    """A phase of rows.

    Attributes:
        pair: of every GPU, its pairs; the last pair loads nothing, [gpus, K].
        row: of these, likewise, [gpus, K].
        extra: of pairs, in units of 1 / b, [pairs + 1, items + slots].
        base: of rows wherever items sit, in the same, [rows + 1].
        meets: whether two GPUs, not the same, have a row in common, [gpus, gpus].
        steepness: b, 1 / s.
    """

    pair: Ints
    row: Ints
    extra: Floats
    base: Floats
    meets: npt.NDArray[np.bool_]
    steepness: float

    def __post_init__(self) -> None:
        self._of_item = np.ascontiguousarray(self.extra.T)

    def place(self, at: Placement) -> None:
        """Take stock of the GPUs of items and slots."""
        self._pair = self.pair[at].T.copy()  # [K, items + slots], as all below
        self._row = self.row[at].T.copy()
        self._own = self.extra[self._pair, np.arange(len(at))]
        load = self.base.copy()
        np.add.at(load, self._row, self._own)
        load[-1] = -np.inf
        self._worst = load.max()
        self._above = load - self._worst  # of rows, not positive
        self._term = np.exp(self._above)
        self._above_there = self._above[self._row]
        self._others = self._term.sum() - self._term[self._row].sum(axis=0)

    @property
    def seconds(self) -> float:
        """Smooth duration."""
        return float(self._worst + np.log(self._term.sum())) / self.steepness

    def after(self, at: Placement, item: int) -> Floats:
        """Return the duration after `item` has changed places with every other, [items + slots]."""
        gpu = at[item]
        here = self.row[gpu][:, None]
        more_here = self.extra[self.pair[gpu]] - self._own[:, [item]]
        more_there = self._of_item[item][self._pair] - self._own
        near = np.flatnonzero(self.meets[gpu, at])
        if near.size:
            # A row of both GPUs counts once, with what both ends of the exchange do to it.
            last = len(self.base) - 1
            both = (here[:, None] == self._row[None, :, near]) & (here < last)[:, None]
            more_here[:, near] += (both * more_there[:, near]).sum(axis=1)
            more_there[:, near] *= ~both.any(axis=0)
        more_here += self._above[here]
        more_there += self._above_there
        total = self._others - self._term[here].sum() + _sum_of_terms(more_here)
        total += _sum_of_terms(more_there)
        duration: Floats = (self._worst + np.log(np.maximum(total, _NOTHING))) / self.steepness
        return duration


def _sum_of_terms(above: Floats) -> Floats:
    """Return the sum of terms of rows that are `above` the worst [K, others], which is lost."""
    np.minimum(above, _STEEP, out=above)
    total: Floats = np.exp(above, out=above).sum(axis=0)
    return total


@dataclass(kw_only=True)
class _Latency:
    """A phase as long as its longest path.

    Attributes:
        alone: seconds of items on GPUs, zero for slots, [items + slots, gpus].
    """

    alone: Floats

    def place(self, at: Placement) -> None:
        """Take stock of the GPUs of items and slots."""
        self._number = np.arange(len(at))
        self._own = self.alone[self._number, at]

    @property
    def seconds(self) -> float:
        """Duration."""
        return float(self._own.max())

    def after(self, at: Placement, item: int) -> Floats:
        """Return the duration after `item` has changed places with every other, [items + slots]."""
        _, others = largest_without(self._own, item)
        longest: Floats = np.maximum.reduce(
            [self.alone[item, at], self.alone[self._number, at[item]], others]
        )
        return longest


def _phase(
    phase: PhaseRows, placement: Placement, slots: int, sharpness: float
) -> _SmoothPhase | _Latency:
    if not len(phase.base):
        return _Latency(alone=np.pad(phase.alone, ((0, slots), (0, 0))))
    num_rows, gpus = len(phase.base), phase.alone.shape[1]
    load = phase.load(placement)
    pairs = np.flatnonzero(_weighty(phase, load)[phase.pair_row])
    pairs = pairs[np.argsort(phase.pair_gpu[pairs], kind="stable")]
    number = np.bincount(phase.pair_gpu[pairs], minlength=gpus)
    place = np.arange(len(pairs)) - np.repeat(np.cumsum(number) - number, number)
    pair = np.full((gpus, max(1, number.max())), len(pairs))
    pair[phase.pair_gpu[pairs], place] = np.arange(len(pairs))
    row = np.append(phase.pair_row[pairs], num_rows)[pair]
    there = csr_array(
        (np.ones(len(pairs)), (phase.pair_gpu[pairs], phase.pair_row[pairs])), (gpus, num_rows)
    )
    meets = (there @ there.T).toarray() > 0
    np.fill_diagonal(meets, False)  # an exchange on one GPU is none
    steepness = sharpness / (load.max() or 1.0)  # without load any will do
    return _SmoothPhase(
        pair=pair,
        row=row,
        extra=steepness * np.pad(phase.extra[pairs], ((0, 1), (0, slots))),
        base=steepness * np.append(phase.base.sum(axis=1), 0.0),
        meets=meets,
        steepness=steepness,
    )


def _weighty(phase: PhaseRows, load: Floats) -> npt.NDArray[np.bool_]:
    """Return which rows are of a kind that comes near the worst, [rows].

    Of one kind are rows of as many GPUs and the same capacity: the ports of one type, say.
    """
    size = np.bincount(phase.pair_row, minlength=len(load))
    _, kind = np.unique(np.stack([size, phase.capacity]), axis=1, return_inverse=True)
    heaviest = np.zeros(kind.max() + 1)
    np.maximum.at(heaviest, kind, load)
    weighty: npt.NDArray[np.bool_] = heaviest[kind] > _WEIGHTY * load.max()
    return weighty
