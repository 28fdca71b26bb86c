"""What a transfer between ranks takes: the one formula, for plans, simulations and measurements.

t = start  +  max over links of bytes / capacity  +  longest latency of a used path
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .hardware import hardware
from .routes import Routes

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """One transfer between all ranks: what it puts on every resource, and how long it takes."""

    bytes: Floats  # [resources]
    busy_s: Floats  # bytes / capacity, [resources]
    latency_s: float  # start and longest used path
    worst: int  # the resource that sets the time

    @property
    def seconds(self) -> float:
        """How long the transfer takes."""
        return self.latency_s + float(self.busy_s.max(initial=0.0))


def transfer_cost(
    routes: Routes,
    sent: Floats,
    start_s: float | None = None,
    path_latency_s: Floats | None = None,
) -> TransferCost:
    """Return what a transfer costs.

    Args:
        routes: between the ranks.
        sent: bytes from every rank to every rank, [ranks, ranks].
        start_s: once per transfer; None is a profile's.
        path_latency_s: of the paths that are used from end to end, any shape; None: `sent` is not
            forwarded, and its pairs are the paths.
    """
    amounts = routes.bytes_per_resource(sent)
    busy_s = amounts / routes.capacity
    if path_latency_s is None:
        path_latency_s = routes.latency_s[~np.eye(len(sent), dtype=bool) & (sent > 0)]
    start_s = hardware().latency["base"] if start_s is None else start_s
    return TransferCost(
        bytes=amounts,
        busy_s=busy_s,
        latency_s=float(start_s + path_latency_s.max(initial=0.0)),
        worst=int(busy_s.argmax()) if busy_s.size else 0,
    )
