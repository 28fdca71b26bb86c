"""What every placement loads, in sparse form: the linear rows behind the worst resource.

A row is a resource's time. What expert e adds to row r on GPU g is the same for almost all g: a
NIC's outgoing row grows by e's traffic wherever e sits, except on the NIC's own host. So a row is

    base[r, e]  everywhere,  plus  extra[p, e]  on the few GPUs g of its pairs p = (r, g)

and a placement's load is  sum over e of base[r, e] + sum over pairs (r, gpu of e) of extra[p, e].
The structure depends on the routes only and is found once; a layer's traffic gives the values.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from epplan.planner.cost import Placement, Shares
from epplan.planner.objective import Objective, layer_seconds
from epplan.planner.problem import Problem
from epplan.topologies.hardware import hardware
from epplan.topologies.routes import Routes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRows:
    """One phase of one layer: the maximum over its rows, and over what single experts cause.

    Attributes:
        name: dispatch, compute, combine, or the latency of one of them.
        window: of the traffic.
        weight: how often the phase counts (2 where combine is the mirror of dispatch).
        base: seconds, [rows, experts].
        pair_row: row of every pair, [pairs].
        pair_gpu: GPU of every pair, [pairs].
        extra: seconds on top of base, [pairs, experts].
        per_copy: rows that a copy loads whole, whatever its share of the traffic, [rows].
        capacity: of every row, to weigh rows that are added up, [rows].
        alone: the phase lasts at least this long when expert e sits on GPU g, [experts, gpus].
    """

    name: str
    window: int
    weight: float
    base: Floats
    pair_row: Ints
    pair_gpu: Ints
    extra: Floats
    per_copy: npt.NDArray[np.bool_]
    capacity: Floats
    alone: Floats

    @property
    def is_compute(self) -> bool:
        """Whether it is the experts' and not a transfer's."""
        return self.name == "compute"

    @property
    def floor_s(self) -> float:
        """No placement makes the phase shorter: the expert that costs most where it costs least."""
        return float(self.alone.min(axis=1).max())

    def load(self, placement: Placement) -> Floats:
        """Return every row's seconds for ranks of experts, [rows]."""
        load: Floats = self.base.sum(axis=1)
        pair, expert = np.nonzero(self.pair_gpu[:, None] == placement[None, :])
        np.add.at(load, self.pair_row[pair], self.extra[pair, expert])
        return load

    def seconds(self, placement: Placement) -> float:
        """Return the phase's duration for ranks of experts, [experts]."""
        alone = self.alone[np.arange(len(placement)), placement].max()
        return max(float(self.load(placement).max(initial=0.0)), float(alone))

    def load_of_shares(self, shares: Shares) -> Floats:
        """Return every row's seconds for shares of experts on GPUs, [rows]."""
        load: Floats = (self.base * shares.sum(axis=1)).sum(axis=1)
        whole = self.per_copy[self.pair_row][:, None]
        at = np.where(whole, shares.T[self.pair_gpu] > 0, shares.T[self.pair_gpu])
        np.add.at(load, self.pair_row, (self.extra * at).sum(axis=1))
        return load

    def seconds_of_shares(self, shares: Shares) -> float:
        """Return the phase's duration for shares of experts on GPUs, [experts, gpus]."""
        if not len(self.base):  # latency: a path is used or not
            return float(self.alone[shares > 0].max())
        return float(self.load_of_shares(shares).max())

    def floor_with_copies(self, num_copies: int) -> float:
        """Return what the phase lasts at least with so many copies of all experts, shares free.

        Each of n copies of an expert loads its own GPU's rows; the largest has a share of 1/n at
        least. So within L, expert e needs alone[e] / L copies, and all of them need num_copies.
        """
        if not len(self.base):
            return self.floor_s
        whole = self.copies(np.arange(self.alone.shape[0]), np.zeros(self.alone.shape[0])).floor_s
        alone = self._alone_of_traffic().min(axis=1)
        low, high = alone.max() / self.alone.shape[1], alone.max()
        for _ in range(60):
            middle = (low + high) / 2
            enough = np.maximum(1, np.ceil(alone / max(middle, 1e-300) - 1e-9)).sum() <= num_copies
            low, high = (low, middle) if enough else (middle, high)
        return max(float(low), whole)

    def own_rows(self) -> Floats | None:
        """Return what experts add to each GPU's heaviest row that only its own experts load.

        In seconds, [experts, gpus]; None where some GPU has no such row.
        """
        num_gpus = self.alone.shape[1]
        of_row = np.bincount(self.pair_row, minlength=len(self.base))
        own = (of_row == 1) & ~self.base.any(axis=1) & ~self.per_copy
        pairs = np.flatnonzero(own[self.pair_row])
        total = self.extra[pairs].sum(axis=1)
        heaviest: dict[int, int] = {}
        for number in np.argsort(total, kind="stable").tolist():
            heaviest[int(self.pair_gpu[pairs[number]])] = int(pairs[number])
        if len(heaviest) < num_gpus:
            return None
        amounts: Floats = self.extra[[heaviest[gpu] for gpu in range(num_gpus)]].T
        return amounts

    def _alone_of_traffic(self) -> Floats:
        """Return `alone` without the rows that a copy loads whole, [experts, gpus]."""
        pairs = ~self.per_copy[self.pair_row]
        return _alone(
            self.base,
            self.pair_row[pairs],
            self.pair_gpu[pairs],
            self.extra[pairs],
            self.alone.shape[1],
        )

    def copies(self, expert: Ints, share: Floats) -> "PhaseRows":
        """Return the phase with copies in the place of experts."""
        base = self.base[:, expert] * share
        part = np.where(self.per_copy[self.pair_row][:, None], 1.0, share)
        extra = self.extra[:, expert] * part
        num_gpus = self.alone.shape[1]
        alone = (
            _alone(base, self.pair_row, self.pair_gpu, extra, num_gpus)
            if len(base)
            else self.alone[expert]  # latency: a path is used or not
        )
        return replace(self, base=base, extra=extra, alone=alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """All phases of one layer, and the transfer seconds that no placement changes, [windows]."""

    phases: tuple[PhaseRows, ...]
    constant_s: Floats
    objective: Objective

    @property
    def num_experts(self) -> int:
        """Experts to place."""
        return len(self.phases[0].alone)

    @property
    def floor_s(self) -> float:
        """A lower bound on any placement, from single experts."""
        return self.total([phase.floor_s for phase in self.phases])

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        return self.total([phase.seconds(placement) for phase in self.phases])

    def copies(self, expert: Ints, share: Floats) -> "LayerRows":
        """Return the rows of copies: `share` [items] of `expert` [items]."""
        return replace(self, phases=tuple(phase.copies(expert, share) for phase in self.phases))

    def seconds_of_shares(self, shares: Shares) -> float:
        """Return the cost of shares of experts on GPUs, [experts, gpus]."""
        return self.total([phase.seconds_of_shares(shares) for phase in self.phases])

    def total(self, durations: Sequence[float]) -> float:
        """Return the layer's seconds from its phases'."""
        return float(layer_seconds(self.objective, self.constant_s, self.phases, durations))


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
        alone=_alone(base, structure.pair_row, structure.pair_gpu, extra, structure.num_gpus),
    )


def _alone(base: Floats, pair_row: Ints, pair_gpu: Ints, extra: Floats, num_gpus: int) -> Floats:
    """Return the largest row an expert causes on a GPU by itself, [experts, gpus].

    Rows without a pair on the GPU are left out: the result is a lower bound, and tight because an
    expert's own link carries more of its traffic than any other.
    """
    alone = np.zeros((num_gpus, base.shape[1]))
    np.maximum.at(alone, pair_gpu, base[pair_row] + extra)
    return alone.T


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
