"""Linear programs over shares: what any shares could reach, and the best ones of given copies.

y[e,c] >= 0   share of expert e's rows in cell c (a GPU, or a host)
t[p] >= 0     duration of phase p

minimise      the layer's seconds, as in `program`
all rows      sum over c of y[e,c] = 1
room          sum over e of y[e,c] <= copies that fit in c
resources     t[p] >= sum over e, c of row[e,c] y[e,c]   for every row of p
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pulp
from scipy.sparse import csr_array, eye_array, kron, vstack

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.highs import Block, solve_linear, solve_with_block
from epplan.planner.placement.program import MICROSECONDS, add_objective, sparse_row
from epplan.planner.placement.rows import Ints, LayerRows, PhaseRows
from epplan.planner.placement.terms import LayerTerms, PhaseTerms

_CONCENTRATE_S = 10.0  # a linear program of the size of one that was just solved
LEAST_SHARE = 1e-3  # of an expert's rows on each of its copies: a copy that gets none is no copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """Shares of experts in cells, with no limit on copies.

    Attributes:
        bound_s: no copies with any shares can be faster.
        shares: that are as fast, in this relaxed form, [experts, cells].
        durations: of the phases with these, in seconds.
    """

    bound_s: float
    shares: Shares
    durations: list[float]


class Relaxation:
    """The linear program over cells: any share of any expert anywhere.

    Args:
        terms: over cells.
        floors: what every phase lasts at least, for other reasons.
        room: copies that fit in every cell, [cells].
    """

    def __init__(self, terms: LayerTerms, floors: Sequence[float], room: Ints) -> None:
        self._terms, self._floors, self._room = terms, floors, room

    def solve(self, time_limit_s: float) -> Relaxed | None:
        """Return the optimum; None if the time is over."""
        lp, times = self._durations([None] * len(self._floors))
        lp.setObjective(pulp.LpAffineExpression(add_objective(lp, 0, self._terms, times)))
        nothing = np.zeros((self._terms.num_experts, len(self._room)))
        return self._solve(lp, times, nothing, time_limit_s)

    def concentrate(
        self, relaxed: Relaxed, pull: Floats, slack: float, time_limit_s: float
    ) -> Relaxed | None:
        """Return shares with less of `pull` [experts, cells], while phases last 1 + slack as long.

        Slack leaves few rows at their limit, and as many experts are in several cells at most.
        """
        lp, times = self._durations([seconds * (1 + slack) for seconds in relaxed.durations])
        lp.setObjective(pulp.LpAffineExpression([(time, 0.0) for time in times]))
        return self._solve(lp, times, pull, min(_CONCENTRATE_S, time_limit_s))

    def _durations(
        self, limits: Sequence[float | None]
    ) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
        """Return a program with the durations of the phases, and no objective."""
        lp = pulp.LpProblem("shares", pulp.LpMinimize)
        times = []
        for number, (floor, limit) in enumerate(zip(self._floors, limits, strict=True)):
            most_s = None if limit is None else limit * MICROSECONDS
            low_s = floor * MICROSECONDS
            times.append(lp.add_variable(f"t_{number}", lowBound=low_s, upBound=most_s))
        return lp, times

    def _solve(
        self,
        lp: pulp.LpProblem,
        times: list[pulp.LpVariable],
        cost: Floats,
        time_limit_s: float,
    ) -> Relaxed | None:
        """Return the minimum, with `cost` of shares [experts, cells]."""
        block = self._block(times, cost)
        least, values, shares = solve_with_block(lp, block, time_limit_s=time_limit_s)
        if not values:
            return None
        return Relaxed(
            bound_s=least / MICROSECONDS,
            shares=np.maximum(shares.reshape(cost.shape), 0.0),
            durations=[values[time.name] / MICROSECONDS for time in times],
        )

    def _block(self, times: list[pulp.LpVariable], cost: Floats) -> Block:
        """Return the shares, and the rows that hold them: of experts, of cells, of phases."""
        experts, cells = cost.shape
        once = kron(eye_array(experts), np.ones((1, cells)))
        inside = kron(np.ones((1, experts)), eye_array(cells))
        loads = [_loads(phase) for phase in self._terms.phases]
        rest = [-constant for constant, _ in loads]
        upper = np.concatenate([np.ones(experts), self._room, *rest])
        lower = np.where(np.arange(len(upper)) < experts, 1.0, -np.inf)
        sizes = [experts + cells, *(len(constant) for constant in rest)]
        phase_of_row = np.repeat(np.arange(len(sizes)) - 1, sizes)
        return Block(
            cost=cost.ravel(),
            matrix=vstack([once, inside, *(matrix for _, matrix in loads)], format="csr"),
            program=[(time, -1.0 * (phase_of_row == number)) for number, time in enumerate(times)],
            lower=lower,
            upper=upper,
        )


def _loads(phase: PhaseTerms) -> tuple[Floats, csr_array]:
    """Return what loads a phase's rows, in us: a constant [rows], and shares [rows, e x cells]."""
    experts, cells = phase.alone.shape
    if not len(phase.rows):  # a latency: a share of a path is a lower bound on using it
        alone = kron(eye_array(experts), np.ones((1, cells))) * phase.alone.ravel() * MICROSECONDS
        return np.zeros(experts), csr_array(alone)
    constants, matrices = [], []
    for row in phase.rows:
        constant, entries = sparse_row(row)
        expert, cell, more = np.array(entries).reshape(-1, 3).T
        place = (expert * cells + cell).astype(np.intp)
        constants.append(constant)
        matrices.append(csr_array((more, (np.zeros_like(place), place)), (1, experts * cells)))
    return np.array(constants), vstack(matrices, format="csr")


def best_shares(rows: LayerRows, shares: Shares, time_limit_s: float) -> Shares:
    """Return the best shares for the copies that `shares` [experts, gpus] has."""
    copies = shares > 0
    split = np.flatnonzero(copies.sum(axis=1) > 1)
    lp = pulp.LpProblem("shares", pulp.LpMinimize)
    y = {
        (expert, gpu): lp.add_variable(f"y_{expert}_{gpu}", lowBound=LEAST_SHARE)
        for expert in split.tolist()
        for gpu in np.flatnonzero(copies[expert]).tolist()
    }
    for expert in split.tolist():
        own = [(y[expert, gpu], 1.0) for gpu in np.flatnonzero(copies[expert]).tolist()]
        lp += pulp.LpAffineExpression(own) == 1
    fixed = np.where(np.isin(np.arange(len(shares)), split)[:, None], 0.0, shares)
    times = [
        _add_phase(lp, f"t_{number}", phase, y, fixed, copies)
        for number, phase in enumerate(rows.phases)
    ]
    lp.setObjective(pulp.LpAffineExpression(add_objective(lp, 0, rows, times)))
    _, values = solve_linear(lp, time_limit_s=time_limit_s)
    if not values:
        return shares
    found = fixed.copy()
    for (expert, gpu), variable in y.items():
        found[expert, gpu] = max(values[variable.name], LEAST_SHARE)
    found /= found.sum(axis=1, keepdims=True)
    return found


def _add_phase(
    lp: pulp.LpProblem,
    name: str,
    phase: PhaseRows,
    y: dict[tuple[int, int], pulp.LpVariable],
    fixed: Shares,
    copies: npt.NDArray[np.bool_],
) -> pulp.LpVariable:
    """Add a phase's time, bounded by the rows that the shares change; the others are constants."""
    if not len(phase.base):
        return lp.add_variable(name, lowBound=float(phase.alone[copies].max()) * MICROSECONDS)
    whole = phase.per_copy[phase.pair_row][:, None]
    at = np.where(whole, copies.T[phase.pair_gpu], fixed.T[phase.pair_gpu])
    constant = phase.base.sum(axis=1)
    np.add.at(constant, phase.pair_row, (phase.extra * at).sum(axis=1))
    pairs_of_gpu: dict[int, Ints] = {}
    loads: dict[int, list[tuple[pulp.LpVariable, float]]] = {}
    for (expert, gpu), variable in y.items():
        if gpu not in pairs_of_gpu:
            of_traffic = ~phase.per_copy[phase.pair_row]
            pairs_of_gpu[gpu] = np.flatnonzero((phase.pair_gpu == gpu) & of_traffic)
        for pair in pairs_of_gpu[gpu].tolist():
            seconds = float(phase.extra[pair, expert])
            if seconds:
                load = loads.setdefault(int(phase.pair_row[pair]), [])
                load.append((variable, seconds * MICROSECONDS))
    settled = np.isin(np.arange(len(constant)), list(loads), invert=True)
    floor = constant[settled].max(initial=0.0)
    time = lp.add_variable(name, lowBound=float(floor) * MICROSECONDS)
    for row, load in loads.items():
        rest = float(constant[row]) * MICROSECONDS
        lp += pulp.LpAffineExpression([*load, (time, -1.0)]) <= -rest
    return time
