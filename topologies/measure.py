"""From timed transfers to measured capacities: fits by path type, and pairs slower than theirs.

A transfer takes a + bytes / b. The fit minimises relative errors, so that small messages set a and
large ones b; a path type is fitted to the median pair at each size, so that a slow pair does not
hide in it. Where all ranks share one plane (NVSwitches, shared memory) the all-to-all tells what a
port carries, and a pair alone does not.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text, validate

from .graph import Cluster, Gpu
from .host_paths import PATH_TYPES
from .measured import MeasuredRecord
from .routes import find_routes

_SHARED = ("NVL", "SHM")  # path types over a plane
Point = tuple[int, float]  # bytes, seconds


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
class SlowPair:
    """Two GPUs whose largest message is slower than the median of their path type."""

    gpus: tuple[str, str]
    path: str
    bytes_per_s: float
    median_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the times say."""

    rows: tuple[MeasuredRecord, ...]
    slow: tuple[SlowPair, ...]


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
    """Return the fits by path type and the slow pairs.

    Args:
        cluster: holds the GPUs the ranks ran on.
        times: what was timed.
        slow_below: a pair is slow below this share of its path type's median bytes/s, each at
            the largest message.

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
    points: dict[tuple[int, int], list[Point]] = defaultdict(list)
    for pair in times.pairs:
        points[pair.ranks].append((pair.bytes, pair.seconds))
    by_path: dict[str, dict[tuple[int, int], list[Point]]] = defaultdict(dict)
    for ranks, own in points.items():
        first, second = (number[gpus[rank]] for rank in ranks)
        by_path[PATH_TYPES[routes.path_type[first, second]]][ranks] = own
    rows = tuple(_row(path, pairs, times, len(by_path)) for path, pairs in by_path.items())
    slow = [
        SlowPair(
            gpus=(gpus[first], gpus[second]),
            path=path,
            bytes_per_s=rate,
            median_bytes_per_s=middle,
        )
        for path, pairs in by_path.items()
        if path != "SHM"  # no link: which core each process got decides
        for (first, second), rate, middle in _slow(pairs, slow_below)
    ]
    return Measurement(rows=rows, slow=tuple(slow))


def fit(points: Iterable[Point]) -> tuple[float, float]:
    """Return latency in s and bandwidth in bytes/s of t = a + bytes / b."""
    sizes, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    if latency < 0 or per_byte <= 0:  # one size alone, or noise: no latency can be told
        largest = sizes.argmax()
        latency, per_byte = 0.0, seconds[largest] / sizes[largest]
    return float(latency), 1 / float(per_byte)


def _row(
    path: str, pairs: dict[tuple[int, int], list[Point]], times: LinkTimes, num_paths: int
) -> MeasuredRecord:
    by_size: dict[int, list[float]] = defaultdict(list)
    for points in pairs.values():
        for size, seconds in points:
            by_size[size].append(seconds)
    is_shared = path in _SHARED and num_paths == 1 and bool(times.all_to_all)
    if is_shared:
        middle = [(row.bytes, row.seconds) for row in times.all_to_all]
    else:
        middle = [(size, median(seconds)) for size, seconds in by_size.items()]
    latency, bandwidth = fit(middle)
    return MeasuredRecord.model_validate(
        {
            "path": path,
            "transfers": "all-to-all" if is_shared else "pairs",
            "bandwidth": f"{bandwidth:.0f}B/s",
            "latency": f"{latency * 1e9:.0f}ns",
            "samples": len(middle) if is_shared else sum(map(len, by_size.values())),
            "backend": times.backend,
        }
    )


def _slow(
    pairs: dict[tuple[int, int], list[Point]], slow_below: float
) -> Iterable[tuple[tuple[int, int], float, float]]:
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
