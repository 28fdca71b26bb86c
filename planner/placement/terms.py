"""A layer's cost in dense linear form, on which search and integer program work.

    phase = max over rows of  sum over experts e of  row[e, cell of e]   and >= alone[e, cell of e]

A cell is where an expert can be put: a GPU, or several (a host, or the GPUs that share a NIC). The
form on larger cells is a relaxation of the one on GPUs (what an expert adds to a row anywhere in
the cell is at least its minimum there), so a bound on it is a bound on the real problem. The
evaluator in `cost` does not use these forms; the two are compared after every solve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Placement
from epplan.planner.objective import Objective, layer_seconds

from .rows import Floats, Ints, LayerRows, PhaseRows


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTerms:
    """One maximum of the objective.

    Attributes:
        name: the phase.
        window: of the traffic.
        weight: how often it counts.
        is_compute: whether it is the experts' and not a transfer's.
        rows: seconds that expert e adds to a row in cell c, [rows, experts, cells].
        alone: the phase lasts at least this long with expert e in cell c, [experts, cells].
    """

    name: str
    window: int
    weight: float
    is_compute: bool
    rows: Floats
    alone: Floats

    @property
    def floor_s(self) -> float:
        """No placement makes it shorter: the expert that costs most where it costs least."""
        return float(self.alone.min(axis=1).max())

    def seconds(self, placement: Placement) -> float:
        """Return the phase's duration for cells of experts, [experts]."""
        experts = np.arange(len(placement))
        load = self.rows[:, experts, placement].sum(axis=1).max(initial=0.0)
        return max(float(load), float(self.alone[experts, placement].max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """Objective of one layer: its phases, and constant transfer seconds [windows]."""

    phases: tuple[PhaseTerms, ...]
    constant_s: Floats
    objective: Objective

    @property
    def num_experts(self) -> int:
        """Experts to place."""
        return len(self.phases[0].alone)

    @property
    def floor_s(self) -> float:
        """A lower bound on any placement, from single experts."""
        return float(self.total([phase.floor_s for phase in self.phases]))

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        return float(self.total([phase.seconds(placement) for phase in self.phases]))

    def total(self, durations: Sequence[npt.ArrayLike]) -> Floats:
        """Return the layer's seconds from its phases', each for one or many candidates."""
        return layer_seconds(self.objective, self.constant_s, self.phases, durations)


def gpu_terms(layer: LayerRows) -> LayerTerms:
    """Return the exact form: cells are GPUs."""
    phases = []
    for phase in layer.phases:
        rows = np.repeat(phase.base[:, :, None], phase.alone.shape[1], axis=2)
        rows[phase.pair_row, :, phase.pair_gpu] += phase.extra
        phases.append(_phase(phase, rows, phase.alone))
    return _terms(layer, phases)


def cell_terms(layer: LayerRows, cell_of_gpu: Ints) -> LayerTerms:
    """Return the relaxed form, with the cells of `cell_of_gpu` [gpus].

    Rows that only GPUs of one cell load (their own ports) are averaged over the cell by capacity:
    the worst of them is at least their mean.
    """
    num_cells = int(cell_of_gpu.max()) + 1
    phases = []
    for phase in layer.phases:
        local, host = _local_rows(phase, cell_of_gpu)
        rows = np.concatenate(
            [
                _least_in_cell(phase, np.flatnonzero(~local), cell_of_gpu, num_cells),
                _averaged(phase, local, host, cell_of_gpu, num_cells),
            ]
        )
        alone = np.full((phase.alone.shape[0], num_cells), np.inf)
        np.minimum.at(alone.T, cell_of_gpu, phase.alone.T)
        phases.append(_phase(phase, rows, alone))
    return _terms(layer, phases)


def cells_of_rows(layer: LayerRows, cell_of_gpu: Ints) -> list[Ints]:
    """Return the cell of every row that depends on where in one an expert sits, else -1.

    [phases] of [rows].
    """
    return [_local_rows(phase, cell_of_gpu)[1] for phase in layer.phases]


def inner_terms(
    layer: LayerRows,
    cell_of_gpu: Ints,
    cell_of_row: list[Ints],
    cell: int,
    experts: Ints,
    at_least: list[float],
) -> LayerTerms:
    """Return the form inside one cell, for its experts: its GPUs, in order, are the cells here.

    Args:
        layer: the layer's rows.
        cell_of_gpu: cell numbers, [gpus].
        cell_of_row: `cells_of_rows`.
        cell: the cell.
        experts: experts in it.
        at_least: duration of every phase by rows of no single cell: nothing shorter counts.
    """
    gpus = np.flatnonzero(cell_of_gpu == cell)
    place_of_gpu = np.full(len(cell_of_gpu), -1)
    place_of_gpu[gpus] = np.arange(len(gpus))
    phases = []
    for phase, owner, floor in zip(layer.phases, cell_of_row, at_least, strict=True):
        pairs = np.flatnonzero(owner[phase.pair_row] == cell)
        used, row = np.unique(phase.pair_row[pairs], return_inverse=True)
        rows = np.zeros((len(used), len(experts), len(gpus)))
        rows[row, :, place_of_gpu[phase.pair_gpu[pairs]]] = phase.extra[np.ix_(pairs, experts)]
        alone = np.maximum(phase.alone[np.ix_(experts, gpus)], floor)
        phases.append(_phase(phase, rows, alone))
    return _terms(layer, phases)


def common_seconds(layer: LayerRows, cell_of_row: list[Ints], placement: Placement) -> list[float]:
    """Return every phase's duration by the rows that no single cell owns, for ranks of experts."""
    return [
        float(phase.load(placement)[owner < 0].max(initial=0.0))
        for phase, owner in zip(layer.phases, cell_of_row, strict=True)
    ]


def _local_rows(phase: PhaseRows, cell_of_gpu: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Tell which rows depend on where in one cell an expert sits, and that cell (else -1), [rows].

    A row that all GPUs of a cell load alike is none of them: knowing the cell is enough for it.
    """
    num_rows = len(phase.base)
    cell = cell_of_gpu[phase.pair_gpu]
    first, last = np.full(num_rows, len(cell_of_gpu)), np.full(num_rows, -1)
    np.minimum.at(first, phase.pair_row, cell)
    np.maximum.at(last, phase.pair_row, cell)
    least, most = np.full_like(phase.base, np.inf), np.full_like(phase.base, -np.inf)
    np.minimum.at(least, phase.pair_row, phase.extra)
    np.maximum.at(most, phase.pair_row, phase.extra)
    whole = np.bincount(cell_of_gpu)[np.where(last < 0, 0, last)]
    alike = (least == most).all(axis=1) & (np.bincount(phase.pair_row, minlength=num_rows) == whole)
    local = (first == last) & ~alike & ~phase.base.any(axis=1)
    return local, np.where(local, first, -1)


def _least_in_cell(phase: PhaseRows, rows: Ints, cell_of_gpu: Ints, num_cells: int) -> Floats:
    """Return the least that an expert adds to each row anywhere in a cell, [rows, e, cells]."""
    place = np.full(len(phase.base), -1)
    place[rows] = np.arange(len(rows))
    chosen = np.flatnonzero(place[phase.pair_row] >= 0)
    row, cell = place[phase.pair_row[chosen]], cell_of_gpu[phase.pair_gpu[chosen]]
    # A GPU without a pair adds nothing on top of the base, so the least of a cell that has one is
    # at most the base.
    least = np.full((len(rows), num_cells, phase.base.shape[1]), np.inf)
    np.minimum.at(least, (row, cell), phase.extra[chosen])
    count = np.zeros((len(rows), num_cells))
    np.add.at(count, (row, cell), 1)
    partial = count < np.bincount(cell_of_gpu, minlength=num_cells)
    least[partial] = np.minimum(least[partial], 0.0)
    total: Floats = phase.base[rows][:, :, None] + least.transpose(0, 2, 1)
    return total


def _averaged(
    phase: PhaseRows,
    local: npt.NDArray[np.bool_],
    cell_of_row: Ints,
    cell_of_gpu: Ints,
    num_cells: int,
) -> Floats:
    """Return rows of one kind in one cell as their mean, weighed by capacity, [means, e, cells]."""
    kinds: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    gpus_of_row = np.bincount(phase.pair_row, minlength=len(local))
    for row in np.flatnonzero(local).tolist():
        # Rows of one kind have as many GPUs and the same order of capacity.
        kind = (int(gpus_of_row[row]), round(np.log2(phase.capacity[row])))
        kinds.setdefault((int(cell_of_row[row]), kind), []).append(row)
    means = np.zeros((len(kinds), phase.base.shape[1], num_cells))
    for number, ((cell, _), rows) in enumerate(kinds.items()):
        weight = phase.capacity[rows] / phase.capacity[rows].sum()
        gpus = np.flatnonzero(cell_of_gpu == cell)
        total = np.zeros((len(cell_of_gpu), phase.base.shape[1]))
        for row, share in zip(rows, weight, strict=True):
            pairs = np.flatnonzero(phase.pair_row == row)
            total[phase.pair_gpu[pairs]] += share * phase.extra[pairs]
        means[number, :, cell] = total[gpus].min(axis=0)
    return means


def _terms(layer: LayerRows, phases: list[PhaseTerms]) -> LayerTerms:
    return LayerTerms(phases=tuple(phases), constant_s=layer.constant_s, objective=layer.objective)


def _phase(phase: PhaseRows, rows: Floats, alone: Floats) -> PhaseTerms:
    return PhaseTerms(
        name=phase.name,
        window=phase.window,
        weight=phase.weight,
        is_compute=phase.is_compute,
        rows=_undominated(rows),
        alone=alone,
    )


def _undominated(rows: Floats) -> Floats:
    """Drop rows of zeros, and rows that are a smaller multiple of another."""
    flat = rows.reshape(len(rows), rows.shape[1] * rows.shape[2])
    scale = flat.max(axis=1, initial=0.0)
    kept: dict[bytes, int] = {}
    for row in np.argsort(-scale, kind="stable").tolist():
        if scale[row] > 0:
            kept.setdefault(np.round(flat[row] / scale[row], 9).tobytes(), row)
    return rows[sorted(kept.values())]
