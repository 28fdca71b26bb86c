"""The evaluator: what a placement costs, in seconds. Everything that prices a plan calls this.

A layer is three phases, added: dispatch (hidden vectors to the experts' ranks), compute, combine
(results back). A phase takes as long as its worst resource:

    t_transfer = start  +  max over links of bytes / capacity  +  longest latency of a used path
    t_compute  = max over GPUs of max(FLOPs / FLOP/s, weight bytes / HBM bytes/s)

Transfers are per choice: one row per (token, expert) on another rank, as `all_to_all_single` sends
them; with one expert per GPU this is also one row per (token, rank).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.hardware import hardware

from .problem import Problem

Floats = npt.NDArray[np.float64]
Placement = npt.NDArray[np.intp]  # rank of every expert of one layer, [experts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of one layer."""

    name: str
    seconds: float
    worst: str  # the resource or GPU that sets the time
    worst_bytes: float  # on that resource; 0 for compute
    rank: int  # the rank whose experts load it most


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvaluation:
    """The three phases of one layer."""

    dispatch: Phase
    compute: Phase
    combine: Phase

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        """All phases in order."""
        return self.dispatch, self.compute, self.combine

    @property
    def seconds(self) -> float:
        """The phases added."""
        return sum(phase.seconds for phase in self.phases)


def rows_between_ranks(problem: Problem, layer: int, placement: Placement) -> Floats:
    """Return rows sent from every home rank to every rank with experts, [ranks, ranks]."""
    rows = np.zeros((problem.num_ranks, problem.num_ranks))
    np.add.at(rows.T, placement, problem.counts[layer].T)
    return rows


def evaluate_layer(problem: Problem, layer: int, placement: Placement) -> LayerEvaluation:
    """Return what a layer's placement costs.

    Args:
        problem: the problem.
        layer: ordinal of the MoE layer.
        placement: rank of every expert, [experts].
    """
    rows = rows_between_ranks(problem, layer, placement)
    return LayerEvaluation(
        dispatch=_transfer(problem, "dispatch", rows),
        compute=_compute(problem, rows, placement),
        combine=_transfer(problem, "combine", rows.T),
    )


def _transfer(problem: Problem, name: str, rows: Floats) -> Phase:
    routes = problem.routes
    if not routes.resources:
        return Phase(name=name, seconds=0.0, worst="nothing leaves a GPU", worst_bytes=0.0, rank=0)
    amounts = routes.bytes_per_resource(rows * problem.model.row_bytes)
    seconds = amounts / routes.capacity
    worst = int(seconds.argmax())
    away = rows * ~np.eye(len(rows), dtype=bool)
    latency = routes.latency_s[away > 0].max(initial=0.0)
    return Phase(
        name=name,
        seconds=float(hardware().latency["base"] + seconds[worst] + latency),
        worst=routes.resources[worst].name,
        worst_bytes=float(amounts[worst]),
        rank=_rank_loading(problem, worst, away),
    )


def _rank_loading(problem: Problem, resource: int, rows: Floats) -> int:
    """Return the receiving rank with most rows on a resource."""
    routes = problem.routes
    flows = np.flatnonzero(routes.resource_of_flow == resource)
    per_flow = routes.destinations[flows].multiply(routes.sources[flows] @ rows)
    return int(np.asarray(per_flow.sum(axis=0)).argmax())


def _compute(problem: Problem, rows: Floats, placement: Placement) -> Phase:
    model = problem.model
    held = np.bincount(placement, minlength=problem.num_ranks)
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
