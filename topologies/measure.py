"""From timed transfers to measured capacities: fits by path type, and pairs slower than theirs.

A transfer takes a + bytes / b. The fit minimises relative errors, so that small messages set a and
large ones b; a path type is fitted to the median pair at each size, so that a slow pair does not
hide in it. Pairs whose slowest links are not rated alike (a slow host, an oversubscribed uplink)
are fitted apart. Where all ranks share one plane (NVSwitches, shared memory) the all-to-all tells
what a port carries, and a pair alone does not.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text, validate

from .expected import Compared, Point, compare_all_to_all, compare_pairs
from .graph import Cluster, Gpu, NetworkSwitch
from .host_paths import PATH_TYPES
from .measured import LIMITED_BY, MeasuredRecord
from .routes import Routes, find_routes

_SHARED = ("NVL", "SHM")  # path types over a plane
Ranks = tuple[int, int]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankRecord(_Record):
    """Where a rank ran: the plan's host and GPU, and the machine's own name."""

    host: str
    gpu_index: int
    machine: str


class PairTime(_Record):
    """One way between two ranks."""

    ranks: tuple[int, int]
    bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class ExchangeTime(_Record):
    """All to all; `bytes` is what a rank sends to others."""

    bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class LinkTimes(_Record):
    """The file that `epplan.runtime.link_benchmark` writes."""

    schema_version: Literal[1]
    kind: Literal["epplan-link-times"]
    backend: str
    backend_reason: str
    device: str
    repeats: int
    ranks: tuple[RankRecord, ...]
    pairs: tuple[PairTime, ...]
    all_to_all: tuple[ExchangeTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """Pairs that are fitted together; `rated` (bytes/s) only where a path type has several."""

    path: str
    rated: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowPair:
    """Two GPUs whose largest message is slower than the median of their path type and rating."""

    gpus: tuple[str, str]
    path: str
    bytes_per_s: float
    median_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the times say."""

    rows: tuple[MeasuredRecord, ...]
    slow: tuple[SlowPair, ...]
    compared: tuple[Compared, ...]  # with what the cluster said before


def read_times(path: Path) -> LinkTimes:
    """Return the times in a file.

    Raises:
        InputError: all problems of the file at once.
    """
    what = f"link times {path}"
    return parse_times(parse_yaml(read_text(path, "link times"), what), what)


def parse_times(document: Any, what: str) -> LinkTimes:
    """Return the times in a parsed document.

    Raises:
        InputError: all problems of the file at once.
    """
    times = validate(LinkTimes, document, what)
    count = len(times.ranks)
    wrong = [
        f"pair {list(pair.ranks)}: there are {count} ranks"
        for pair in times.pairs
        if not 0 <= pair.ranks[0] < pair.ranks[1] < count
    ]
    if wrong:
        raise InputError(f"{what} is not valid", problems=wrong)
    return times


def measure(cluster: Cluster, times: LinkTimes, slow_below: float) -> Measurement:
    """Return the fits by path type, the slow pairs, and all times beside the expected ones.

    Args:
        cluster: holds the GPUs the ranks ran on.
        times: what was timed.
        slow_below: a pair is slow below this share of the median bytes/s of its path type and
            rating, each at the largest message.

    Raises:
        InputError: the times are not of this cluster's links.
    """
    gpus = _gpus_of_ranks(cluster, times)
    if not times.pairs:
        raise InputError(
            f"{len(gpus)} rank has no pair to time", hints=["measure a plan with 2 ranks or more"]
        )
    routes = find_routes(cluster, gpus)
    number = {gpu: index for index, gpu in enumerate(routes.gpus)}
    points: dict[Ranks, list[Point]] = defaultdict(list)
    for pair in times.pairs:
        points[pair.ranks].append((pair.bytes, pair.seconds))
    places = {ranks: (number[gpus[ranks[0]]], number[gpus[ranks[1]]]) for ranks in points}
    paths = _by_path(cluster, routes, places)
    classes = {key: {ranks: points[ranks] for ranks in members} for key, members in paths.items()}
    num_paths = len({key.path for key in classes})
    rows = tuple(_row(key, pairs, times, num_paths) for key, pairs in classes.items())
    slow = [
        SlowPair(
            gpus=(gpus[first], gpus[second]),
            path=key.path,
            bytes_per_s=rate,
            median_bytes_per_s=middle,
        )
        for key, pairs in classes.items()
        if key.path != "SHM"  # no link: which core each process got decides
        for (first, second), rate, middle in _slow(pairs, slow_below)
    ]
    compared = [
        row
        for members in paths.values()
        for row in compare_pairs(routes, {places[ranks]: points[ranks] for ranks in members})
    ]
    compared += compare_all_to_all(routes, [(row.bytes, row.seconds) for row in times.all_to_all])
    return Measurement(rows=rows, slow=tuple(slow), compared=tuple(compared))


def fit(points: Iterable[Point]) -> tuple[float, float]:
    """Return latency in s and bandwidth in bytes/s of t = a + bytes / b."""
    sizes, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    if latency < 0 or per_byte <= 0:  # one size alone, or noise: no latency can be told
        largest = sizes.argmax()
        latency, per_byte = 0.0, seconds[largest] / sizes[largest]
    return float(latency), 1 / float(per_byte)


def _by_path(
    cluster: Cluster, routes: Routes, places: dict[Ranks, Ranks]
) -> dict[_Class, list[Ranks]]:
    """Return the pairs of every path type, by rating where links that limit it differ in it.

    Args:
        cluster: the cluster.
        routes: the routes.
        places: numbers of a pair's GPUs in `routes`.
    """
    rated = _rated_bytes_per_s(routes)
    found: dict[str, dict[int, list[Ranks]]] = defaultdict(lambda: defaultdict(list))
    for ranks, place in places.items():
        path = PATH_TYPES[routes.path_type[place]]
        rating = round(rated[place]) if np.isfinite(rated[place]) else 0
        found[path][rating].append(ranks)
    if len(found) == 1 and (path := next(iter(found))) in _SHARED:
        return {_Class(path=path, rated=None): list(places)}
    return {
        _Class(
            path=path,
            rated=rating if ratings.keys() | _ratings(cluster, path) != {rating} else None,
        ): members
        for path, ratings in found.items()
        for rating, members in sorted(ratings.items(), reverse=True)
    }


def _ratings(cluster: Cluster, path: str) -> set[int]:
    """Return the ratings of the links that limit a type of path, but for those between switches."""
    return {
        round(link.rated_bytes_per_s)
        for tail, head, link in cluster.links()
        if link.kind == LIMITED_BY.get(path)
        and link.rated_bytes_per_s
        and not all(isinstance(cluster.node(end), NetworkSwitch) for end in (tail, head))
    }


def _rated_bytes_per_s(routes: Routes) -> npt.NDArray[np.float64]:
    """Return the rating of the slowest link between GPUs that limits their type of path, [G, G].

    A link that carries only a share of a pair's bytes counts as that much faster.
    """
    slowest = np.full(routes.path_type.shape, np.inf)
    for flow, resource in enumerate(routes.resource_of_flow.tolist()):
        link = routes.resources[resource].link
        here, there = routes.sources[[flow]], routes.destinations[[flow]]
        block = np.ix_(here.indices, there.indices)
        limits = np.array([LIMITED_BY.get(path) == link.kind for path in PATH_TYPES])
        share = here.data[:, None] * there.data[None, :]
        is_limit = limits[routes.path_type[block]] & (share > 0)
        rated = link.rated_bytes_per_s / np.where(is_limit, share, 1.0)
        slowest[block] = np.where(is_limit, np.minimum(slowest[block], rated), slowest[block])
    return slowest


def _row(
    key: _Class, pairs: dict[Ranks, list[Point]], times: LinkTimes, num_paths: int
) -> MeasuredRecord:
    by_size: dict[int, list[float]] = defaultdict(list)
    for points in pairs.values():
        for size, seconds in points:
            by_size[size].append(seconds)
    is_shared = key.path in _SHARED and num_paths == 1 and bool(times.all_to_all)
    if is_shared:
        middle = [(row.bytes, row.seconds) for row in times.all_to_all]
    else:
        middle = [(size, median(seconds)) for size, seconds in by_size.items()]
    latency, bandwidth = fit(middle)
    return MeasuredRecord.model_validate(
        {
            "path": key.path,
            "rated": None if key.rated is None else f"{key.rated}B/s",
            "transfers": "all-to-all" if is_shared else "pairs",
            "bandwidth": f"{bandwidth:.0f}B/s",
            "latency": f"{latency * 1e9:.0f}ns",
            "samples": len(middle) if is_shared else sum(map(len, by_size.values())),
            "backend": times.backend,
        }
    )


def _slow(
    pairs: dict[Ranks, list[Point]], slow_below: float
) -> Iterable[tuple[Ranks, float, float]]:
    largest = {ranks: max(points) for ranks, points in pairs.items()}
    rates = {ranks: size / seconds for ranks, (size, seconds) in largest.items()}
    middle = median(rates.values())
    for ranks, rate in rates.items():
        if rate < slow_below * middle:
            yield ranks, rate, middle


def _gpus_of_ranks(cluster: Cluster, times: LinkTimes) -> list[str]:
    """Return the GPU of every rank, after checking that the ranks were where the cluster says."""
    known: dict[tuple[str, int], Gpu] = {(gpu.host, gpu.index): gpu for gpu in cluster.gpus()}
    missing = [
        f"{rank.host}/gpu{rank.gpu_index}"
        for rank in times.ranks
        if (rank.host, rank.gpu_index) not in known
    ]
    if missing:
        raise InputError(f"{cluster.name} has no {', '.join(missing[:5])}, which ranks ran on")
    machines: dict[str, str] = {}
    for rank in times.ranks:
        other = machines.setdefault(rank.machine, rank.host)
        if other != rank.host:
            raise InputError(
                f"ranks of hosts {other} and {rank.host} ran on one machine, {rank.machine}: its "
                "memory was timed, not the network"
            )
    gpus = [known[rank.host, rank.gpu_index] for rank in times.ranks]
    real = [gpu for gpu in gpus if gpu.profile is None or gpu.profile.fabric != "memory"]
    if real and times.backend != "nccl":
        raise InputError(
            f"{times.backend} moved data between CPUs, but {real[0].id} is a GPU: its links were "
            "not timed",
            problems=[f"why {times.backend}: {times.backend_reason}"],
        )
    return [gpu.id for gpu in gpus]
