"""A measurement for people (tables) and for programs (one object)."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .cluster_writer import bandwidth_text
from .measure import LinkTimes, Measurement
from .units import format_bandwidth, format_time


def measurement_json(measurement: Measurement, times: LinkTimes) -> dict[str, Any]:
    """Return fits and slow pairs as JSON values."""
    return {
        "backend": times.backend,
        "device": times.device,
        "ranks": len(times.ranks),
        "classes": [
            {
                "path": row.path,
                "rated_bytes_per_s": row.rated,
                "transfers": row.transfers,
                "latency_s": row.latency,
                "bandwidth_bytes_per_s": row.bandwidth,
                "samples": row.samples,
            }
            for row in measurement.rows
        ],
        "all_to_all": [{"bytes": row.bytes, "seconds": row.seconds} for row in times.all_to_all],
        "slow": [
            {
                "gpus": list(pair.gpus),
                "path": pair.path,
                "bandwidth_bytes_per_s": pair.bytes_per_s,
                "median_bytes_per_s": pair.median_bytes_per_s,
            }
            for pair in measurement.slow
        ],
    }


def measurement_table(measurement: Measurement, times: LinkTimes) -> RenderableType:
    """Return the fits as a table, and below it the slow pairs."""
    table = Table(
        title=f"{len(times.ranks)} ranks, {times.backend} on {times.device}", title_justify="left"
    )
    for heading in ("path", "transfers", "latency", "bandwidth", "samples"):
        table.add_column(heading, justify="left" if heading in ("path", "transfers") else "right")
    for row in measurement.rows:
        latency, bandwidth = format_time(row.latency), format_bandwidth(row.bandwidth)
        path = (
            row.path
            if row.rated is None
            else f"{row.path} of {bandwidth_text(row.rated, bits=True)}"
        )
        table.add_row(path, row.transfers, latency, bandwidth, str(row.samples))
    lines = [
        f"slow: {' - '.join(pair.gpus)} ({pair.path}): {format_bandwidth(pair.bytes_per_s)}, "
        f"the median of {pair.path} is {format_bandwidth(pair.median_bytes_per_s)}"
        for pair in measurement.slow
    ]
    return Group(table, Text("\n".join(lines) or "no link is much slower than its class"))
