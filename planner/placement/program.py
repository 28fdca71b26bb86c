"""The integer program in PuLP: which cell (GPU, or host) holds which expert of which layer.

    x[l,e,c] in {0,1}   expert e of layer l sits in cell c
    t[l,p] >= 0         duration of phase p of layer l, in microseconds
    T[l,w] >= 0         seconds of layer l on window w of the traffic

    minimise    sum over l of the mean of T[l,w] over windows, or over the K worst (CVaR):
                v[l] + sum over w of u[l,w] / K,   u[l,w] >= T[l,w] - v[l],  u >= 0
    window's time            T[l,w] >= constant + sum over its p of weight[p] t[l,p]
                             (overlapped: transfers and experts each by themselves)
    every expert once        sum over c of x[l,e,c] = 1
    experts in a cell        sum over e of x[l,e,c] <= capacity[c]
    copies kept apart        sum over e of a group, c of a domain of x[l,e,c] <= most[group,domain]
    memory                   sum over l, e of x[l,e,c] <= slots[c]     (only where it binds)
    worst resource           t[l,p] >= sum over e, c of row[e,c] x[l,e,c]   for every row of p
    single experts           t[l,p] >= sum over c of alone[e,c] x[l,e,c]    and >= floor of p

Variables are named by numbers only: PuLP replaces characters in names, and names could collide.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import pulp

from epplan.planner.cost import Placement
from epplan.planner.objective import Floats, Objective, Timed, window_seconds

from .search import Ints, Limit
from .terms import LayerTerms, PhaseTerms

_SAME = 1e-13  # of a row's largest term: a difference by rounding
MICROSECONDS = 1e6  # keeps coefficients near 1, where HiGHS's tolerances are meant


class Phases(Protocol):
    """What turns durations of phases into a layer's seconds."""

    @property
    def phases(self) -> Sequence[Timed]: ...
    @property
    def constant_s(self) -> Floats: ...
    @property
    def objective(self) -> Objective: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A PuLP problem over some layers, and its variables."""

    lp: pulp.LpProblem
    x: dict[tuple[int, int, int], pulp.LpVariable]
    terms: Mapping[int, LayerTerms]

    def start_from(self, placements: Mapping[int, Placement]) -> dict[str, float]:
        """Return the values of all variables for a placement of every layer."""
        values = {
            variable.name: float(placements[layer][expert] == cell)
            for (layer, expert, cell), variable in self.x.items()
        }
        for layer, terms in self.terms.items():
            durations = [
                max(phase.seconds(placements[layer]), phase.floor_s) for phase in terms.phases
            ]
            values |= objective_values(layer, terms, durations)
        return values

    def placements(self, values: Mapping[str, float]) -> dict[int, Placement]:
        """Return the placement of every layer in a solution; values are 0 or 1 up to rounding."""
        experts = 1 + max(expert for _, expert, _ in self.x)
        found = {layer: np.full(experts, -1, dtype=np.intp) for layer in self.terms}
        for (layer, expert, cell), variable in self.x.items():
            if values[variable.name] > 0.5:
                found[layer][expert] = cell
        return found


def build_program(
    terms: Mapping[int, LayerTerms],
    capacity: Ints,
    slots: Ints | None = None,
    limits: Sequence[Limit] = (),
) -> Program:
    """Return the program for the layers in `terms`.

    Args:
        terms: by layer; several only when memory couples them.
        capacity: most experts of a layer in every cell, [cells].
        slots: most experts of all layers in every cell, [cells]; None where memory does not bind.
        limits: on items that belong together.
    """
    lp = pulp.LpProblem("placement", pulp.LpMinimize)
    num_experts = next(iter(terms.values())).num_experts
    experts, cells = range(num_experts), range(len(capacity))
    x = {
        (layer, expert, cell): lp.add_variable(f"x_{layer}_{expert}_{cell}", cat="Binary")
        for layer, expert, cell in product(terms, experts, cells)
    }
    objective = []
    for layer, layer_terms in terms.items():
        place_once(lp, x, layer, capacity)
        for limit in limits:
            _keep_apart(lp, x, layer, limit)
        times = [
            lp.add_variable(phase_name(layer, number), lowBound=phase.floor_s * MICROSECONDS)
            for number, phase in enumerate(layer_terms.phases)
        ]
        for phase, time in zip(layer_terms.phases, times, strict=True):
            bound_phase(lp, x, layer, phase, time)
        objective += add_objective(lp, layer, layer_terms, times)
    for cell, most in enumerate([] if slots is None else slots.tolist()):
        lp += _sum(x[layer, expert, cell] for layer, expert in product(terms, experts)) <= most
    lp.setObjective(pulp.LpAffineExpression(objective))
    return Program(lp=lp, x=x, terms=terms)


def place_once(
    lp: pulp.LpProblem, x: dict[tuple[int, int, int], pulp.LpVariable], layer: int, capacity: Ints
) -> None:
    """Add that every expert of a layer is placed once, within capacity [cells]."""
    experts = range(1 + max(expert for of, expert, _ in x if of == layer))
    for expert in experts:
        lp += _sum(x[layer, expert, cell] for cell in range(len(capacity))) == 1
    for cell, most in enumerate(capacity.tolist()):
        lp += _sum(x[layer, expert, cell] for expert in experts) <= int(most)


def add_objective(
    lp: pulp.LpProblem, layer: int, terms: Phases, times: Sequence[pulp.LpVariable]
) -> list[tuple[pulp.LpVariable, float]]:
    """Add the variables that turn phases `times` into the layer's seconds; return the objective."""
    totals = []
    phases: Sequence[Timed] = terms.phases
    for window, constant_s in enumerate(terms.constant_s.tolist()):
        total = lp.add_variable(f"T_{layer}_{window}", lowBound=0)
        totals.append(total)
        own = [
            (phase, time)
            for phase, time in zip(phases, times, strict=True)
            if phase.window == window
        ]
        transfer = [(time, phase.weight) for phase, time in own if not phase.is_compute]
        compute = [(time, phase.weight) for phase, time in own if phase.is_compute]
        constant = constant_s * MICROSECONDS
        if terms.objective.overlap:
            lp += pulp.LpAffineExpression([*compute, (total, -1.0)]) <= 0
            compute = []
        lp += pulp.LpAffineExpression([*transfer, *compute, (total, -1.0)]) <= -constant
    worst = terms.objective.num_worst(len(totals))
    if worst == len(totals):
        return [(total, 1.0 / worst) for total in totals]
    least = lp.add_variable(f"v_{layer}", lowBound=0)
    above = []
    for window, total in enumerate(totals):
        above.append(lp.add_variable(f"u_{layer}_{window}", lowBound=0))
        lp += pulp.LpAffineExpression([(total, 1.0), (least, -1.0), (above[-1], -1.0)]) <= 0
    return [(least, 1.0), *((variable, 1.0 / worst) for variable in above)]


def sparse_row(row: Floats) -> tuple[float, list[tuple[int, int, float]]]:
    """Return a row [experts, cells] as a constant, and what some (expert, cell) add to it, in us.

    An expert is in one cell (or its shares add up to 1), and most cells load a row alike: what it
    adds in most of them is a constant. Dense rows of some thousand terms are what HiGHS's presolve
    (`strengthenInequalities`, quadratic in a row's terms) was seen to spend minutes on, in the
    program or in a heuristic's, without a look at the time limit.
    """
    usual = np.sort(row, axis=1)[:, row.shape[1] // 2]
    more = (row - usual[:, None]) * MICROSECONDS
    places = np.argwhere(np.abs(row - usual[:, None]) > _SAME * np.abs(row).max(initial=0.0))
    entries = [(expert, cell, float(more[expert, cell])) for expert, cell in places.tolist()]
    return float(usual.sum() * MICROSECONDS), entries


def objective_values(layer: int, terms: Phases, durations: Sequence[float]) -> dict[str, float]:
    """Return the values of a layer's times for durations of its phases, in seconds."""
    values = {
        phase_name(layer, number): seconds * MICROSECONDS
        for number, seconds in enumerate(durations)
    }
    totals = window_seconds(terms.objective, terms.constant_s, terms.phases, durations)
    totals = totals * MICROSECONDS
    values |= {f"T_{layer}_{window}": total for window, total in enumerate(totals.tolist())}
    worst = terms.objective.num_worst(len(totals))
    if worst < len(totals):
        least = float(np.sort(totals)[-worst])
        values[f"v_{layer}"] = least
        values |= {f"u_{layer}_{w}": max(0.0, t - least) for w, t in enumerate(totals.tolist())}
    return values


def _keep_apart(
    lp: pulp.LpProblem, x: dict[tuple[int, int, int], pulp.LpVariable], layer: int, limit: Limit
) -> None:
    size = np.bincount(limit.group, minlength=len(limit.most))
    for group, domain in np.argwhere(size[:, None] > limit.most).tolist():
        items, cells = np.flatnonzero(limit.group == group), np.flatnonzero(limit.domain == domain)
        inside = _sum(x[layer, e, c] for e, c in product(items.tolist(), cells.tolist()))
        lp += inside <= int(limit.most[group, domain])


def phase_name(layer: int, number: int) -> str:
    """Return the name of a phase's duration."""
    return f"t_{layer}_{number}"


def _sum(variables: Iterable[pulp.LpVariable]) -> pulp.LpAffineExpression:
    return pulp.LpAffineExpression([(variable, 1.0) for variable in variables])


def bound_phase(
    lp: pulp.LpProblem,
    x: dict[tuple[int, int, int], pulp.LpVariable],
    layer: int,
    phase: PhaseTerms,
    time: pulp.LpVariable,
) -> None:
    """Add that a phase lasts at least as long as its rows and its single experts."""
    for row in phase.rows:
        constant, entries = sparse_row(row)
        load = [(x[layer, expert, cell], more) for expert, cell, more in entries]
        lp += pulp.LpAffineExpression([*load, (time, -1.0)]) <= -constant
    # An expert that never exceeds the floor needs no row of its own.
    for expert in np.flatnonzero(phase.alone.max(axis=1) > phase.floor_s).tolist():
        lasts = [
            (x[layer, expert, cell], float(seconds * MICROSECONDS))
            for cell, seconds in enumerate(phase.alone[expert])
        ]
        lp += pulp.LpAffineExpression([*lasts, (time, -1.0)]) <= 0
