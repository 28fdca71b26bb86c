"""A measurement for people (tables) and for programs (one object)."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .cluster_writer import bandwidth_text
from .measure import LinkTimes, Measurement
from .units import format_bandwidth, format_bytes, format_time


def measurement_json(measurement: Measurement, times: LinkTimes) -> dict[str, Any]:
    """Return fits, times beside the expected ones, and slow pairs as JSON values."""
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
        "compared": [
            {
                "path": row.path,
                "transfers": row.transfers,
                "bytes": row.bytes,
                "measured_s": row.measured_s,
                "expected_s": row.expected_s,
            }
            for row in measurement.compared
        ],
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
    """Return the fits, every size beside what the topology expected, and the slow pairs."""
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
    text = Text("\n".join(lines) or "no link is much slower than its class")
    return Group(table, Text(), _compared_table(measurement), Text(), text)


def _compared_table(measurement: Measurement) -> Table:
    table = Table(title="beside what the topology said before", title_justify="left")
    for heading in ("path", "transfers", "bytes", "measured", "expected", "expected / measured"):
        table.add_column(heading, justify="left" if heading in ("path", "transfers") else "right")
    for row in measurement.compared:
        table.add_row(
            row.path,
            row.transfers,
            format_bytes(row.bytes),
            format_time(row.measured_s),
            format_time(row.expected_s),
            f"{row.expected_over_measured:.2f}",
        )
    return table
