"""From a problem to a placement with its certificate.

Layers are independent unless memory couples them: every layer is searched, and solved as an integer
program only where the search does not meet the bound already. The result is priced again by the
evaluator, which knows nothing of the program.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.errors import EpplanError

from .cost import LayerEvaluation, Placement, evaluate_layer
from .highs import SolverResult, solve, solver_name
from .problem import Problem, even_capacity
from .program import MICROSECONDS, build_program
from .search import best_start, contiguous
from .terms import LayerTerms, layer_terms

_OPTIMAL_GAP = 1e-6  # HiGHS's own feasibility tolerance: a smaller gap means nothing
_AGREEMENT = 1e-6  # relative difference allowed between evaluator and linear form


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSolution:
    """One layer's placement and what is proven about it.

    Attributes:
        placement: rank of every expert.
        evaluation: its cost.
        bound_s: no placement of this layer costs less.
        contiguous_s: cost of experts in id order.
        found_by: how the placement was found.
        floor_s: the part of the bound that single experts cause wherever they sit.
    """

    placement: Placement
    evaluation: LayerEvaluation
    bound_s: float
    contiguous_s: float
    found_by: str
    floor_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """All layers, and the certificate of their sum."""

    layers: tuple[LayerSolution, ...]
    bound_s: float  # proven; above the layers' own bounds where memory couples them
    status: str  # optimal, feasible (gap reached) or limit
    seconds: float
    solver: str

    @property
    def objective_s(self) -> float:
        """Sum over layers."""
        return sum(layer.evaluation.seconds for layer in self.layers)

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s else 0.0


Progress = Callable[[str], None]


def solve_placement(
    problem: Problem, *, gap: float, time_limit_s: float, seed: int, progress: Progress
) -> Solution:
    """Return the best placement found, with its bound.

    Args:
        problem: the problem; `make_problem` has checked that it has a solution.
        gap: relative gap at which the solver may stop.
        time_limit_s: wall-clock limit over all layers.
        seed: of search and solver.
        progress: called with one line per layer.
    """
    began = time.monotonic()
    deadline = began + time_limit_s
    capacity = even_capacity(problem)
    groups = _groups(problem)
    solved: dict[int, LayerSolution] = {}
    bound = 0.0
    for number, group in enumerate(groups):
        share = max(0.0, deadline - time.monotonic()) / (len(groups) - number)
        together = group if problem.layers_coupled else group[:1]
        solutions, joint_bound = _solve_layers(problem, together, capacity, gap, share, seed)
        bound += joint_bound * len(group) / len(together)
        for layer in group:
            solved[layer] = solutions.get(layer, solutions[group[0]])
        progress(_line(solved[group[0]], len(solved), problem.model.num_moe_layers))
    objective = sum(layer.evaluation.seconds for layer in solved.values())
    bound = min(bound, objective)
    return Solution(
        layers=tuple(solved[layer] for layer in sorted(solved)),
        bound_s=bound,
        status=_status((objective - bound) / objective if objective else 0.0, gap),
        seconds=time.monotonic() - began,
        solver=solver_name(),
    )


def _groups(problem: Problem) -> list[list[int]]:
    """Return layers to solve as one: all where memory couples them, else those of equal traffic."""
    layers = range(problem.model.num_moe_layers)
    if problem.layers_coupled:
        return [list(layers)]
    equal: dict[bytes, list[int]] = {}
    for layer in layers:
        equal.setdefault(problem.counts[layer].tobytes(), []).append(layer)
    return list(equal.values())


def _status(reached: float, wanted: float) -> str:
    if reached <= _OPTIMAL_GAP:
        return "optimal"
    return "feasible" if reached <= wanted + _OPTIMAL_GAP else "limit"


def _line(layer: LayerSolution, done: int, total: int) -> str:
    gap = 1 - layer.bound_s / layer.evaluation.seconds
    return f"layer {done} of {total}: {layer.evaluation.seconds * 1e3:.4g} ms, gap {gap:.2%}"


def _solve_layers(
    problem: Problem,
    layers: list[int],
    capacity: npt.NDArray[np.int64],
    gap: float,
    time_limit_s: float,
    seed: int,
) -> tuple[dict[int, LayerSolution], float]:
    """Solve some layers as one program; return them and a proven bound on their sum."""
    terms = {layer: layer_terms(problem, layer) for layer in layers}
    starts = {layer: best_start(terms[layer], capacity[layer], seed) for layer in layers}
    found_by = {layer: name for layer, (name, _) in starts.items()}
    placements = {layer: placement for layer, (_, placement) in starts.items()}
    floor = sum(layer_terms.floor_s for layer_terms in terms.values())
    cost = sum(terms[layer].seconds(placements[layer]) for layer in terms)
    bound = floor
    if cost > floor * (1 + _OPTIMAL_GAP):
        result, improved = _run_program(problem, terms, placements, gap, time_limit_s, seed)
        bound = max(floor, min(result, cost))
        if improved is not None:
            placements = improved
            found_by = dict.fromkeys(terms, "integer program")
            cost = sum(terms[layer].seconds(placements[layer]) for layer in terms)
    # A bound on the sum is one layer's own bound only when it is alone.
    bounds = {layer: bound if len(layers) == 1 else terms[layer].floor_s for layer in layers}
    solutions = {
        layer: _layer_solution(
            problem,
            layer,
            terms[layer],
            placements[layer],
            found_by[layer],
            bounds[layer],
            capacity[layer],
        )
        for layer in layers
    }
    return solutions, min(bound, cost)


def _run_program(
    problem: Problem,
    terms: dict[int, LayerTerms],
    start: dict[int, Placement],
    gap: float,
    time_limit_s: float,
    seed: int,
) -> tuple[float, dict[int, Placement] | None]:
    """Return the program's bound in seconds, and its placements where they beat the start."""
    program = build_program(problem, terms)
    result: SolverResult = solve(
        program.lp,
        start=program.start_from(start),
        gap=gap,
        time_limit_s=time_limit_s,
        seed=seed,
    )
    if result.status == "infeasible":
        raise EpplanError("HiGHS calls a program infeasible that has a known feasible start")
    bound = result.bound / MICROSECONDS + program.constant_s
    if not result.values:
        return bound, None
    placements = program.placements(result.values)
    before = sum(terms[layer].seconds(start[layer]) for layer in terms)
    after = sum(terms[layer].seconds(placements[layer]) for layer in terms)
    return bound, placements if after < before * (1 - 1e-9) else None


def _layer_solution(
    problem: Problem,
    layer: int,
    terms: LayerTerms,
    placement: Placement,
    found_by: str,
    bound_s: float,
    capacity: npt.NDArray[np.int64],
) -> LayerSolution:
    evaluation = evaluate_layer(problem, layer, placement)
    linear = terms.seconds(placement)
    if abs(evaluation.seconds - linear) > _AGREEMENT * linear:
        raise EpplanError(
            f"layer {layer}: the evaluator prices the placement at {evaluation.seconds} s, the "
            f"program at {linear} s"
        )
    in_order = contiguous(len(placement), capacity)
    return LayerSolution(
        placement=placement,
        evaluation=evaluation,
        bound_s=min(evaluation.seconds, bound_s),
        contiguous_s=evaluate_layer(problem, layer, in_order).seconds,
        found_by=found_by,
        floor_s=terms.floor_s,
    )
