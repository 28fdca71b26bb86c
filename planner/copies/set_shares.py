"""The best shares of given copies where it matters what tokens choose together.

Rows are linear in the shares of one expert, not of all: a linear program from the slopes where the
shares are, within a step, priced exactly and taken if it helps; else the step is halved.
"""

import time

import numpy as np
import pulp

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.highs import solve_linear
from epplan.planner.placement.program import MICROSECONDS, add_objective

from .copy_state import CopyState
from .copy_steps import is_better
from .shares import LEAST_SHARE

_FIRST_STEP = 0.3  # of an expert's rows
_LEAST_STEP = 0.01
_SHARING_S = 10.0  # for one linear program
_SAME = 1e-12  # seconds that are nothing, of the largest


def share_out(state: CopyState, deadline: float) -> CopyState:
    """Return the copies with better shares, or as they are.

    Args:
        state: copies and shares.
        deadline: when to stop (time.monotonic).
    """
    step = _FIRST_STEP
    while step >= _LEAST_STEP and (left_s := deadline - time.monotonic()) > 0:
        shares = _within(state, step, min(_SHARING_S, left_s))
        if shares is None:
            return state
        changed = np.flatnonzero((shares != state.shares).any(axis=1)).tolist()
        tried = state.copy()
        tried.change({expert: shares[expert] for expert in changed})
        if is_better(tried.price, state.price):
            state = tried
        else:
            step /= 3
    return state


def _within(state: CopyState, step: float, time_limit_s: float) -> Shares | None:
    """Return the best shares within a step as the slopes have it."""
    copies = state.shares > 0
    split = np.flatnonzero(copies.sum(axis=1) > 1).tolist()
    if not split:
        return None
    lp = pulp.LpProblem("shares", pulp.LpMinimize)
    y = {}
    for expert in split:
        own = []
        for gpu in np.flatnonzero(copies[expert]).tolist():
            now = float(state.shares[expert, gpu])
            least = min(now, max(LEAST_SHARE, now - step))
            y[expert, gpu] = lp.add_variable(f"y_{expert}_{gpu}", least, min(1.0, now + step))
            own.append((y[expert, gpu], 1.0))
        lp += pulp.LpAffineExpression(own) == 1
    slopes = {expert: state.slopes(expert) for expert in split}
    times = []
    for number, load in enumerate(state.loads):
        by_share = {(e, gpu): slopes[e][number][:, gpu] for e, gpu in y}
        times.append(_add_phase(lp, f"t_{number}", load, by_share, y, state.shares))
    for number, phase in enumerate(state.layer.others):
        name = f"o_{number}"
        if number not in state.works:
            longest = float(phase.alone[copies].max())
            times.append(lp.add_variable(name, lowBound=longest * MICROSECONDS))
            continue
        arithmetic, reading = state.work[number]
        on_gpu = np.eye(len(arithmetic)) * state.works[number].arithmetic.T[:, None]
        by_share = {(e, gpu): on_gpu[e, gpu] for e, gpu in y}
        times.append(
            _add_phase(lp, name, arithmetic, by_share, y, state.shares, float(reading.max()))
        )
    lp.setObjective(pulp.LpAffineExpression(add_objective(lp, 0, state.layer, times)))
    _, values = solve_linear(lp, time_limit_s=time_limit_s)
    if not values:
        return None
    found = state.shares.copy()
    for (expert, gpu), variable in y.items():
        found[expert, gpu] = max(values[variable.name], min(LEAST_SHARE, found[expert, gpu]))
    found[split] /= found[split].sum(axis=1, keepdims=True)
    return found


def _add_phase(
    lp: pulp.LpProblem,
    name: str,
    load: Floats,
    by_share: dict[tuple[int, int], Floats],
    y: dict[tuple[int, int], pulp.LpVariable],
    shares: Shares,
    least: float = 0.0,
) -> pulp.LpVariable:
    """Add a phase's time: rows now, [rows], and what shares add to them, [rows] each."""
    slope = np.array([by_share[place] for place in y])  # [shares, rows]
    now = np.array([shares[place] for place in y])
    rest = load - now @ slope
    slope[slope < _SAME * load.max(initial=0.0)] = 0.0
    moving = slope.any(axis=0)
    least = max(least, float(rest[~moving].max(initial=0.0)))
    time = lp.add_variable(name, lowBound=least * MICROSECONDS)
    variables = list(y.values())
    for row in np.flatnonzero(moving).tolist():
        entries = np.flatnonzero(slope[:, row]).tolist()
        terms = [(variables[n], float(slope[n, row]) * MICROSECONDS) for n in entries]
        lp += pulp.LpAffineExpression([*terms, (time, -1.0)]) <= -float(rest[row]) * MICROSECONDS
    return time
