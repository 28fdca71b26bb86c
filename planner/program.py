"""The integer program in PuLP: which GPU holds which expert of which layer.

    x[l,e,g] in {0,1}   expert e of layer l sits on GPU g
    t[l,p] >= 0         duration of phase p of layer l, in microseconds

    minimise    sum over l, p of t[l,p]
    every expert once        sum over g of x[l,e,g] = 1
    experts per GPU          sum over e of x[l,e,g] <= n
    memory                   sum over l, e of x[l,e,g] <= slots[g]     (only where it binds)
    worst resource           t[l,p] >= sum over e, g of row[e,g] x[l,e,g]   for every row of p
    single experts           t[l,p] >= floor of p

Variables are named by numbers only: PuLP replaces characters in names, and names could collide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pulp

from .cost import Placement
from .problem import Problem
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
            variable.name: float(placements[layer][expert] == gpu)
            for (layer, expert, gpu), variable in self.x.items()
        }
        for layer, terms in self.terms.items():
            for number, phase in enumerate(terms.phases):
                experts = np.arange(phase.rows.shape[1])
                load = phase.rows[:, experts, placements[layer]].sum(axis=1).max()
                values[_phase_name(layer, number)] = float(max(load, phase.floor_s) * MICROSECONDS)
        return values

    def placements(self, values: Mapping[str, float]) -> dict[int, Placement]:
        """Return the placement of every layer in a solution; values are 0 or 1 up to rounding."""
        experts = 1 + max(expert for _, expert, _ in self.x)
        found = {layer: np.full(experts, -1, dtype=np.intp) for layer in self.terms}
        for (layer, expert, gpu), variable in self.x.items():
            if values[variable.name] > 0.5:
                found[layer][expert] = gpu
        return found


def build_program(problem: Problem, terms: Mapping[int, LayerTerms]) -> Program:
    """Return the program for the layers in `terms`; several only when memory couples them."""
    lp = pulp.LpProblem("placement", pulp.LpMinimize)
    experts, gpus = range(problem.model.num_experts), range(problem.num_ranks)
    x = {
        (layer, expert, gpu): lp.add_variable(f"x_{layer}_{expert}_{gpu}", cat="Binary")
        for layer, expert, gpu in product(terms, experts, gpus)
    }
    times = []
    for layer, layer_terms in terms.items():
        _place_experts(lp, x, problem, layer)
        for number, phase in enumerate(layer_terms.phases):
            time = lp.add_variable(
                _phase_name(layer, number), lowBound=phase.floor_s * MICROSECONDS
            )
            _bound_phase(lp, x, layer, phase, time)
            times.append((time, 1.0))
    if problem.layers_coupled:
        for gpu in gpus:
            held = [(x[layer, expert, gpu], 1.0) for layer, expert in product(terms, experts)]
            lp += pulp.LpAffineExpression(held) <= int(problem.slots_of_gpu[gpu])
    lp.setObjective(pulp.LpAffineExpression(times))
    constant = sum(layer_terms.constant_s for layer_terms in terms.values())
    return Program(lp=lp, x=x, terms=terms, constant_s=constant)


def _phase_name(layer: int, number: int) -> str:
    return f"t_{layer}_{number}"


def _place_experts(
    lp: pulp.LpProblem,
    x: dict[tuple[int, int, int], pulp.LpVariable],
    problem: Problem,
    layer: int,
) -> None:
    experts, gpus = range(problem.model.num_experts), range(problem.num_ranks)
    for expert in experts:
        lp += pulp.LpAffineExpression([(x[layer, expert, gpu], 1.0) for gpu in gpus]) == 1
    for gpu in gpus:
        held = pulp.LpAffineExpression([(x[layer, expert, gpu], 1.0) for expert in experts])
        lp += held <= problem.experts_per_gpu


def _bound_phase(
    lp: pulp.LpProblem,
    x: dict[tuple[int, int, int], pulp.LpVariable],
    layer: int,
    phase: PhaseTerms,
    time: pulp.LpVariable,
) -> None:
    for row in phase.rows:
        load = [
            (x[layer, expert, gpu], float(row[expert, gpu] * MICROSECONDS))
            for expert, gpu in np.argwhere(row > 0).tolist()
        ]
        lp += pulp.LpAffineExpression([*load, (time, -1.0)]) <= 0
