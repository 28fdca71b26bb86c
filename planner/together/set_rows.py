"""What placements load where it matters which experts are chosen together.

A transfer's rows are linear, not in the placement but in how many tokens of each source reach each
place of one or two levels:

    load[row] = sum over levels, places and sources of
                matrix[row, place, source] x tokens of the source with some expert at the place

`direct` has one level, ranks. `node-dedup` has ranks, by what the rank that forwards to them sends,
and islands, by what crosses the network. All coefficients are at least 0. The experts' work and the
longest paths do not depend on what is chosen together: they are those of `rows`.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csc_array, csr_array, vstack

from epplan.planner.cost import Placement, Shares
from epplan.planner.forwarding import entry_ranks
from epplan.planner.objective import Objective, Timed, layer_seconds
from epplan.planner.placement.row_builder import compute_rows, distinct_resources, latency_phases
from epplan.planner.placement.rows import Floats, Ints, PhaseRows, least_with_copies
from epplan.planner.problem import Problem
from epplan.planner.token_sets import TokenSets
from epplan.topologies.routes import Routes

_ROUNDING = 1e-12  # of a matrix's largest entry: shares of flows that cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRows:
    """One transfer: the maximum over its rows.

    Attributes:
        name: dispatch, combine or both.
        window: of the traffic.
        weight: how often it counts (2 where combine is the mirror of dispatch).
        matrices: seconds a token, by level, [rows, places x sources]; column place * S + source.
        capacity: of the rows' links, to weigh rows that are added up, [rows].
        kind: of the rows' links and their direction; rows of a kind are alike, [rows].
        alone: it lasts at least this long with expert e on GPU g, [experts, gpus].
    """

    name: str
    window: int
    weight: float
    matrices: tuple[csc_array, ...]
    capacity: Floats
    kind: Ints
    alone: Floats

    @property
    def is_compute(self) -> bool:
        """A transfer is none."""
        return False

    @property
    def floor_s(self) -> float:
        """No placement makes it shorter: the expert that costs most where it costs least.

        A rank or island with an expert is reached by all tokens that choose it.
        """
        return float(self.alone.min(axis=1).max())

    def floor_with_copies(self, num_copies: int) -> float:
        """Return what it lasts at least with so many copies of all experts, shares free.

        With a share of an expert on a GPU, at least as much of the tokens that choose it go there.
        """
        return least_with_copies(self.alone.min(axis=1), self.alone.shape[1], num_copies)

    def load(self, reached: tuple[Floats, ...]) -> Floats:
        """Return every row's seconds for tokens that reach places, by level [sources, places]."""
        parts = [
            matrix @ tokens.T.ravel() for matrix, tokens in zip(self.matrices, reached, strict=True)
        ]
        total: Floats = np.sum(parts, axis=0)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLayer:
    """One layer: its tokens and all its phases.

    Attributes:
        sets: tokens, by window.
        counts: assignments of every window, [windows, sources, experts].
        place_of_gpu: of every level, [gpus] each; the first level is the GPUs themselves.
        transfers: dispatch and combine of every window.
        others: the experts' work and longest paths, linear in the placement.
        constant_s: transfers that no placement changes, [windows].
        objective: what counts.
    """

    sets: tuple[TokenSets, ...]
    counts: Floats
    place_of_gpu: tuple[Ints, ...]
    transfers: tuple[TransferRows, ...]
    others: tuple[PhaseRows, ...]
    constant_s: Floats
    objective: Objective

    @property
    def num_experts(self) -> int:
        """Experts to place."""
        return int(self.counts.shape[2])

    @property
    def phases(self) -> tuple[Timed, ...]:
        """All phases, transfers first."""
        return (*self.transfers, *self.others)

    @property
    def floor_s(self) -> float:
        """A lower bound on any placement, from single experts."""
        floors = [phase.floor_s for phase in self.transfers]
        return self.total([*floors, *(phase.floor_s for phase in self.others)])

    def floor_with_copies(self, num_copies: int) -> float:
        """A lower bound with so many copies of all experts and any shares, from single experts."""
        floors = [phase.floor_with_copies(num_copies) for phase in self.transfers]
        return self.total([*floors, *(p.floor_with_copies(num_copies) for p in self.others)])

    def reached(self, window: int, placement: Placement) -> tuple[Floats, ...]:
        """Return the tokens that reach the places of each level, [sources, places] each."""
        return tuple(
            self.sets[window].reached(place[placement], int(place.max()) + 1)
            for place in self.place_of_gpu
        )

    def durations(self, placement: Placement) -> list[float]:
        """Return the seconds of every phase for ranks of experts, [experts]."""
        reached = [self.reached(window, placement) for window in range(len(self.sets))]
        transfers = [float(t.load(reached[t.window]).max(initial=0.0)) for t in self.transfers]
        return [*transfers, *(phase.seconds(placement) for phase in self.others)]

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        return self.total(self.durations(placement))

    def seconds_of_shares(self, shares: Shares) -> float:
        """Return the cost of shares of experts on GPUs, [experts, gpus]."""
        reached = [
            tuple(
                sets.reached_by_shares(shares @ np.eye(int(place.max()) + 1)[place])
                for place in self.place_of_gpu
            )
            for sets in self.sets
        ]
        transfers = [float(t.load(reached[t.window]).max(initial=0.0)) for t in self.transfers]
        return self.total([*transfers, *(phase.seconds_of_shares(shares) for phase in self.others)])

    def total(self, durations: list[float]) -> float:
        """Return the layer's seconds from its phases'."""
        return float(layer_seconds(self.objective, self.constant_s, self.phases, durations))


class SetRowBuilder:
    """Builds the rows of any layer of a problem with token sets."""

    def __init__(self, problem: Problem) -> None:
        assert problem.sets is not None
        self._problem = problem
        routes = problem.routes
        island = routes.island
        self.place_of_gpu: tuple[Ints, ...] = (np.arange(problem.num_ranks),)
        if problem.transfer == "node-dedup":
            self.place_of_gpu += (island,)
        self._one_source = all(s.num_sources == 1 for window in problem.sets for s in window)
        kept = distinct_resources(routes) if routes.resources else []
        pairs = _seconds_of_pairs(routes, kept) * problem.model.row_bytes
        self._capacity = routes.capacity[kept]
        self._kind = _kinds(routes, kept)
        size = problem.num_ranks
        turned = (np.arange(size)[None, :] * size + np.arange(size)[:, None]).ravel()
        self._matrices = [self._by_level(pairs), self._by_level(csc_array(pairs[:, turned]))]
        self._mirrored = _mirrored(*self._matrices)

    def layer(self, layer: int) -> SetLayer:
        """Return the rows of one layer (an ordinal)."""
        problem = self._problem
        assert problem.sets is not None
        sets = tuple(window[layer] for window in problem.sets)
        counts = np.stack([of.counts(problem.model.num_experts) for of in sets])
        transfers: list[TransferRows] = []
        others: list[PhaseRows] = []
        constant_s = np.zeros(len(sets))
        for window in range(len(sets)):
            of_window = problem.counts[window, layer]
            others.append(compute_rows(problem, window, of_window))
            if problem.routes.resources:
                transfers += self._transfers(window, counts[window])
                latencies, constant_s[window] = latency_phases(problem, window, of_window)
                others += latencies
        return SetLayer(
            sets=sets,
            counts=counts,
            place_of_gpu=self.place_of_gpu,
            transfers=tuple(transfers),
            others=tuple(others),
            constant_s=constant_s,
            objective=problem.objective,
        )

    def _transfers(self, window: int, counts: Floats) -> list[TransferRows]:
        there, back = (
            TransferRows(
                name=name,
                window=window,
                weight=1.0,
                matrices=matrices,
                capacity=self._capacity,
                kind=self._kind,
                alone=_alone(matrices, self.place_of_gpu, counts),
            )
            for name, matrices in zip(("dispatch", "combine"), self._matrices, strict=True)
        )
        if self._mirrored:
            return [replace(there, weight=2.0, name="dispatch and combine")]
        return [there, back]

    def _by_level(self, pairs: csc_array) -> tuple[csc_array, ...]:
        """Return the matrices of all levels from seconds of pairs, [rows, from x to]."""
        problem, size = self._problem, self._problem.num_ranks
        home, rank = (axis.ravel() for axis in np.meshgrid(*[np.arange(size)] * 2))
        if problem.transfer == "direct":
            return (self._merged(pairs[:, home * size + rank]),)
        island = problem.routes.island
        entry = entry_ranks(island)
        sender = entry[home, island[rank]]
        num_islands = entry.shape[1]
        source, where = (
            axis.ravel() for axis in np.meshgrid(np.arange(size), np.arange(num_islands))
        )
        crossing = pairs[:, source * size + entry[source, where]]
        return (self._merged(pairs[:, sender * size + rank]), self._merged(crossing))

    def _merged(self, matrix: csc_array) -> csc_array:
        """Return the columns for the sources of the sets: the mean where all ranks are one."""
        matrix = csc_array(matrix)
        if not self._one_source:
            return matrix
        size = self._problem.num_ranks
        places = matrix.shape[1] // size
        column = np.arange(matrix.shape[1])
        mean = csr_array(
            (np.full(len(column), 1.0 / size), (column, column // size)),
            shape=(len(column), places),
        )
        return csc_array(matrix @ mean)


def _mirrored(there: tuple[csc_array, ...], back: tuple[csc_array, ...]) -> bool:
    """Tell whether combine has the rows of dispatch in any order: then one stands for both.

    Rows are matched by their loads under random tokens, which different rows do not share.
    """
    random = np.random.default_rng(0)
    for _ in range(4):
        tokens = [random.random(matrix.shape[1]) for matrix in there]
        loads = [
            sum(matrix @ some for matrix, some in zip(matrices, tokens, strict=True))
            for matrices in (there, back)
        ]
        first, second = (np.sort(np.asarray(load)) for load in loads)
        if not np.allclose(first, second, rtol=1e-9, atol=0):
            return False
    return True


def _seconds_of_pairs(routes: Routes, kept: list[int]) -> csc_array:
    """Return the seconds a byte from rank to rank takes on each resource, [rows, from x to]."""
    size = len(routes.gpus)
    rows = []
    for resource in kept:
        total = csr_array((1, size * size))
        for flow in np.flatnonzero(routes.resource_of_flow == resource).tolist():
            source, target = routes.sources[[flow]], routes.destinations[[flow]]
            index = (source.indices[:, None] * size + target.indices[None, :]).ravel()
            share = np.outer(source.data, target.data).ravel()
            total = total + csr_array(
                (share, (np.zeros_like(index), index)), shape=(1, size * size)
            )
        rows.append(total * (1.0 / routes.capacity[resource]))
    if not rows:
        return csc_array((0, size * size))
    matrix = csc_array(vstack(rows))
    # Flows that leave out pairs of an island cancel up to rounding.
    matrix.data[np.abs(matrix.data) < _ROUNDING * np.abs(matrix.data).max()] = 0.0
    matrix.eliminate_zeros()
    return matrix


def _kinds(routes: Routes, kept: list[int]) -> Ints:
    """Return a number for every row: same kind of link, same direction as seen from a GPU."""
    names = []
    for number in kept:
        resource = routes.resources[number]
        flows = np.flatnonzero(routes.resource_of_flow == number)
        ends = [len(set(m[flows].indices.tolist())) for m in (routes.sources, routes.destinations)]
        names.append((resource.link.kind, ends[0] < ends[1], ends[0] > ends[1]))
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], dtype=np.intp)


def _alone(
    matrices: tuple[csc_array, ...], place_of_gpu: tuple[Ints, ...], counts: Floats
) -> Floats:
    """Return the largest row an expert causes by itself, [experts, gpus]; counts [S, experts]."""
    num_sources = len(counts)
    alone = np.zeros((counts.shape[1], len(place_of_gpu[0])))
    for gpu in range(alone.shape[1]):
        load = np.zeros((matrices[0].shape[0], counts.shape[1]))
        for matrix, places in zip(matrices, place_of_gpu, strict=True):
            first = int(places[gpu]) * num_sources
            load += matrix[:, first : first + num_sources] @ counts
        alone[:, gpu] = load.max(axis=0, initial=0.0)
    return alone
