"""The `measured` rows of a cluster file, put on the links they were measured over.

measured:
  - {path: NVL, transfers: pairs, bandwidth: 371GB/s, latency: 12us, samples: 280, backend: nccl}

One row a path type. It replaces the efficiency of the links which that type of path is limited by;
no link gets faster than rated.
"""

from dataclasses import replace
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
    transfers: Literal["pairs", "all-to-all"]
    bandwidth: Bandwidth = Field(gt=0)
    latency: Seconds = Field(ge=0)
    samples: int = Field(gt=0)
    backend: str


def apply_measured(builder: ClusterBuilder, records: tuple[MeasuredRecord, ...]) -> None:
    """Put the rows' bandwidths on the links; of several types on one kind the slowest counts.

    Latencies go to the cluster, by path type.
    """
    builder.latency_s.update({record.path: record.latency for record in records})
    slowest: dict[LinkKind, float] = {}
    for record in records:
        kind = LIMITED_BY.get(record.path)
        if kind is not None:
            slowest[kind] = min(record.bandwidth, slowest.get(kind, record.bandwidth))
    switches = {
        name
        for name, data in builder.graph.nodes(data=True)
        if isinstance(data["node"], NetworkSwitch)
    }
    for tail, head, data in builder.graph.edges(data=True):
        link = data["link"]
        if link.kind not in slowest or not link.rated_bytes_per_s:
            continue
        if {tail, head} <= switches:
            continue  # transfers between ranks do not fill the cables between switches
        efficiency = min(1.0, slowest[link.kind] / link.rated_bytes_per_s)
        data["link"] = replace(link, efficiency=efficiency, provenance="measured")
