"""Which GPUs form the groups: a few ways to line hosts up, then exchanges while the price falls.

Hosts of one kind in one place are interchangeable, so an exchange is tried once for every kind of
host on either side, not for every pair of hosts. The effort is a number of prices, never a time:
the same cluster gives the same groups on any machine.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from epplan.topologies.graph import Gpu

from .group_price import GroupLoad, Price, Pricer
from .pool import Pool

_STARTS = 3  # best line-ups that are improved
_WORK = 1e7  # flows x prices of one descent
_LEAST_PRICES = 200
_SIGNIFICANT = 1 - 1e-9
_SPARE = -1
_EXCHANGED = " + exchanges"

Assignment = tuple[tuple[int, ...], ...]  # GPUs of every group, ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Groups with their price."""

    groups: tuple[GroupLoad, ...]
    price: Price
    found_by: str


def gpus_of(pool: Pool, found: Found) -> tuple[tuple[Gpu, ...], ...]:
    """Return the GPUs of every group in rank order, groups by their first GPU."""
    ordered = sorted(found.groups, key=lambda group: int(group.gpus[0]))
    return tuple(tuple(pool.gpus[number] for number in group.gpus.tolist()) for group in ordered)


def search_groups(pricer: Pricer, size: int, num_groups: int) -> list[Found]:
    """Return the groups found, by price, then the first GPUs in cluster order to compare with.

    Args:
        pricer: prices groups.
        size: GPUs of a group.
        num_groups: how many groups.
    """
    starts = [
        _found(pricer, groups, name)
        for groups, name in _line_ups(_Hosts(pricer.pool), size, num_groups).items()
    ]
    ranked = sorted(starts, key=lambda found: found.price)  # stable: the first of equals
    improved = [_descend(pricer, start) for start in ranked[:_STARTS]]
    distinct: dict[Assignment, Found] = {}
    for found in sorted([*ranked, *improved], key=lambda found: found.price):
        distinct.setdefault(tuple(tuple(group.gpus.tolist()) for group in found.groups), found)
    return [*distinct.values(), starts[0]]


def _found(pricer: Pricer, groups: Assignment, name: str) -> Found:
    loads = tuple(pricer.load(np.array(gpus, dtype=np.intp)) for gpus in groups)
    return Found(groups=loads, price=pricer.price(loads), found_by=name)


class _Hosts:
    """The hosts of a pool: their GPUs, the better ones first, and what kind of host each is."""

    def __init__(self, pool: Pool) -> None:
        members: dict[str, list[int]] = defaultdict(list)
        for number, gpu in enumerate(pool.gpus):
            members[gpu.host].append(number)
        self.gpus = [_best_first(pool, gpus) for gpus in members.values()]
        islands: dict[int, set[str]] = defaultdict(set)
        for gpu, island in zip(pool.gpus, pool.routes.island.tolist(), strict=True):
            islands[island].add(gpu.host)
        self.kind = [_kind(pool, gpus, islands) for gpus in self.gpus]
        self.speed = [_speed(pool, gpus) for gpus in self.gpus]
        region = pool.levels[min(1, len(pool.levels) - 1)].region if pool.levels else None
        self.region = [0 if region is None else int(region[gpus[0]]) for gpus in self.gpus]


def _best_first(pool: Pool, gpus: list[int]) -> list[int]:
    """Return a host's GPUs so that the first of them share as few NICs as can be."""
    left, ordered = list(gpus), list[int]()
    used: dict[tuple[str, ...], int] = defaultdict(int)
    while left:
        best = min(left, key=lambda gpu: (used[pool.routes.nics[gpu]], *_slowness(pool, gpu), gpu))
        used[pool.routes.nics[best]] += 1
        ordered.append(best)
        left.remove(best)
    return ordered


def _slowness(pool: Pool, gpu: int) -> tuple[float, float, float]:
    return -float(pool.flops_per_s[gpu]), -float(pool.out.rate[gpu]), -float(pool.out.port[gpu])


def _speed(pool: Pool, gpus: list[int]) -> tuple[float, float, float]:
    """Return what makes a host slow, least first."""
    columns = zip(*(_slowness(pool, gpu) for gpu in gpus), strict=True)
    nics = {nic for gpu in gpus for nic in pool.routes.nics[gpu]}
    flops, rate, port = (max(column) for column in columns)
    return flops, rate * len(nics) / len(gpus), port


def _kind(pool: Pool, gpus: list[int], islands: dict[int, set[str]]) -> tuple[object, ...]:
    island = int(pool.routes.island[gpus[0]])
    parts = [
        (
            *_slowness(pool, gpu),
            float(pool.hbm_bytes_per_s[gpu]),
            pool.gpus[gpu].memory_bytes,
            pool.leafs[gpu],
            len(pool.routes.nics[gpu]),
        )
        for gpu in gpus
    ]
    return (island if len(islands[island]) > 1 else None, *parts)


def _line_ups(hosts: _Hosts, size: int, num_groups: int) -> dict[Assignment, str]:
    """Return groups cut from hosts in several orders, with so many GPUs of each host, by name.

    The first is the first GPUs in cluster order.
    """
    line_ups: dict[Assignment, str] = {}
    widest = max(map(len, hosts.gpus))
    for (name, order), per_host in product(_orders(hosts), _halves(widest)):
        taken = _take(hosts, order, per_host, size * num_groups)
        groups = tuple(
            tuple(sorted(taken[group * size : (group + 1) * size])) for group in range(num_groups)
        )
        line_ups.setdefault(groups, name)
    return line_ups


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


def _take(hosts: _Hosts, order: Sequence[int], per_host: int, number: int) -> list[int]:
    """Return the first GPUs of hosts in order, at most `per_host` of each before any gets more."""
    taken: list[int] = []
    for first in range(0, max(map(len, hosts.gpus)), per_host):
        for host in order:
            chosen = hosts.gpus[host][first : first + per_host]
            taken += sorted(chosen) if per_host >= len(hosts.gpus[host]) else chosen
            if len(taken) >= number:
                return taken[:number]
    return taken


def _orders(hosts: _Hosts) -> list[tuple[str, list[int]]]:
    """Return orders of hosts with their names."""
    in_order = range(len(hosts.gpus))
    fastest = sorted(in_order, key=lambda host: hosts.speed[host])
    regions: dict[int, list[int]] = defaultdict(list)
    for host in fastest:
        regions[hosts.region[host]].append(host)
    largest = sorted(
        regions.values(),
        key=lambda members: (hosts.speed[members[0]], -sum(len(hosts.gpus[h]) for h in members)),
    )
    rounds = max(map(len, largest))
    return [
        ("cluster order", list(in_order)),
        ("fastest hosts", fastest),
        ("region by region", [host for members in largest for host in members]),
        (
            "spread over regions",
            [members[x] for x in range(rounds) for members in largest if x < len(members)],
        ),
    ]


def _descend(pricer: Pricer, start: Found) -> Found:
    """Exchange GPUs between groups, or with spare ones, while the price falls."""
    budget = max(_LEAST_PRICES, int(_WORK / max(pricer.num_flows, 1)))
    best, improved = start, True
    while improved:
        improved = False
        for candidate in exchanges(pricer, best):
            budget -= 1
            if _is_less(candidate.price, best.price):
                best, improved = candidate, True
            if improved or budget <= 0:
                break
        if budget <= 0:
            break
    return best


def _slowest_first(pricer: Pricer, found: Found) -> list[int]:
    seconds = pricer.seconds_of_groups(found.groups)
    return sorted(range(len(seconds)), key=lambda number: -seconds[number])


def _is_less(price: Price, other: Price) -> bool:
    """Tell whether a price is lower by more than rounding."""
    for mine, theirs in (
        (price.shortage, other.shortage),
        (price.seconds, other.seconds),
        (price.crowding, other.crowding),
    ):
        if mine < theirs * _SIGNIFICANT:
            return True
        if mine * _SIGNIFICANT > theirs:
            return False
    return False


def exchanges(pricer: Pricer, found: Found) -> Iterator[Found]:
    """Yield what one exchange makes of the groups, those of the slowest group first."""
    hosts = _Hosts(pricer.pool)
    for number in _slowest_first(pricer, found):
        for out, into, other in _exchanges(hosts, found.groups, number):
            leaving, coming = np.array(out, dtype=np.intp), np.array(into, dtype=np.intp)
            groups = list(found.groups)
            groups[number] = pricer.exchanged(groups[number], leaving, coming)
            if other != _SPARE:
                groups[other] = pricer.exchanged(groups[other], coming, leaving)
            name = found.found_by.removesuffix(_EXCHANGED) + _EXCHANGED
            yield Found(groups=tuple(groups), price=pricer.price(groups), found_by=name)


def _exchanges(
    hosts: _Hosts, groups: Sequence[GroupLoad], number: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Yield GPUs that may leave a group, as many that may come, and their group (_SPARE: none).

    As many as both hosts have first, then half as many, down to every pair of single GPUs.
    """
    bundles = _bundles(hosts, groups)
    own = [gpus for group, gpus in bundles if group == number]
    others = [(group, gpus) for group, gpus in bundles if group != number]
    widest = max(map(len, hosts.gpus))
    for share in (2**power for power in range(widest.bit_length())):
        for leaving, (group, coming) in product(own, others):
            most = min(len(leaving), len(coming))
            count = most // share
            if count > 1:
                yield leaving[-count:], coming[:count], group
            elif count:
                yield from (([out], [into], group) for out in leaving for into in coming)


def _bundles(hosts: _Hosts, groups: Sequence[GroupLoad]) -> list[tuple[int, list[int]]]:
    """Return a host's GPUs in one group, with the group, once for every kind of host and use."""
    owner = np.full(sum(map(len, hosts.gpus)), _SPARE)
    for number, group in enumerate(groups):
        owner[group.gpus] = number
    bundles: dict[tuple[object, ...], tuple[int, list[int]]] = {}
    for kind, gpus in zip(hosts.kind, hosts.gpus, strict=True):
        owners = owner[gpus].tolist()
        for group in dict.fromkeys(owners):
            members = [gpu for gpu, own in zip(gpus, owners, strict=True) if own == group]
            bundles.setdefault((*kind, *owners, group), (group, members))
    return list(bundles.values())
