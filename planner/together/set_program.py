"""The integer program over cells where it matters which experts are chosen together.

Cells are GPUs, or islands of GPUs. Beside the variables of `program`,

    z[L,u,p] >= x of every expert of token set u in place p of level L      in [0, 1]
    T[L,s,p] >= sum over sets u of tokens[s,u] z[L,u,p]                     tokens of s that reach p
    t >= sum over levels, places and sources of row[L,p,s] T[L,s,p]         for every row

With cells that are GPUs this is the problem itself. With islands it is a relaxation, so its bound
is proven for the problem: a place of the level of GPUs becomes the island, T counts the ranks that
a source's tokens reach in it, and

    ranks of an island reached >= tokens that reach the island
                               >= assignments to it / most experts on one of its GPUs

and rows are those of `set_cells`. Only the sets of most tokens have variables of their own where
there are too many. For the others T has their choices / the most that one token can have in the
place: again no more than is true. Valid and strong: all T of a level add up to the least reach of
`pair_bound`.
"""

from itertools import product

import numpy as np
import pulp

from epplan.planner.cost import Placement
from epplan.planner.objective import Timed
from epplan.planner.placement.highs import solve
from epplan.planner.placement.levels import Effort
from epplan.planner.placement.program import (
    MICROSECONDS,
    add_objective,
    bound_phase,
    objective_values,
    phase_name,
    place_once,
)
from epplan.planner.placement.rows import Floats, Ints
from epplan.planner.placement.terms import PhaseTerms
from epplan.planner.token_sets import TokenSets

from .pair_bound import Reach, coactivation, most_pairs
from .set_cells import KeptSets, Level, terms_over_cells
from .set_rows import SetLayer, TransferRows

_MOST_Z = 6_000  # variables of token sets: beyond, HiGHS proves nothing in minutes
_LEAST_KEPT = 0.9  # share of the tokens that such variables must cover: less proves nothing more
_MOST_X = 4_096
_MOST_T = 8_000
_MOST_ENTRIES = 2**22  # of a matrix while cells are made of GPUs

X = dict[tuple[int, int, int], pulp.LpVariable]


def run_set_program(
    layer: SetLayer, cell_of_gpu: Ints, capacity: Ints, start: Placement, effort: Effort
) -> tuple[Placement, float] | None:
    """Return cells of experts and a bound in seconds, or None where the program is too large.

    Args:
        layer: the layer.
        cell_of_gpu: GPUs or islands as cells, [gpus].
        capacity: most experts on every GPU, [gpus].
        start: GPUs of experts to start from.
        effort: when to stop.
    """
    program = _SetProgram.of(layer, cell_of_gpu, capacity)
    return None if program is None else program.run(start, effort)


class _SetProgram:
    def __init__(
        self, layer: SetLayer, cell_of_gpu: Ints, capacity: Ints, levels: tuple[Level, ...]
    ) -> None:
        self.layer, self.cell_of_gpu, self.levels = layer, cell_of_gpu, levels
        self.capacity = np.bincount(cell_of_gpu, weights=capacity).astype(np.int64)
        self.terms = terms_over_cells(layer, cell_of_gpu)
        self.sets = [KeptSets.of(sets, self._most_sets()) for sets in layer.sets]
        self.lp = pulp.LpProblem("sets", pulp.LpMinimize)
        experts, cells = range(layer.num_experts), range(len(self.capacity))
        self.x: X = {
            (0, e, c): self.lp.add_variable(f"x_0_{e}_{c}", cat="Binary")
            for e, c in product(experts, cells)
        }
        place_once(self.lp, self.x, 0, self.capacity)
        self.unit = max(sets.num_tokens / sets.num_sources for sets in layer.sets)
        self.z: dict[tuple[int, int, int, int], pulp.LpVariable] = {}
        self.t = {
            (window, number, source, place): self.lp.add_variable(
                f"r_{window}_{number}_{source}_{place}", lowBound=0
            )
            for window, sets in enumerate(layer.sets)
            for number, level in enumerate(levels)
            for source, place in product(range(sets.num_sources), range(level.num_places))
        }
        for window, number in product(range(len(layer.sets)), range(len(levels))):
            self._reach(window, number)
        self._objective()

    @classmethod
    def of(cls, layer: SetLayer, cell_of_gpu: Ints, capacity: Ints) -> "_SetProgram | None":
        cells = np.arange(int(cell_of_gpu.max()) + 1)
        exact = len(cells) == len(cell_of_gpu)
        islands = layer.place_of_gpu[1:]  # of node-dedup
        first_gpu = np.array([np.flatnonzero(cell_of_gpu == cell)[0] for cell in cells])
        levels = (
            Level(place_of_cell=cells, per_rank=None if exact else int(capacity.max())),
            *(Level(place_of_cell=island[first_gpu]) for island in islands),
        )
        sources = sum(sets.num_sources for sets in layer.sets)
        places = sum(level.num_places for level in levels)
        entries = max(m.shape[0] * m.shape[1] for t in layer.transfers for m in t.matrices)
        if (
            layer.num_experts * len(cells) > _MOST_X
            or sources * places > _MOST_T
            or entries > _MOST_ENTRIES
            or _share_kept(layer, _most_sets(layer, levels)) < _LEAST_KEPT
        ):
            return None
        return cls(layer, cell_of_gpu, capacity, levels)

    def _most_sets(self) -> int:
        return _most_sets(self.layer, self.levels)

    def _inside(self, level: Level, expert: int, place: int) -> list[pulp.LpVariable]:
        cells = np.flatnonzero(level.place_of_cell == place).tolist()
        return [self.x[0, expert, cell] for cell in cells]

    def _of_set(self, window: int, number: int, one: int, place: int) -> pulp.LpVariable:
        """Return z of a token set and place; levels with the same places share them."""
        level = self.levels[number]
        shared = next(
            i
            for i, other in enumerate(self.levels)
            if np.array_equal(other.place_of_cell, level.place_of_cell)
        )
        key = window, shared, one, place
        if key not in self.z:
            z = self.lp.add_variable(f"z_{window}_{shared}_{one}_{place}", lowBound=0, upBound=1)
            self.z[key] = z
            for expert in self.sets[window].experts[one].tolist():
                if expert >= 0:
                    inside = [(x, 1.0) for x in self._inside(level, expert, place)]
                    self.lp += pulp.LpAffineExpression([*inside, (z, -1.0)]) <= 0
        return self.z[key]

    def _reach(self, window: int, number: int) -> None:
        level, sets, layer = self.levels[number], self.sets[window], self.layer
        room = np.bincount(level.place_of_cell, weights=self.capacity)
        total = []
        for source, place in product(range(sets.num_sources), range(level.num_places)):
            t = self.t[window, number, source, place]
            total.append((t, 1.0))
            own = np.flatnonzero(sets.tokens[source])
            reached = [
                (self._of_set(window, number, one, place), sets.tokens[source, one] / self.unit)
                for one in own.tolist()
            ]
            most = min(sets.experts.shape[1], int(room[place])) or 1
            reached += self._linear(level, place, sets.rest[source] / most)
            self.lp += pulp.LpAffineExpression([*reached, (t, -1.0)]) <= 0
            if level.per_rank is not None:
                ranks = self._linear(level, place, layer.counts[window, source] / level.per_rank)
                self.lp += pulp.LpAffineExpression([*ranks, (t, -1.0)]) <= 0
        least = least_reach(layer.sets[window], layer.num_experts, room.astype(np.int64))
        self.lp += pulp.LpAffineExpression(total) >= least / self.unit

    def _linear(
        self, level: Level, place: int, of_expert: Floats
    ) -> list[tuple[pulp.LpVariable, float]]:
        return [
            (x, float(of_expert[expert] / self.unit))
            for expert in np.flatnonzero(of_expert).tolist()
            for x in self._inside(level, expert, place)
        ]

    def _objective(self) -> None:
        phases = self.terms.phases
        times = [
            self.lp.add_variable(phase_name(0, number), lowBound=_floor(phase) * MICROSECONDS)
            for number, phase in enumerate(phases)
        ]
        for phase, time, matrices in zip(phases, times, self._matrices(), strict=True):
            if isinstance(phase, PhaseTerms):
                bound_phase(self.lp, self.x, 0, phase, time)
                continue
            assert isinstance(phase, TransferRows)
            bound_phase(self.lp, self.x, 0, self._alone(phase), time)
            for row in range(len(matrices[0])):
                load = [
                    (
                        self.t[phase.window, number, source, place],
                        float(matrix[row, place, source] * self.unit * MICROSECONDS),
                    )
                    for number, matrix in enumerate(matrices)
                    for place, source in np.argwhere(matrix[row] > 0).tolist()
                ]
                self.lp += pulp.LpAffineExpression([*load, (time, -1.0)]) <= 0
        objective = add_objective(self.lp, 0, self.terms, times)
        self.lp.setObjective(pulp.LpAffineExpression(objective))

    def _alone(self, transfer: TransferRows) -> PhaseTerms:
        """Return what single experts cause in cells, as a phase without rows."""
        alone = np.full((self.layer.num_experts, len(self.capacity)), np.inf)
        np.minimum.at(alone.T, self.cell_of_gpu, transfer.alone.T)
        return PhaseTerms(
            name=transfer.name,
            window=transfer.window,
            weight=transfer.weight,
            is_compute=False,
            rows=np.zeros((0, *alone.shape)),
            alone=alone,
        )

    def _matrices(self) -> list[tuple[Floats, ...]]:
        others = len(self.terms.phases) - len(self.terms.matrices)
        return [*self.terms.matrices, *[()] * others]

    def run(self, start: Placement, effort: Effort) -> tuple[Placement, float]:
        """Return cells of experts and a bound in seconds."""
        cells = self.cell_of_gpu[start]
        result = solve(
            self.lp,
            start=self._values(cells),
            gap=effort.gap,
            time_limit_s=effort.left_s,
            seed=effort.seed,
        )
        if result.status == "interrupted":
            raise KeyboardInterrupt  # what search has found was reported
        if result.values:
            chosen = np.zeros((len(start), len(self.capacity)))
            for (_, expert, cell), x in self.x.items():
                chosen[expert, cell] = result.values[x.name]
            cells = chosen.argmax(axis=1)
        return cells, result.bound / MICROSECONDS

    def _values(self, cells: Placement) -> dict[str, float]:
        """Return the values of all variables for cells of experts, [experts]."""
        values = {x.name: float(cells[expert] == cell) for (_, expert, cell), x in self.x.items()}
        reached: dict[tuple[int, int], Floats] = {}
        for window, number in product(range(len(self.sets)), range(len(self.levels))):
            reached[window, number] = self._reached(window, self.levels[number], cells)
        for (window, number, source, place), t in self.t.items():
            values[t.name] = float(reached[window, number][source, place] / self.unit)
        for (window, number, one, place), z in self.z.items():
            experts = self.sets[window].experts[one]
            where = self.levels[number].place_of_cell[cells[experts[experts >= 0]]]
            values[z.name] = float(place in where.tolist())
        durations = []
        for phase, matrices in zip(self.terms.phases, self._matrices(), strict=True):
            if isinstance(phase, PhaseTerms):
                seconds = phase.seconds(cells)
            else:
                assert isinstance(phase, TransferRows)
                parts = [
                    np.tensordot(matrix, reached[phase.window, number].T, axes=2)
                    for number, matrix in enumerate(matrices)
                ]
                worst = np.stack(parts).sum(axis=0).max(initial=0.0)
                seconds = max(float(worst), self._alone(phase).seconds(cells))
            durations.append(max(seconds, _floor(phase)))
        return values | objective_values(0, self.terms, durations)

    def _reached(self, window: int, level: Level, cells: Placement) -> Floats:
        """Return the tokens that reach places, as the program counts them, [sources, places]."""
        place = level.place_of_cell[cells]
        tokens = self.layer.sets[window].reached(place, level.num_places)
        if level.per_rank is None:
            return tokens
        choices = self.layer.counts[window] @ np.eye(level.num_places)[place]
        copies: Floats = np.maximum(tokens, choices / level.per_rank)
        return copies


def least_reach(sets: TokenSets, num_experts: int, room: Ints) -> float:
    """Return the fewest places that all tokens reach together; room [places]."""
    reach = Reach(
        tokens=sets.num_tokens,
        assignments=float(sets.weight @ (sets.experts >= 0).sum(axis=1)),
        pairs=most_pairs(coactivation(sets, num_experts), room),
    )
    return max(reach.least(sets.experts.shape[1]), sets.num_tokens) * (1 - 1e-9)


def _most_sets(layer: SetLayer, levels: tuple[Level, ...]) -> int:
    different = {level.place_of_cell.tobytes(): level.num_places for level in levels}
    return _MOST_Z // (sum(different.values()) * len(layer.sets))


def _share_kept(layer: SetLayer, most: int) -> float:
    """Return the share of the tokens whose sets are among those of most tokens, least window."""
    kept = [KeptSets.of(sets, most).tokens.sum() / sets.num_tokens for sets in layer.sets]
    return float(min(kept))


def _floor(phase: Timed) -> float:
    assert isinstance(phase, PhaseTerms | TransferRows)
    return phase.floor_s
