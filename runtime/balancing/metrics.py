"""What the monitor finds, for others to read: Prometheus on a port, JSON lines in a file.

Labels are layers and ranks only, never experts: a model has thousands of them, and every label
value is a time series that Prometheus keeps. Counts by expert are in the JSON lines.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epplan.errors import InputError

from .monitor import Window

PREFIX = "epplan_"
_STEP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Totals of a run so far that are not in the counts."""

    tokens: int  # of all ranks
    dropped_rows: int  # beyond the capacity
    rebalances: int  # slot tables put into use
    moved_experts: int
    moved_bytes: int
    layers_to_move: int  # of the rebalance under way


class Metrics:
    """The metrics of one run.

    Args:
        labels: of `epplan_run_info`: what runs.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

        self.registry = CollectorRegistry()
        self._totals = Progress(
            tokens=0,
            dropped_rows=0,
            rebalances=0,
            moved_experts=0,
            moved_bytes=0,
            layers_to_move=0,
        )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=self.registry)

        Info(PREFIX + "run", "What runs.", registry=self.registry).info(labels)
        self._steps = counter("steps", "Steps.")
        self._step_seconds = Histogram(
            PREFIX + "step_seconds",
            "Seconds of a step, by the mean of a window.",
            buckets=_STEP_BUCKETS_S,
            registry=self.registry,
        )
        self._tokens = counter("tokens", "Tokens of all ranks.")
        self._max_over_mean = gauge(
            "layer_rank_rows_max_over_mean", "Busiest rank's rows over the mean.", "layer"
        )
        self._jain = gauge("layer_rank_rows_jain", "Jain's index of the ranks' rows.", "layer")
        self._idle = gauge("layer_idle_experts", "Experts without a row.", "layer")
        self._crossing = gauge(
            "layer_cross_host_share", "Share of rows whose expert is on another host.", "layer"
        )
        self._drift = gauge(
            "layer_drift", "Share of rows that go to other experts than was planned for.", "layer"
        )
        self._rank_rows = counter("rank_rows", "Rows of a rank's experts, all layers.", "rank")
        self._wait = counter(
            "rank_wait_seconds", "Seconds a rank waited for others.", "rank", "stage"
        )
        self._last = gauge(
            "rank_last_share", "Share of all-to-alls to which the rank came last.", "rank"
        )
        self._straggler = gauge("straggler_rank", "Rank the others wait for; -1 if there is none.")
        self._rebalances = counter("rebalances", "Slot tables put into use while running.")
        self._moved_experts = counter("moved_experts", "Experts moved while running.")
        self._moved_bytes = counter("moved_bytes", "Bytes of experts moved while running.")
        self._to_move = gauge("layers_to_move", "Layers of the rebalance under way.")
        self._dropped = counter("dropped_rows", "Rows dropped beyond the capacity.")

    def update(self, window: Window, progress: Progress) -> None:
        """Take over a window.

        Args:
            window: the latest.
            progress: totals of the run.
        """
        self._steps.inc(window.steps)
        for _ in range(window.steps):
            self._step_seconds.observe(window.seconds / window.steps)
        for balance, shift in zip(window.load.balance, window.drift, strict=True):
            layer = str(balance.layer)
            self._max_over_mean.labels(layer).set(balance.max_over_mean)
            self._jain.labels(layer).set(balance.jain)
            self._idle.labels(layer).set(len(balance.idle_experts))
            self._crossing.labels(layer).set(balance.cross_host_share)
            if shift is not None:
                self._drift.labels(layer).set(shift)
        for rank, rows in enumerate(map(sum, zip(*window.load.rank_load, strict=True))):
            self._rank_rows.labels(str(rank)).inc(rows)
        self._update_waits(window)
        self._update_totals(progress)

    def _update_waits(self, window: Window) -> None:
        if window.waits is None:
            return
        for stage, seconds in window.waits.seconds.items():
            for rank, waited in enumerate(map(sum, zip(*seconds, strict=True))):
                self._wait.labels(str(rank), stage).inc(waited)
        for rank, share in enumerate(window.waits.last_share):
            self._last.labels(str(rank)).set(share)
        straggler = window.waits.straggler
        self._straggler.set(-1 if straggler is None else straggler)

    def _update_totals(self, now: Progress) -> None:
        before, self._totals = self._totals, now
        self._tokens.inc(now.tokens - before.tokens)
        self._dropped.inc(now.dropped_rows - before.dropped_rows)
        self._rebalances.inc(now.rebalances - before.rebalances)
        self._moved_experts.inc(now.moved_experts - before.moved_experts)
        self._moved_bytes.inc(now.moved_bytes - before.moved_bytes)
        self._to_move.set(now.layers_to_move)


@contextmanager
def served(metrics: Metrics, port: int) -> Iterator[int]:
    """Answer Prometheus on all addresses of this host while the block runs.

    Args:
        metrics: what to answer.
        port: 0 takes a free one.

    Yields:
        The port.

    Raises:
        InputError: the port is taken.
    """
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, registry=metrics.registry)
    except OSError as error:
        raise InputError(
            f"--metrics-port {port} cannot be listened on: {error.strerror}",
            hints=["take another port"],
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check_prometheus() -> None:
    """Check that Prometheus metrics can be served.

    Raises:
        InputError: the library is missing.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise InputError(
            "--metrics-port needs prometheus-client, which is not installed",
            hints=["pip install 'epplan[metrics]'"],
        ) from None


class LineLog:
    """A file of JSON objects, one line each; a line is written whole, at once.

    Args:
        path: created, or continued.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"--metrics {path} cannot be written: {error.strerror}") from None

    def write(self, window: Window, progress: Progress) -> None:
        """Append a window."""
        line = json.dumps(window_record(window, progress), allow_nan=False)
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def window_record(window: Window, progress: Progress) -> dict[str, Any]:
    """Return a window as one JSON object."""
    waits = window.waits
    layers = [
        {
            **asdict(balance),
            "drift": window.drift[ordinal],
            "rank_rows": window.load.rank_load[ordinal],
            "expert_rows": window.load.expert_load[ordinal],
            **(
                {f"{stage}_wait_s": seconds[ordinal] for stage, seconds in waits.seconds.items()}
                if waits
                else {}
            ),
        }
        for ordinal, balance in enumerate(window.load.balance)
    ]
    return {
        "time": time.time(),
        "step": window.step,
        "steps": window.steps,
        "seconds": window.seconds,
        "last_share": waits.last_share if waits else None,
        "straggler": waits.straggler if waits else None,
        **asdict(progress),
        "layers": layers,
    }
