"""A layer's cost in linear form, which both the integer program and the search work on.

Every phase is a maximum over rows, every row a sum over experts of what the expert adds to it on
the GPU where it sits: phase = max over rows of  sum over e of  row[e, gpu of e].  The evaluator in
`cost` does not use this form; the two are compared after every solve.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.hardware import hardware

from .cost import Placement
from .problem import Problem

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTerms:
    """One maximum of the objective.

    Attributes:
        name: dispatch, compute, combine, or the latency of one of them.
        rows: seconds that expert e adds to a row on GPU g, [rows, experts, gpus].
        floor_s: no placement makes the phase shorter: the largest row value that some expert
            causes alone wherever it sits.
    """

    name: str
    rows: Floats
    floor_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """Objective of one layer: the sum of its phases and a constant, in seconds."""

    phases: tuple[PhaseTerms, ...]
    constant_s: float

    @property
    def floor_s(self) -> float:
        """A lower bound on any placement, from single experts."""
        return self.constant_s + sum(phase.floor_s for phase in self.phases)

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        experts = np.arange(len(placement))
        total = sum(phase.rows[:, experts, placement].sum(axis=1).max() for phase in self.phases)
        return float(total + self.constant_s)


def layer_terms(problem: Problem, layer: int) -> LayerTerms:
    """Return the linear form of one layer."""
    routes, counts = problem.routes, problem.counts[layer]  # [ranks, experts]
    outward = counts * problem.model.row_bytes
    sources, destinations = routes.sources.toarray(), routes.destinations.toarray()  # [flows, gpus]
    transfers = {
        # dispatch: from home ranks s to the expert's g;  combine: from g back to s
        "dispatch": _resource_rows(problem, sources @ outward, destinations),
        "combine": _resource_rows(problem, destinations @ outward, sources),
    }
    phases = [_phase("compute", _compute_rows(problem, counts))]
    constant = 0.0
    for name, rows in transfers.items() if routes.resources else ():
        phases.append(_phase(name, rows))
        to_expert = routes.latency_s if name == "dispatch" else routes.latency_s.T
        latency = _latency_rows(to_expert, counts)
        constant += hardware().latency["base"]
        if np.ptp(latency):
            phases.append(_phase(f"{name} latency", _one_row_per_expert(latency)))
        else:
            constant += float(latency.flat[0])
    return LayerTerms(phases=tuple(phases), constant_s=constant)


def _resource_rows(problem: Problem, per_expert: Floats, at_gpu: Floats) -> Floats:
    """Return seconds per resource, [resources, experts, gpus].

    Args:
        problem: the problem.
        per_expert: bytes of an expert in a flow if it sat at its far end, [flows, experts].
        at_gpu: weight of every GPU as that far end, [flows, gpus].
    """
    routes = problem.routes
    rows = np.zeros((len(routes.resources), per_expert.shape[1], at_gpu.shape[1]))
    for flow, resource in enumerate(routes.resource_of_flow):
        rows[resource] += np.outer(per_expert[flow], at_gpu[flow])
    return rows / routes.capacity[:, None, None]


def _compute_rows(problem: Problem, counts: Floats) -> Floats:
    """Return seconds per GPU, of arithmetic and then of reading weights, [2 gpus, e, gpus]."""
    model, own = problem.model, np.eye(problem.num_ranks)[:, None, :]  # row g counts only GPU g
    arithmetic = (counts.sum(axis=0) * model.expert_flops_per_row)[
        None, :, None
    ] / problem.flops_per_s
    reading = np.full_like(arithmetic, 1.0) * (model.expert_bytes / problem.hbm_bytes_per_s)
    return np.concatenate([arithmetic * own, reading * own])


def _latency_rows(latency: Floats, counts: Floats) -> Floats:
    """Return the longest latency an expert causes on a GPU, [experts, gpus]; 0 without traffic."""
    sends = counts > 0  # [ranks, experts]
    longest: Floats = np.where(sends[:, :, None], latency[:, None, :], 0.0).max(axis=0)
    return longest


def _one_row_per_expert(latency: Floats) -> Floats:
    return np.eye(len(latency))[:, :, None] * latency[None]


def _phase(name: str, rows: Floats) -> PhaseTerms:
    rows = _undominated(rows)
    alone = rows.max(axis=0)  # worst row if the expert were the only one, [experts, gpus]
    return PhaseTerms(name=name, rows=rows, floor_s=float(alone.min(axis=1).max()))


def _undominated(rows: Floats) -> Floats:
    """Drop rows that another row is never below: a NIC hides the faster PCIe link behind it."""
    flat = rows.reshape(len(rows), -1)
    scale = flat.max(axis=1)
    order = np.argsort(-scale, kind="stable")
    kept: dict[bytes, int] = {}
    for row in order:
        if scale[row] > 0:
            kept.setdefault(np.round(flat[row] / scale[row], 9).tobytes(), int(row))
    return rows[sorted(kept.values())] if kept else rows[:1]
