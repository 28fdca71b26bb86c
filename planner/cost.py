"""The evaluator: what a placement costs, in seconds. Everything that prices a plan calls this.

A layer is three phases, dispatch (hidden vectors to the experts' ranks), compute and combine
(results back), on every window of the traffic. A phase takes as long as its worst resource:

    t_transfer = start  +  max over links of bytes / capacity  +  longest latency of a used path
    t_compute  = max over GPUs of max(FLOPs / FLOP/s, weight bytes / HBM bytes/s)

`objective` says how phases and windows become one number.

What is sent, and through whom, is the problem's transfer mode (`forwarding`): per choice, one row
per (token, expert) on another rank, comes from counts; one row per (token, rank), or per (token,
island) with forwarding, comes from the sets of experts that tokens choose together. The experts'
work is the same in all modes.

A choice goes to one of its expert's copies at random by their shares, alike from every source and
independently of a token's other choices. Priced are the rows expected then: a token reaches a place
with probability 1 - prod over its experts of (1 - share of their copies there).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.transfer_cost import transfer_cost

from .forwarding import through_islands
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


def one_copy(placement: Placement, num_ranks: int) -> Shares:
    """Return the shares of a placement with one copy of each expert."""
    return np.eye(num_ranks)[placement]


def rows_between_ranks(problem: Problem, window: int, layer: int, shares: Shares) -> Floats:
    """Return assignments of every home rank to experts of every rank, [ranks, ranks]."""
    rows: Floats = problem.counts[window, layer] @ shares
    return rows


def rows_sent(problem: Problem, window: int, layer: int, shares: Shares) -> Floats:
    """Return rows that every rank sends to every rank in dispatch, hop by hop, [ranks, ranks].

    The diagonal is what stays on its rank.
    """
    if problem.sets is None:
        return rows_between_ranks(problem, window, layer, shares)
    sets, island = problem.sets[window][layer], problem.routes.island
    to_rank = sets.tokens_at(np.arange(problem.num_ranks), shares)
    if problem.transfer == "direct":
        return to_rank
    return through_islands(to_rank, sets.tokens_at(island, shares), island)


def evaluate_layer(problem: Problem, layer: int, shares: Shares) -> LayerEvaluation:
    """Return what a layer's placement costs.

    Args:
        problem: the problem.
        layer: ordinal of the MoE layer.
        shares: of every expert's rows on each rank; a copy is where the share is not 0.
    """
    windows = [
        _evaluate_window(
            problem,
            rows_between_ranks(problem, window, layer, shares),
            rows_sent(problem, window, layer, shares),
            shares,
        )
        for window in range(len(problem.counts))
    ]
    seconds = problem.objective.seconds(np.array([window.seconds for window in windows]))
    windows.sort(key=lambda window: -window.seconds)
    counting = windows[: problem.objective.num_worst(len(windows))]
    return LayerEvaluation(windows=tuple(counting), seconds=float(seconds))


def _evaluate_window(
    problem: Problem, computed: Floats, sent: Floats, shares: Shares
) -> WindowEvaluation:
    used = ~np.eye(problem.num_ranks, dtype=bool) & (computed > 0)
    there_s, back_s = (problem.path_latency_s(combine=back)[used] for back in (False, True))
    dispatch = _transfer(problem, "dispatch", sent, there_s)
    compute = _compute(problem, computed, shares)
    combine = _transfer(problem, "combine", sent.T, back_s)
    seconds = problem.objective.window_seconds(
        np.array(dispatch.seconds + combine.seconds), np.array(compute.seconds)
    )
    return WindowEvaluation(
        dispatch=dispatch, compute=compute, combine=combine, seconds=float(seconds)
    )


def _transfer(problem: Problem, name: str, rows: Floats, path_latency_s: Floats) -> Phase:
    routes = problem.routes
    if not routes.resources:
        return Phase(name=name, seconds=0.0, worst="nothing leaves a GPU", worst_bytes=0.0, rank=0)
    cost = transfer_cost(routes, rows * problem.model.row_bytes, path_latency_s=path_latency_s)
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
