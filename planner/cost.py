"""The evaluator: what a placement costs, in seconds. Everything that prices a plan calls this.

A layer is three phases, dispatch (hidden vectors to the experts' ranks), compute and combine
(results back), on every window of the traffic. A phase takes as long as its worst resource:

    t_transfer = start  +  max over links of bytes / capacity  +  longest latency of a used path
    t_compute  = max over GPUs of max(FLOPs / FLOP/s, weight bytes / HBM bytes/s)

`objective` says how phases and windows become one number.

Transfers are per choice: one row per (token, expert) on another rank, as `all_to_all_single` sends
them; with one expert per GPU this is also one row per (token, rank).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.hardware import hardware
from epplan.topologies.routes import Routes

from .problem import Problem

Floats = npt.NDArray[np.float64]
Placement = npt.NDArray[np.intp]  # rank of every expert of one layer, [experts]
Shares = npt.NDArray[np.float64]  # share of an expert's rows on each rank, [experts, ranks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of one layer."""

    name: str
    seconds: float
    worst: str  # the resource or GPU that sets the time
    worst_bytes: float  # on that resource; 0 for compute
    rank: int  # the rank whose experts load it most


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEvaluation:
    """The phases of one layer on one window of the traffic."""

    dispatch: Phase
    compute: Phase
    combine: Phase
    seconds: float

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        """All phases in order."""
        return self.dispatch, self.compute, self.combine


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvaluation:
    """One layer: the windows that count, the worst first, and their mean."""

    windows: tuple[WindowEvaluation, ...]
    seconds: float

    @property
    def worst(self) -> WindowEvaluation:
        """The slowest window."""
        return self.windows[0]

    def phase_seconds(self) -> tuple[float, float, float]:
        """Return dispatch, compute and combine, means over the windows that count."""
        phases = np.array([[phase.seconds for phase in w.phases] for w in self.windows])
        dispatch, compute, combine = phases.mean(axis=0).tolist()
        return dispatch, compute, combine


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """One transfer between all ranks: what it puts on every resource, and how long it takes."""

    bytes: Floats  # [resources]
    busy_s: Floats  # bytes / capacity, [resources]
    latency_s: float  # start and longest used path
    worst: int  # the resource that sets the time

    @property
    def seconds(self) -> float:
        """How long the transfer takes."""
        return self.latency_s + float(self.busy_s.max(initial=0.0))


def transfer_cost(routes: Routes, sent: Floats, start_s: float | None = None) -> TransferCost:
    """Return what a transfer costs.

    Args:
        routes: between the ranks.
        sent: bytes from every rank to every rank, [ranks, ranks].
        start_s: once per transfer; None is a profile's.
    """
    amounts = routes.bytes_per_resource(sent)
    busy_s = amounts / routes.capacity
    away = ~np.eye(len(sent), dtype=bool) & (sent > 0)
    start_s = hardware().latency["base"] if start_s is None else start_s
    return TransferCost(
        bytes=amounts,
        busy_s=busy_s,
        latency_s=float(start_s + routes.latency_s[away].max(initial=0.0)),
        worst=int(busy_s.argmax()) if busy_s.size else 0,
    )


def one_copy(placement: Placement, num_ranks: int) -> Shares:
    """Return the shares of a placement with one copy of each expert."""
    return np.eye(num_ranks)[placement]


def rows_between_ranks(problem: Problem, window: int, layer: int, shares: Shares) -> Floats:
    """Return rows sent from every home rank to every rank with experts, [ranks, ranks]."""
    rows: Floats = problem.counts[window, layer] @ shares
    return rows


def evaluate_layer(problem: Problem, layer: int, shares: Shares) -> LayerEvaluation:
    """Return what a layer's placement costs.

    Args:
        problem: the problem.
        layer: ordinal of the MoE layer.
        shares: of every expert's rows on each rank; a copy is where the share is not 0.
    """
    windows = [
        _evaluate_window(problem, rows_between_ranks(problem, window, layer, shares), shares)
        for window in range(len(problem.counts))
    ]
    seconds = problem.objective.seconds(np.array([window.seconds for window in windows]))
    windows.sort(key=lambda window: -window.seconds)
    counting = windows[: problem.objective.num_worst(len(windows))]
    return LayerEvaluation(windows=tuple(counting), seconds=float(seconds))


def _evaluate_window(problem: Problem, rows: Floats, shares: Shares) -> WindowEvaluation:
    dispatch = _transfer(problem, "dispatch", rows)
    compute = _compute(problem, rows, shares)
    combine = _transfer(problem, "combine", rows.T)
    seconds = problem.objective.window_seconds(
        np.array(dispatch.seconds + combine.seconds), np.array(compute.seconds)
    )
    return WindowEvaluation(
        dispatch=dispatch, compute=compute, combine=combine, seconds=float(seconds)
    )


def _transfer(problem: Problem, name: str, rows: Floats) -> Phase:
    routes = problem.routes
    if not routes.resources:
        return Phase(name=name, seconds=0.0, worst="nothing leaves a GPU", worst_bytes=0.0, rank=0)
    cost = transfer_cost(routes, rows * problem.model.row_bytes)
    away = rows * ~np.eye(len(rows), dtype=bool)
    return Phase(
        name=name,
        seconds=cost.seconds,
        worst=routes.resources[cost.worst].name,
        worst_bytes=float(cost.bytes[cost.worst]),
        rank=_rank_loading(problem, cost.worst, away),
    )


def _rank_loading(problem: Problem, resource: int, rows: Floats) -> int:
    """Return the receiving rank with most rows on a resource."""
    routes = problem.routes
    flows = np.flatnonzero(routes.resource_of_flow == resource)
    per_flow = routes.destinations[flows].multiply(routes.sources[flows] @ rows)
    return int(np.asarray(per_flow.sum(axis=0)).argmax())


def _compute(problem: Problem, rows: Floats, shares: Shares) -> Phase:
    model = problem.model
    held = np.count_nonzero(shares, axis=0)
    arithmetic = rows.sum(axis=0) * model.expert_flops_per_row / problem.flops_per_s
    reading = held * model.expert_bytes / problem.hbm_bytes_per_s
    seconds = np.maximum(arithmetic, reading)
    worst = int(seconds.argmax())
    limit = "FLOP/s" if arithmetic[worst] >= reading[worst] else "HBM"
    return Phase(
        name="compute",
        seconds=float(seconds[worst]),
        worst=f"{limit} of {problem.gpus[worst].id}",
        worst_bytes=0.0,
        rank=worst,
    )
