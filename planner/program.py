"""The integer program in PuLP: which cell (GPU, or host) holds which expert of which layer.

    x[l,e,c] in {0,1}   expert e of layer l sits in cell c
    t[l,p] >= 0         duration of phase p of layer l, in microseconds

    minimise    sum over l, p of weight[p] t[l,p]
    every expert once        sum over c of x[l,e,c] = 1
    experts in a cell        sum over e of x[l,e,c] <= capacity[c]
    memory                   sum over l, e of x[l,e,c] <= slots[c]     (only where it binds)
    worst resource           t[l,p] >= sum over e, c of row[e,c] x[l,e,c]   for every row of p
    single experts           t[l,p] >= sum over c of alone[e,c] x[l,e,c]    and >= floor of p

Variables are named by numbers only: PuLP replaces characters in names, and names could collide.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pulp

from .cost import Placement
from .search import Ints
from .terms import LayerTerms, PhaseTerms

MICROSECONDS = 1e6  # keeps coefficients near 1, where HiGHS's tolerances are meant


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A PuLP problem over some layers, and its variables."""

    lp: pulp.LpProblem
    x: dict[tuple[int, int, int], pulp.LpVariable]
    terms: Mapping[int, LayerTerms]
    constant_s: float  # of the objective, outside the program

    def start_from(self, placements: Mapping[int, Placement]) -> dict[str, float]:
        """Return the values of all variables for a placement of every layer."""
        values = {
            variable.name: float(placements[layer][expert] == cell)
            for (layer, expert, cell), variable in self.x.items()
        }
        for layer, terms in self.terms.items():
            for number, phase in enumerate(terms.phases):
                seconds = max(phase.seconds(placements[layer]), phase.floor_s)
                values[_phase_name(layer, number)] = seconds * MICROSECONDS
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
    terms: Mapping[int, LayerTerms], capacity: Ints, slots: Ints | None = None
) -> Program:
    """Return the program for the layers in `terms`.

    Args:
        terms: by layer; several only when memory couples them.
        capacity: most experts of a layer in every cell, [cells].
        slots: most experts of all layers in every cell, [cells]; None where memory does not bind.
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
        for expert in experts:
            lp += _sum(x[layer, expert, cell] for cell in cells) == 1
        for cell in cells:
            lp += _sum(x[layer, expert, cell] for expert in experts) <= int(capacity[cell])
        for number, phase in enumerate(layer_terms.phases):
            time = lp.add_variable(
                _phase_name(layer, number), lowBound=phase.floor_s * MICROSECONDS
            )
            _bound_phase(lp, x, layer, phase, time)
            objective.append((time, phase.weight))
    for cell, most in enumerate([] if slots is None else slots.tolist()):
        lp += _sum(x[layer, expert, cell] for layer, expert in product(terms, experts)) <= most
    lp.setObjective(pulp.LpAffineExpression(objective))
    constant = sum(layer_terms.constant_s for layer_terms in terms.values())
    return Program(lp=lp, x=x, terms=terms, constant_s=constant)


def _phase_name(layer: int, number: int) -> str:
    return f"t_{layer}_{number}"


def _sum(variables: Iterable[pulp.LpVariable]) -> pulp.LpAffineExpression:
    return pulp.LpAffineExpression([(variable, 1.0) for variable in variables])


def _bound_phase(
    lp: pulp.LpProblem,
    x: dict[tuple[int, int, int], pulp.LpVariable],
    layer: int,
    phase: PhaseTerms,
    time: pulp.LpVariable,
) -> None:
    for row in phase.rows:
        load = [
            (x[layer, expert, cell], float(row[expert, cell] * MICROSECONDS))
            for expert, cell in np.argwhere(row > 0).tolist()
        ]
        lp += pulp.LpAffineExpression([*load, (time, -1.0)]) <= 0
    # An expert that never exceeds the floor needs no row of its own.
    for expert in np.flatnonzero(phase.alone.max(axis=1) > phase.floor_s).tolist():
        lasts = [
            (x[layer, expert, cell], float(seconds * MICROSECONDS))
            for cell, seconds in enumerate(phase.alone[expert])
        ]
        lp += pulp.LpAffineExpression([*lasts, (time, -1.0)]) <= 0
