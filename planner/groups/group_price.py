"""What an EP group costs before its experts are placed: even traffic on the evaluator's links.

Every rank sends as much to every other, which a good placement comes close to; on top of that the
hottest experts sit on the group's fastest GPUs. Where several groups use a link each has an equal
share of it. A price only orders groups: what is proven comes from `planner.choice_bound`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from epplan.planner.model import ModelSpec
from epplan.topologies.routes import Routes

from .pool import Direction, Floats, Ints, Pool

_UNUSED = 1e-9  # of the largest load on a link: less is rounding


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Price:
    """How good groups are, compared in this order.

    Attributes:
        shortage: pairs without a path, and experts that find no memory.
        seconds: of the slowest group.
        crowding: of all links of all groups, with most weight on the slowest: it still tells
            groups apart where another cost hides their links.
    """

    shortage: float
    seconds: float
    crowding: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLoad:
    """One group's GPUs, and its weight in every flow at either end."""

    gpus: Ints  # numbers in the pool
    sources: Floats  # [flows]
    destinations: Floats


class Pricer:
    """Prices groups of one size out of a pool."""

    def __init__(
        self,
        pool: Pool,
        model: ModelSpec,
        counts: Floats,
        experts_per_gpu: int,
        slots: npt.NDArray[np.int64],
    ) -> None:
        """Prepare.

        Args:
            pool: the GPUs.
            model: the model.
            counts: assignments of a step by rank of the group, [layers, ranks, experts].
            experts_per_gpu: most experts of a layer on a GPU.
            slots: most experts of all layers together in every GPU's memory, [gpus].
        """
        self.pool = pool
        self._model = model
        self._size = counts.shape[1]
        self._per_gpu = experts_per_gpu
        self._slots = np.minimum(slots, experts_per_gpu * model.num_moe_layers)
        self._lost = pool.unreachable if pool.unreachable.any() else None
        by_expert = np.sort(counts.sum(axis=1), axis=1)[:, ::-1]
        self._hottest, self._times = np.unique(by_expert, axis=0, return_counts=True)
        self._host = _numbered([gpu.host for gpu in pool.gpus])
        self._latency = _between_hosts(pool.routes.latency_s, self._host)
        routes = pool.routes
        kept = distinct_resources(routes)
        flows = np.flatnonzero(np.isin(routes.resource_of_flow, kept))
        self._resource = np.searchsorted(kept, routes.resource_of_flow[flows])
        self._capacity = routes.capacity[kept]
        self._sources = csc_array(routes.sources[flows])
        self._destinations = csc_array(routes.destinations[flows])

    @property
    def num_flows(self) -> int:
        """Flows that are looked at for every price."""
        return len(self._resource)

    def load(self, gpus: Ints) -> GroupLoad:
        """Return what a group of these GPUs puts on the flows."""
        chosen = np.zeros(len(self.pool.gpus))
        chosen[gpus] = 1.0
        return GroupLoad(
            gpus=gpus,
            sources=self._sources @ chosen,
            destinations=self._destinations @ chosen,
        )

    def exchanged(self, group: GroupLoad, out: Ints, into: Ints) -> GroupLoad:
        """Return the group with some GPUs exchanged."""
        sources, destinations = group.sources.copy(), group.destinations.copy()
        for gpus, sign in ((out, -1.0), (into, 1.0)):
            for gpu in gpus.tolist():
                for matrix, weights in (
                    (self._sources, sources),
                    (self._destinations, destinations),
                ):
                    here = slice(matrix.indptr[gpu], matrix.indptr[gpu + 1])
                    weights[matrix.indices[here]] += sign * matrix.data[here]
        kept = group.gpus[~np.isin(group.gpus, out)]
        return GroupLoad(
            gpus=np.sort(np.concatenate([kept, into])), sources=sources, destinations=destinations
        )

    def price(self, groups: Sequence[GroupLoad]) -> Price:
        """Return the price of all groups together."""
        seconds = self.seconds_per_link(groups)
        worst = np.maximum(seconds.max(axis=1, initial=0.0), np.finfo(float).tiny)
        crowding = worst * ((seconds / worst[:, None]) ** 8).sum(axis=1) ** (1 / 8)
        return Price(
            shortage=sum(map(self._shortage, groups)),
            seconds=max(self._seconds(groups, seconds)),
            crowding=float(crowding.sum()),
        )

    def seconds_of_groups(self, groups: Sequence[GroupLoad]) -> list[float]:
        """Return the price of every group, in seconds."""
        return self._seconds(groups, self.seconds_per_link(groups))

    def seconds_per_link(self, groups: Sequence[GroupLoad]) -> Floats:
        """Return seconds on every link if a byte goes between any two ranks, [groups, links]."""
        loads = np.array(
            [
                np.bincount(
                    self._resource,
                    group.sources * group.destinations,
                    minlength=len(self._capacity),
                )
                for group in groups
            ]
        )
        loads[loads < _UNUSED * self._size**2] = 0.0
        users = np.maximum(np.count_nonzero(loads, axis=0), 1)
        shared: Floats = loads * users / self._capacity
        return shared

    def _seconds(self, groups: Sequence[GroupLoad], seconds: Floats) -> list[float]:
        worst = seconds.max(axis=1, initial=0.0)
        return [self._group(group, float(x)) for group, x in zip(groups, worst, strict=True)]

    def _group(self, group: GroupLoad, worst_link: float) -> float:
        model, gpus = self._model, group.gpus
        rows = self._hottest.sum(axis=1) / self._size**2  # between two ranks, [layers]
        even = rows * model.row_bytes * worst_link
        total = self._matched(self.pool.flops_per_s[gpus]) * model.expert_flops_per_row
        most = -(-self._hottest.shape[1] // self._size)
        reading = most * model.expert_bytes / self.pool.hbm_bytes_per_s[gpus].min()
        total = np.maximum(total, reading)
        for direction in (self.pool.into, self.pool.out):
            hot = self._matched(self._speeds(direction, gpus)) * model.row_bytes
            total = total + np.maximum(even, hot)
        hosts = np.unique(self._host[gpus])
        latency = 2 * float(self._latency[np.ix_(hosts, hosts)].max())
        return float(((total + latency) * self._times).sum())

    def _speeds(self, direction: Direction, gpus: Ints) -> Floats:
        """Return rows x bytes/s at which each GPU takes an expert's traffic, [group]."""
        island = self.pool.routes.island[gpus]
        _, place, members = np.unique(island, return_inverse=True, return_counts=True)
        far = 1.0 - members[place] / len(gpus)
        rate = direction.rate[gpus]
        network = np.divide(rate, far, out=np.full(len(gpus), np.inf), where=far > 0)
        speeds: Floats = np.minimum(network, direction.port[gpus])
        return speeds

    def _matched(self, speeds: Floats) -> Floats:
        """Return, by layer, the slowest when the hottest experts get the fastest GPUs, [layers]."""
        fastest = np.sort(speeds)[::-1]
        at = np.minimum(np.arange(self._hottest.shape[1]) // self._per_gpu, len(speeds) - 1)
        speed = np.maximum(fastest[at], 1e-9)
        slowest: Floats = (self._hottest / speed).max(axis=1)
        return slowest

    def _shortage(self, group: GroupLoad) -> float:
        needed = self._model.num_moe_layers * self._model.num_experts
        missing = max(0.0, float(needed - self._slots[group.gpus].sum()))
        if self._lost is not None:
            missing += float(self._lost[np.ix_(group.gpus, group.gpus)].sum())
        return missing


def distinct_resources(routes: Routes) -> Ints:
    """Return the resources that can be the slowest: one of those that always carry the same.

    They are found by what they carry under two random kinds of traffic.
    """
    random = np.random.default_rng(0)
    first, second = random.random((2, len(routes.gpus), 2))
    per_flow = (routes.sources @ first) * (routes.destinations @ second)  # [flows, 2]
    carried = np.zeros((len(routes.capacity), 2))
    np.add.at(carried, routes.resource_of_flow, per_flow)
    kept: dict[tuple[float, float], int] = {}
    for resource in np.argsort(routes.capacity, kind="stable").tolist():
        key = float(f"{carried[resource, 0]:.9g}"), float(f"{carried[resource, 1]:.9g}")
        kept.setdefault(key, resource)
    return np.array(sorted(kept.values()), dtype=np.intp)


def _between_hosts(latency_s: Floats, host: Ints) -> Floats:
    """Return the longest latency between two hosts, [hosts, hosts]."""
    num_hosts = int(host.max()) + 1
    rows = np.zeros((num_hosts, latency_s.shape[1]))
    np.maximum.at(rows, host, latency_s)
    longest = np.zeros((num_hosts, num_hosts))
    np.maximum.at(longest.T, host, rows.T)
    return longest


def _numbered(names: Sequence[str]) -> Ints:
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.intp)
