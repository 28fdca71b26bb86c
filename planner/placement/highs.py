"""HiGHS behind PuLP: the only place that starts a solver, and what it honestly found.

PuLP 3.3 calls a run that stopped at its time limit "Optimal", has no warm start, lets HiGHS print
its banner on stdout and Ctrl-C wait for the solver; here all of it is read from or told to HiGHS
itself.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import inf

import highspy
import numpy as np
import numpy.typing as npt
import pulp
from scipy.sparse import csr_array, hstack

from epplan.errors import EpplanError

# HiGHS's model status to ours. What is not listed (kNotset, kLoadError, kModelError,
# kPresolveError, kSolveError, kPostsolveError, kModelEmpty, kUnbounded, kUnboundedOrInfeasible,
# kUnknown) cannot come from a sound program and ends as an internal error.
_STATUS = {
    "kOptimal": "gap reached",  # within the gap asked for
    "kObjectiveBound": "gap reached",
    "kObjectiveTarget": "gap reached",
    "kTimeLimit": "limit",
    "kIterationLimit": "limit",
    "kSolutionLimit": "limit",
    "kMemoryLimit": "limit",
    "kInterrupt": "interrupted",
    "kHighsInterrupt": "interrupted",
    "kInfeasible": "infeasible",
}

Floats = npt.NDArray[np.float64]

_LOOK_S = 0.1  # how often a running solver is left to see Ctrl-C
_TOLERANCE = 1e-7  # HiGHS's primal and dual feasibility


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverResult:
    """What HiGHS found and proved.

    Attributes:
        status: gap reached, limit, interrupted (by Ctrl-C) or infeasible.
        bound: proven lower bound on the objective, in its unit.
        values: of all variables by name; empty without a solution.
    """

    status: str
    bound: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Many variables, none negative, and rows of a linear program, as arrays.

    By name and one by one they take PuLP longer than HiGHS takes to solve them.

    Attributes:
        cost: of the block's variables, [variables].
        matrix: what these add to its rows, [rows, variables].
        program: what variables of the PuLP program beside it add to them, each [rows].
        lower: of the rows, [rows].
        upper: of the rows, [rows].
    """

    cost: Floats
    matrix: csr_array
    program: Sequence[tuple[pulp.LpVariable, Floats]]
    lower: Floats
    upper: Floats


def solver_name() -> str:
    """Return solver and version as certificates name it."""
    return f"HiGHS {version('highspy')} through PuLP {version('pulp')}"


def solve(
    program: pulp.LpProblem, *, start: dict[str, float], gap: float, time_limit_s: float, seed: int
) -> SolverResult:
    """Minimise `program` from a feasible start.

    Args:
        program: a PuLP minimisation.
        start: value of every variable, by name; a known feasible point.
        gap: relative gap at which to stop.
        time_limit_s: wall-clock limit.
        seed: of HiGHS's random choices.

    Raises:
        EpplanError: HiGHS ended in an unexpected state.
    """
    solver = pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit_s, random_seed=seed)
    with _silent_stdout():
        solver.createAndConfigureSolver(program)
        solver.buildSolverModel(program)
        highs: highspy.Highs = program.solverModel
        first = highspy.HighsSolution()
        first.col_value = [start[variable.name] for variable in program.variables()]
        highs.setSolution(first)
        interrupted = _run(highs)
    status = "interrupted" if interrupted else _STATUS.get(highs.getModelStatus().name)
    if status is None:
        raise EpplanError(f"HiGHS ended with {highs.getModelStatus().name}")
    info, solution = highs.getInfo(), highs.getSolution()
    names = [variable.name for variable in program.variables()]
    return SolverResult(
        status=status,
        bound=info.mip_dual_bound,
        values=dict(zip(names, solution.col_value, strict=True)) if solution.value_valid else {},
    )


def solve_linear(program: pulp.LpProblem, *, time_limit_s: float) -> tuple[float, dict[str, float]]:
    """Return the minimum of a linear program and its variables by name.

    The minimum is low by HiGHS's tolerance, so that it is a bound; without a solution, or none
    within the limit, it is 0 with no values.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        EpplanError: HiGHS ended in an unexpected state.
    """
    least, values, _ = _linear(program, None, time_limit_s)
    return least, values


def solve_with_block(
    program: pulp.LpProblem, block: Block, *, time_limit_s: float
) -> tuple[float, dict[str, float], Floats]:
    """Return the same for a program with a block beside it, and the block's variables."""
    return _linear(program, block, time_limit_s)


def _linear(
    program: pulp.LpProblem, block: Block | None, time_limit_s: float
) -> tuple[float, dict[str, float], Floats]:
    highs = _solved(program, block, timeLimit=time_limit_s)
    status = highs.getModelStatus().name
    if status in ("kTimeLimit", "kInfeasible"):
        return 0.0, {}, np.zeros(0)
    if status != "kOptimal":
        raise EpplanError(f"HiGHS ended a linear program with {status}")
    found = highs.getSolution().col_value
    names = [variable.name for variable in program.variables()]
    values = dict(zip(names, found[: len(names)], strict=True))
    minimum = highs.getInfo().objective_function_value * (1 - _TOLERANCE)
    return minimum, values, np.array(found[len(names) :])


def least(program: pulp.LpProblem, *, time_limit_s: float) -> float:
    """Return a proven lower bound on the minimum of a program; infinity where it has no solution.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    highs = _solved(program, None, gapRel=0.0, timeLimit=time_limit_s)
    if highs.getModelStatus().name == "kInfeasible":
        return inf
    return float(highs.getInfo().mip_dual_bound)


def _solved(program: pulp.LpProblem, block: Block | None, **options: float) -> highspy.Highs:
    """Return HiGHS after it has run without a start."""
    solver = pulp.HiGHS(msg=False, **options)
    with _silent_stdout():
        solver.createAndConfigureSolver(program)
        solver.buildSolverModel(program)
        highs: highspy.Highs = program.solverModel
        if block is not None:
            _add_block(highs, program, block)
        interrupted = _run(highs)
    if interrupted:
        raise KeyboardInterrupt
    return highs


def _add_block(highs: highspy.Highs, program: pulp.LpProblem, block: Block) -> None:
    """Add a block to a program that HiGHS has."""
    number = {variable.name: index for index, variable in enumerate(program.variables())}
    first, more = len(number), len(block.cost)
    highs.addVars(more, np.zeros(more), np.full(more, highspy.kHighsInf))
    highs.changeColsCost(more, np.arange(first, first + more, dtype=np.int32), block.cost)
    beside = np.zeros((len(block.lower), first))
    for variable, amounts in block.program:
        beside[:, number[variable.name]] = amounts
    rows = hstack([csr_array(beside), block.matrix], format="csr")
    starts, columns = rows.indptr.astype(np.int32), rows.indices.astype(np.int32)
    highs.addRows(len(block.lower), block.lower, block.upper, rows.nnz, starts, columns, rows.data)


def _run(highs: highspy.Highs) -> bool:
    """Run HiGHS in a thread of its own, and return whether Ctrl-C ended it.

    In the main thread Ctrl-C would raise inside of HiGHS, which calls that an error.
    """
    highs.HandleUserInterrupt = True
    interrupted = False
    highs.startSolve()
    done = False
    while not done:
        try:
            done, _ = highs.wait(_LOOK_S)
        except KeyboardInterrupt:
            interrupted = True
            highs.cancelSolve()  # type: ignore[no-untyped-call]
    return interrupted


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Silence file descriptor 1: highspy 1.16 prints a banner from its constructor."""
    sys.stdout.flush()
    saved = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)
