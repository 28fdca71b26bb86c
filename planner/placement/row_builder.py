"""A layer's rows from routes and traffic: the structure is found once, traffic gives the values."""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from epplan.planner.problem import Problem
from epplan.topologies.hardware import hardware
from epplan.topologies.routes import Routes

from .rows import Floats, Ints, LayerRows, PhaseRows, alone_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structure:
    """The rows of one direction, before any traffic.

    Values are `matrix @ per_flow`, where per_flow [flows, experts] is what an expert sends through
    a flow if it sits at the flow's far end.
    """

    base: csr_array  # [rows, flows], 1 / capacity
    pairs: csr_array  # [pairs, flows]
    pair_row: Ints
    pair_gpu: Ints
    capacity: Floats
    num_gpus: int


class RowBuilder:
    """Builds the rows of any layer of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        routes = problem.routes
        kept = distinct_resources(routes)
        # dispatch: home ranks are a flow's sources, the expert's GPU its destination; combine: the
        # other way round.
        self._dispatch = _structure(routes, kept, routes.destinations)
        self._combine = _structure(routes, kept, routes.sources)

    def cells(self) -> Ints:
        """Return the cell of every GPU, [gpus]: GPUs that are interchangeable but for traffic.

        A cell is a host, or the GPUs of a host that share a NIC where not all have their own: whom
        an expert shares a NIC with is what a placement over whole hosts would not see.
        """
        hosts = [gpu.host for gpu in self._problem.gpus]
        host_size = {host: hosts.count(host) for host in hosts}
        sharing: list[list[int]] = [[] for _ in hosts]
        structure = self._dispatch
        members: dict[int, list[int]] = defaultdict(list)
        for row, gpu in zip(structure.pair_row.tolist(), structure.pair_gpu.tolist(), strict=True):
            members[row].append(gpu)
        for row, gpus in members.items():
            if len(gpus) > 1 and 2 * len(gpus) <= host_size[hosts[gpus[0]]]:
                for gpu in gpus:
                    sharing[gpu].append(row)
        keys = [(host, tuple(rows)) for host, rows in zip(hosts, sharing, strict=True)]
        number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return np.array([number[key] for key in keys], dtype=np.intp)

    def layer(self, layer: int) -> LayerRows:
        """Return the rows of one layer (an ordinal)."""
        counts = self._problem.counts[:, layer]  # [windows, ranks, experts]
        phases: list[PhaseRows] = []
        constant_s = np.zeros(len(counts))
        for window in range(len(counts)):
            of_window, constant_s[window] = self._window(window, counts[window])
            phases += of_window
        return LayerRows(
            phases=tuple(phases), constant_s=constant_s, objective=self._problem.objective
        )

    def _window(self, window: int, counts: Floats) -> tuple[list[PhaseRows], float]:
        """Return the phases of one window and their constant; counts [ranks, experts]."""
        problem, routes = self._problem, self._problem.routes
        phases = [compute_rows(problem, window, counts)]
        constant = 0.0
        if routes.resources:
            sent = counts * problem.model.row_bytes
            dispatch = _transfer_rows("dispatch", window, self._dispatch, routes.sources @ sent)
            combine = _transfer_rows("combine", window, self._combine, routes.destinations @ sent)
            if _mirrored(dispatch, combine):
                phases.append(replace(dispatch, weight=2.0, name="dispatch and combine"))
            else:
                phases += [dispatch, combine]
            latencies, constant = latency_phases(problem, window, counts)
            phases += latencies
        return phases, constant


def latency_phases(problem: Problem, window: int, counts: Floats) -> tuple[list[PhaseRows], float]:
    """Return the longest paths of both transfers where placement decides, and what is constant."""
    phases, constant = [], 0.0
    for name in ("dispatch", "combine"):
        alone = _longest_latency(problem.path_latency_s(combine=name == "combine"), counts)
        constant += hardware().latency["base"]
        if np.ptp(alone):
            phases.append(_latency_rows(f"{name} latency", window, alone))
        else:
            constant += float(alone.flat[0])
    return phases, constant


def distinct_resources(routes: Routes) -> list[int]:
    """Return the resources that can be the worst: of those with equal flows, the slowest.

    The PCIe link, switch and NIC of a GPU with a NIC of its own carry the same bytes.
    """
    flows_of: dict[int, list[int]] = defaultdict(list)
    for flow, resource in enumerate(routes.resource_of_flow.tolist()):
        flows_of[resource].append(flow)
    slowest: dict[tuple[bytes, ...], int] = {}
    for resource, flows in flows_of.items():
        key = tuple(sorted(_flow_key(routes, flow) for flow in flows))
        other = slowest.setdefault(key, resource)
        if routes.capacity[resource] < routes.capacity[other]:
            slowest[key] = resource
    return sorted(slowest.values())


def _flow_key(routes: Routes, flow: int) -> bytes:
    parts = []
    for matrix in (routes.sources, routes.destinations):
        here = slice(matrix.indptr[flow], matrix.indptr[flow + 1])
        parts += [matrix.indices[here].tobytes(), matrix.data[here].tobytes()]
    return b"|".join(parts)


def _structure(routes: Routes, kept: list[int], expert_end: csr_array) -> _Structure:
    """Return the rows of one direction.

    Args:
        routes: the routes.
        kept: resources to make rows of.
        expert_end: weights of the GPUs at the flows' end where experts sit, [flows, gpus].
    """
    num_flows = expert_end.shape[0]
    flows_of: dict[int, list[int]] = defaultdict(list)
    for flow, resource in enumerate(routes.resource_of_flow.tolist()):
        flows_of[resource].append(flow)
    base: list[tuple[int, int, float]] = []
    pairs: list[tuple[int, int, float]] = []
    pair_row: list[int] = []
    pair_gpu: list[int] = []
    for row, resource in enumerate(kept):
        flows = flows_of[resource]
        weights = expert_end[flows].toarray() / routes.capacity[resource]  # [its flows, gpus]
        usual = _most_common_column(weights)
        base += [(row, flow, w) for flow, w in zip(flows, usual, strict=True) if w]
        for gpu in np.flatnonzero((weights != usual[:, None]).any(axis=0)).tolist():
            pair = len(pair_row)
            differences = weights[:, gpu] - usual
            pairs += [(pair, flow, w) for flow, w in zip(flows, differences, strict=True) if w]
            pair_row.append(row)
            pair_gpu.append(gpu)
    return _Structure(
        base=_sparse(base, (len(kept), num_flows)),
        pairs=_sparse(pairs, (len(pair_row), num_flows)),
        pair_row=np.array(pair_row, dtype=np.intp),
        pair_gpu=np.array(pair_gpu, dtype=np.intp),
        capacity=routes.capacity[kept],
        num_gpus=len(routes.gpus),
    )


def _most_common_column(weights: Floats) -> Floats:
    """Return the column that most GPUs have, [its flows]."""
    columns, count = np.unique(weights, axis=1, return_counts=True)
    usual: Floats = columns[:, count.argmax()]
    return usual


def _sparse(entries: list[tuple[int, int, float]], shape: tuple[int, int]) -> csr_array:
    row = np.array([entry[0] for entry in entries], dtype=np.intp)
    column = np.array([entry[1] for entry in entries], dtype=np.intp)
    value = np.array([entry[2] for entry in entries], dtype=np.float64)
    return csr_array((value, (row, column)), shape=shape)


def _transfer_rows(name: str, window: int, structure: _Structure, per_flow: Floats) -> PhaseRows:
    base, extra = structure.base @ per_flow, structure.pairs @ per_flow
    return PhaseRows(
        name=name,
        window=window,
        weight=1.0,
        base=base,
        pair_row=structure.pair_row,
        pair_gpu=structure.pair_gpu,
        extra=extra,
        per_copy=np.zeros(len(base), dtype=bool),
        capacity=structure.capacity,
        alone=alone_rows(base, structure.pair_row, structure.pair_gpu, extra, structure.num_gpus),
    )


def compute_rows(problem: Problem, window: int, counts: Floats) -> PhaseRows:
    """Return two rows a GPU: its arithmetic, and reading its experts' weights."""
    model, gpus = problem.model, np.arange(problem.num_ranks)
    flops = counts.sum(axis=0) * model.expert_flops_per_row  # [experts]
    arithmetic = flops / problem.flops_per_s[:, None]  # [gpus, experts]
    reading = np.broadcast_to(
        model.expert_bytes / problem.hbm_bytes_per_s[:, None], arithmetic.shape
    )
    return PhaseRows(
        name="compute",
        window=window,
        weight=1.0,
        base=np.zeros((2 * len(gpus), len(flops))),
        pair_row=np.arange(2 * len(gpus)),
        pair_gpu=np.concatenate([gpus, gpus]),
        extra=np.concatenate([arithmetic, reading]),
        per_copy=np.repeat([False, True], len(gpus)),
        capacity=np.concatenate([problem.flops_per_s, problem.hbm_bytes_per_s]),
        alone=np.maximum(arithmetic, reading).T,
    )


def _latency_rows(name: str, window: int, alone: Floats) -> PhaseRows:
    num_experts = len(alone)
    nothing = np.zeros(0, dtype=np.intp)
    return PhaseRows(
        name=name,
        window=window,
        weight=1.0,
        base=np.zeros((0, num_experts)),
        pair_row=nothing,
        pair_gpu=nothing,
        extra=np.zeros((0, num_experts)),
        per_copy=np.zeros(0, dtype=bool),
        capacity=np.zeros(0),
        alone=alone,
    )


def _longest_latency(latency_s: Floats, counts: Floats) -> Floats:
    """Return the longest path an expert's traffic takes on a GPU, [experts, gpus]."""
    longest = np.zeros((counts.shape[1], latency_s.shape[1]))
    for rank, row in enumerate(counts):  # [experts]
        np.maximum(longest, np.where(row[:, None] > 0, latency_s[rank], 0.0), out=longest)
    return longest


def _mirrored(dispatch: PhaseRows, combine: PhaseRows) -> bool:
    """Tell whether combine has the rows of dispatch, in any order: then one stands for both.

    Links that are as fast in both directions make it so. Rows are matched by their effect on a
    few random fractional placements, which different rows do not share.
    """
    if dispatch.base.shape != combine.base.shape:
        return False
    random = np.random.default_rng(0)
    num_gpus = dispatch.alone.shape[1]
    for _ in range(4):
        at = random.random((dispatch.base.shape[1], num_gpus))
        first, second = dispatch.load_of_shares(at), combine.load_of_shares(at)
        if not np.allclose(np.sort(first), np.sort(second), rtol=1e-9, atol=0):
            return False
    return True
