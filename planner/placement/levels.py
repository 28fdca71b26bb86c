"""One layer, by topology level: hosts first, then GPUs inside each host, then proof.

GPUs of a host are nearly interchangeable, and that symmetry is what an integer program over all
GPUs drowns in. So:

    1  search and integer program over hosts, or the GPUs of a host that share a NIC (a relaxation:
       its bound is a bound on the real thing)
    2  every such cell's experts on its GPUs, by greedy and swaps on the exact rows
    3  only for small groups, and only if the gap is still too wide: the program over GPUs
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epplan.errors import EpplanError
from epplan.planner.cost import Floats, Placement, Shares, one_copy

from .highs import solve
from .program import MICROSECONDS, build_program
from .rows import Ints, LayerRows
from .search import Limit, NoRoomError, best_start, contiguous, descend, greedy
from .smooth import descend_smoothly
from .terms import LayerTerms, cell_terms, cells_of_rows, common_seconds, gpu_terms, inner_terms

OPTIMAL_GAP = 1e-6  # HiGHS's own feasibility tolerance: a smaller gap means nothing
_FLAT_SIZE = 2048  # experts x GPUs up to which the program over GPUs is tried


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """A placement and what is proven about it.

    Attributes:
        placement: rank of every item: of every expert, or of every copy.
        seconds: its cost by the linear form.
        bound_s: no placement of this layer costs less.
        found_by: how it was found.
        floor_s: the part of the bound that single experts cause wherever they sit.
        expert: of every item; None where items are the experts.
        share: of its expert's rows that an item takes; None is all.
        free_bound_s: the bound without a constraint that was asked for; None: there was none.
    """

    placement: Placement
    seconds: float
    bound_s: float
    found_by: str
    floor_s: float
    expert: Ints | None = None
    share: Floats | None = None
    free_bound_s: float | None = None

    def shares(self, num_ranks: int) -> Shares:
        """Return the share of every expert's rows on each rank, [experts, ranks]."""
        if self.expert is None or self.share is None:
            return one_copy(self.placement, num_ranks)
        shares = np.zeros((self.expert.max() + 1, num_ranks))
        shares[self.expert, self.placement] = self.share
        return shares

    def proven(self, bound_s: float) -> "LayerPlacement":
        """Return it with a bound on all placements, if that is the better one."""
        return replace(self, bound_s=min(max(self.bound_s, bound_s), self.seconds))

    def is_done(self, gap: float) -> bool:
        """Whether the gap is closed that far."""
        return self.seconds - self.bound_s <= max(gap, OPTIMAL_GAP) * self.seconds


Report = Callable[[LayerPlacement], None]  # takes what is better than before


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far to go: relative gap, wall-clock deadline (time.monotonic), seed."""

    gap: float
    deadline: float
    seed: int

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def within(self, seconds: float) -> "Effort":
        """Return the same for so many seconds from now, but no longer."""
        return replace(self, deadline=min(self.deadline, time.monotonic() + seconds))

    def part(self, share: float) -> "Effort":
        """Return the same for a share of the time left."""
        return self.within(share * self.left_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What keeps items apart, on GPUs and on cells."""

    on_gpus: tuple[Limit, ...] = ()
    on_cells: tuple[Limit, ...] = ()


class _Layer:
    """The best placement and bound of one layer so far."""

    def __init__(
        self,
        rows: LayerRows,
        cell_of_gpu: Ints,
        capacity: npt.NDArray[np.int64],
        best: LayerPlacement,
        limits: Limits | None = None,
    ) -> None:
        self.rows = rows
        self.cell_of_gpu = cell_of_gpu
        self.capacity = capacity
        self.best = best
        self.limits = limits or Limits()
        self.report: Report | None = None

    def offer(self, placement: Placement, found_by: str) -> None:
        """Take a placement if it is better."""
        seconds = self.rows.seconds(placement)
        if seconds < self.best.seconds * (1 - 1e-9):
            self._take(replace(self.best, placement=placement, seconds=seconds, found_by=found_by))

    def prove(self, bound_s: float) -> None:
        """Take a lower bound if it is higher."""
        bound_s = min(bound_s, self.best.seconds)
        if bound_s > self.best.bound_s:
            self._take(replace(self.best, bound_s=bound_s))

    def _take(self, better: LayerPlacement) -> None:
        self.best = better
        if self.report is not None:
            self.report(better)


Task = (
    tuple[LayerRows, Ints, npt.NDArray[np.int64], LayerPlacement]
    | tuple[LayerRows, Ints, npt.NDArray[np.int64], LayerPlacement, Limits]
)


def in_id_order(rows: LayerRows, capacity: npt.NDArray[np.int64]) -> LayerPlacement:
    """Return the placement to start from: experts in id order, [gpus] capacity kept."""
    placement = contiguous(rows.num_experts, capacity)
    return LayerPlacement(
        placement=placement,
        seconds=rows.seconds(placement),
        bound_s=rows.floor_s,
        found_by="contiguous",
        floor_s=rows.floor_s,
    )


def place_layer(task: Task, effort: Effort, report: Report | None = None) -> LayerPlacement:
    """Return a placement of one layer with a proven bound.

    Args:
        task: the layer's rows, `RowBuilder.cells`, most experts on every GPU [gpus], the placement
            to start from, and what keeps items apart.
        effort: when to stop.
        report: takes every better one on the way, bounds included.

    Raises:
        KeyboardInterrupt: Ctrl-C, with the best so far reported.
    """
    layer = _Layer(*task)
    layer.report = report
    _search(layer, effort)
    if not layer.best.is_done(effort.gap) and effort.left_s:
        _by_cells(layer, effort)
    if not layer.best.is_done(effort.gap) and effort.left_s and _is_small(layer):
        terms, start = gpu_terms(layer.rows), layer.best.placement
        with run_program(terms, layer.capacity, start, effort, layer.limits.on_gpus) as found:
            layer.offer(found.placement, "integer program over GPUs")
            layer.prove(found.bound_s)
    return layer.best


def _search(layer: _Layer, effort: Effort) -> None:
    """Improve the placement without the solver, over cells and, if few, over GPUs."""
    if not layer.best.is_done(0.0):
        terms = cell_terms(layer.rows, layer.cell_of_gpu)
        layer.prove(terms.floor_s)
        with suppress(NoRoomError):
            name, cells = best_start(
                terms, _room(layer), effort.seed, 0, layer.limits.on_cells, effort.deadline
            )
            layer.offer(_fill_cells(layer, cells, effort), f"{name} over hosts")
    if not layer.best.is_done(effort.gap) and effort.left_s:
        placement = descend_smoothly(
            layer.rows,
            layer.best.placement,
            layer.capacity,
            layer.limits.on_gpus,
            enough_s=layer.best.bound_s,
            deadline=effort.deadline,
        )
        layer.offer(placement, "swaps over GPUs")
    if not layer.best.is_done(0.0) and effort.left_s and _is_small(layer):
        with suppress(NoRoomError):
            terms, limits = gpu_terms(layer.rows), layer.limits.on_gpus
            name, placement = best_start(
                terms, layer.capacity, effort.seed, limits=limits, deadline=effort.deadline
            )
            layer.offer(placement, name)


def _is_small(layer: _Layer) -> bool:
    return layer.rows.num_experts * len(layer.capacity) <= _FLAT_SIZE


def _room(layer: _Layer) -> npt.NDArray[np.int64]:
    """Return most experts in every cell, [cells]."""
    return np.bincount(layer.cell_of_gpu, weights=layer.capacity).astype(np.int64)


def _by_cells(layer: _Layer, effort: Effort) -> None:
    """Improve placement and bound by the program over cells."""
    terms = cell_terms(layer.rows, layer.cell_of_gpu)
    # GPUs inside a cell add to the cost; where that leaves the gap open, ask for a tighter one.
    for gap in (effort.gap, effort.gap / 4):
        start = layer.cell_of_gpu[layer.best.placement]
        within = replace(effort, gap=gap)
        with run_program(terms, _room(layer), start, within, layer.limits.on_cells) as found:
            layer.prove(found.bound_s)
            with suppress(NoRoomError):
                cells = _fill_cells(layer, found.placement, effort)
                layer.offer(cells, "integer program over hosts")
        if layer.best.is_done(effort.gap) or not effort.left_s:
            break


def _fill_cells(layer: _Layer, cells: Placement, effort: Effort) -> Placement:
    return fill_cells(
        layer.rows, layer.cell_of_gpu, layer.capacity, layer.limits, cells, effort.deadline
    )


def fill_cells(
    rows: LayerRows,
    cell_of_gpu: Ints,
    capacity: npt.NDArray[np.int64],
    limits: Limits,
    cells: Placement,
    deadline: float,
) -> Placement:
    """Return ranks for items whose cells are given: each cell by greedy, and swaps in time.

    Raises:
        NoRoomError: the cell has room for its items, but not on GPUs that may take them.
    """
    placement = np.zeros(len(cells), dtype=np.intp)
    members = [np.flatnonzero(cell_of_gpu == cell) for cell in range(cells.max() + 1)]
    for cell, gpus in enumerate(members):
        placement[cells == cell] = gpus[0]
    cell_of_row = cells_of_rows(rows, cell_of_gpu)
    at_least = common_seconds(rows, cell_of_row, placement)
    for cell, gpus in enumerate(members):
        items = np.flatnonzero(cells == cell)
        if items.size:
            terms = inner_terms(rows, cell_of_gpu, cell_of_row, cell, items, at_least)
            room = capacity[gpus]
            inside = [limit.within(items, gpus) for limit in limits.on_gpus]
            places = greedy(terms, room, inside)
            places = descend(terms, places, room, inside, deadline)
            placement[items] = gpus[places]
    return placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a program found: a placement, and a bound on all in seconds."""

    placement: Placement
    bound_s: float


@contextmanager
def run_program(
    terms: LayerTerms,
    capacity: npt.NDArray[np.int64],
    start: Placement,
    effort: Effort,
    limits: Sequence[Limit] = (),
) -> Iterator[Found]:
    """Run the integer program from `start`; what Ctrl-C left of it is still taken."""
    program = build_program({0: terms}, capacity, limits=limits)
    result = solve(
        program.lp,
        start=program.start_from({0: start}),
        gap=effort.gap,
        time_limit_s=effort.left_s,
        seed=effort.seed,
    )
    if result.status == "infeasible":
        raise EpplanError("HiGHS calls a program infeasible that has a known feasible start")
    placement = program.placements(result.values)[0] if result.values else start
    yield Found(placement=placement, bound_s=result.bound / MICROSECONDS)
    if result.status == "interrupted":
        raise KeyboardInterrupt
