"""What a step used up: seconds and bytes by resource, FLOPs and HBM bytes by rank."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.routes import Routes
from epplan.topologies.transfer_cost import TransferCost

from .events import Ints, Task
from .work import Work

Floats = npt.NDArray[np.float64]
At = tuple[int, int]  # layer and micro-batch


class Ledger:
    """Collects tasks in issue order, and everything they use.

    Args:
        routes: of the group; its resources are the ones transfers use.
        compute_factor: on all computing.
    """

    def __init__(self, routes: Routes, compute_factor: float) -> None:
        self.routes = routes
        self._compute_factor = compute_factor
        self.num_ranks = len(routes.gpus)
        self.tasks: list[Task] = []
        self.work = Work.nothing(self.num_ranks)
        self.resource_bytes = np.zeros(len(routes.resources))
        self.resource_busy_s = np.zeros(len(routes.resources))
        self.latency_s = 0.0

    def compute(
        self,
        name: str,
        work: Work,
        after: tuple[int, ...],
        at: At,
        ranks: Ints | None = None,
    ) -> int:
        """Issue computing on all ranks, or on some, and return the task's number."""
        self.work += work
        seconds = work.seconds * self._compute_factor
        if ranks is not None:
            seconds = _only(seconds, ranks)
        return self._issue(name, "compute", seconds, after, None, at)

    def transfer(
        self,
        name: str,
        cost: TransferCost,
        after: tuple[int, ...],
        at: At,
        ranks: Ints | None = None,
        stream: str = "network",
    ) -> int:
        """Issue a collective of all ranks, or of some, and return the task's number."""
        self.resource_bytes += cost.bytes
        self.resource_busy_s += cost.busy_s
        self.latency_s += cost.latency_s
        seconds = np.full(self.num_ranks, cost.seconds)
        if ranks is not None:
            seconds = _only(seconds, ranks)
        group = np.zeros(self.num_ranks, dtype=np.intp)
        return self._issue(name, stream, seconds, after, group, at)

    def _issue(
        self,
        name: str,
        stream: str,
        seconds: Floats,
        after: tuple[int, ...],
        group: Ints | None,
        at: At,
    ) -> int:
        self.tasks.append(
            Task(
                name=name,
                stream=stream,
                seconds=seconds,
                after=after,
                group=group,
                layer=at[0],
                micro_batch=at[1],
            )
        )
        return len(self.tasks) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Everything that is issued for some steps, one after another.

    Attributes:
        ledger: its tasks and what they use.
        last_of_step: number of every step's last task, plus one.
    """

    ledger: Ledger
    last_of_step: tuple[int, ...]


def _only(seconds: Floats, ranks: Ints) -> Floats:
    of_some = np.full_like(seconds, np.nan)
    of_some[ranks] = seconds[ranks]
    return of_some
