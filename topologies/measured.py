"""The `measured` rows of a cluster file, put on the links they were measured over.

measured:
  - {path: NVL, transfers: pairs, bandwidth: 371GB/s, latency: 12us, samples: 280, backend: nccl}

One row a path type. It replaces the efficiency of the links which that type of path is limited by;
no link gets faster than rated. Where the slowest links of a type's paths are not all rated alike, a
row each with `rated`: what these links reach of their rating, links of a rating that no row has
reach as well, on average.

  - {path: NET, rated: 200Gb/s, transfers: pairs, bandwidth: 22GB/s, ...}
  - {path: NET, rated: 50Gb/s, transfers: pairs, bandwidth: 5.6GB/s, ...}
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .graph import ClusterBuilder, LinkKind, NetworkSwitch
from .hardware import Bandwidth, Seconds

# The links that limit a type of path; NVB is two NVLinks, each measured by NVL.
LIMITED_BY: dict[str, LinkKind] = {
    "NVL": "nvlink",
    "SHM": "shm",
    "PIX": "pcie",
    "PXB": "pcie",
    "PHB": "pcie",
    "SYS": "numa",
    "NET": "net",
}


class MeasuredRecord(BaseModel):
    """Latency and bandwidth of one path type: time = latency + bytes / bandwidth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Literal["NVL", "NVB", "SHM", "PIX", "PXB", "PHB", "SYS", "NET"]
    rated: Bandwidth | None = Field(default=None, gt=0)  # of the slowest link on the way
    transfers: Literal["pairs", "all-to-all"]
    bandwidth: Bandwidth = Field(gt=0)
    latency: Seconds = Field(ge=0)
    samples: int = Field(gt=0)
    backend: str


@dataclass(slots=True)
class _Rates:
    """What was measured over links of one kind; of several path types the slowest counts."""

    for_all: float = float("inf")  # bytes/s of a link
    share: dict[int, float] = field(default_factory=dict)  # of the rating, by rating

    def add(self, record: MeasuredRecord) -> None:
        if record.rated is None:
            self.for_all = min(self.for_all, record.bandwidth)
        else:
            share = min(1.0, record.bandwidth / record.rated)
            rated = round(record.rated)
            self.share[rated] = min(share, self.share.get(rated, share))

    def efficiency(self, rated: float, between_switches: bool) -> float | None:
        """Return what a link reaches of its rating, None where the rows do not tell."""
        if round(rated) in self.share:
            return self.share[round(rated)]
        if between_switches:
            return None  # transfers between ranks do not fill the cables between switches
        if self.share:
            return median(self.share.values())
        return min(1.0, self.for_all / rated)


def apply_measured(builder: ClusterBuilder, records: tuple[MeasuredRecord, ...]) -> None:
    """Put the rows' bandwidths on the links, and their latencies, by path type, on the cluster."""
    rates: dict[LinkKind, _Rates] = defaultdict(_Rates)
    for record in records:
        longest = max(record.latency, builder.latency_s.get(record.path, 0.0))
        builder.latency_s[record.path] = longest
        if (kind := LIMITED_BY.get(record.path)) is not None:
            rates[kind].add(record)
    switches = {
        name
        for name, data in builder.graph.nodes(data=True)
        if isinstance(data["node"], NetworkSwitch)
    }
    for tail, head, data in builder.graph.edges(data=True):
        link = data["link"]
        if link.kind not in rates or not link.rated_bytes_per_s:
            continue
        efficiency = rates[link.kind].efficiency(link.rated_bytes_per_s, {tail, head} <= switches)
        if efficiency is not None:
            data["link"] = replace(link, efficiency=efficiency, provenance="measured")
