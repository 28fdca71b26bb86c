"""The event simulation: tasks on the streams of every rank.

A stream runs its tasks in the order they were issued, as CUDA streams and communicators do. A task
begins on a rank when its stream is free there and the tasks it waits for have ended there; a
collective begins when that is so on all ranks of its group.

    begin[rank] = max(end of the stream's last task, end of what it waits for)
    end[rank]   = begin[rank] + seconds[rank]

Issue order is known beforehand, so one pass over the tasks in that order is the whole simulation:
every event time is the maximum of earlier ones, for all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece of work on one stream of some ranks.

    Attributes:
        name: what it is, without its layer and micro-batch.
        stream: where it runs.
        seconds: on every rank, [ranks]; nan where the rank has no part in it.
        after: numbers of the tasks it waits for, all earlier.
        group: of every rank if it is a collective, [ranks]: ranks of one group begin together.
        layer: of the model.
        micro_batch: which one.
    """

    name: str
    stream: str
    seconds: Floats
    after: tuple[int, ...] = ()
    group: Ints | None = None
    layer: int = 0
    micro_batch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When every task ran.

    Attributes:
        tasks: in issue order, T of them.
        begin: [T, ranks]; nan where a rank has no part.
        end: [T, ranks].
    """

    tasks: tuple[Task, ...]
    begin: Floats
    end: Floats

    @property
    def seconds(self) -> float:
        """When the last task ends."""
        return float(np.nanmax(self.end, initial=0.0))

    def busy_s(self, stream: str) -> Floats:
        """Return the seconds a stream works, [ranks]."""
        total = np.zeros(self.end.shape[1])
        for task in self.tasks:
            if task.stream == stream:
                total += np.nan_to_num(task.seconds)
        return total


def run(tasks: Sequence[Task], num_ranks: int) -> Timeline:
    """Return when every task runs.

    Args:
        tasks: in the order in which they are issued.
        num_ranks: ranks.
    """
    begin = np.full((len(tasks), num_ranks), np.nan)
    end = np.full((len(tasks), num_ranks), np.nan)
    free: dict[str, Floats] = {}
    for number, task in enumerate(tasks):
        present = ~np.isnan(task.seconds)
        ready = free.setdefault(task.stream, np.zeros(num_ranks)).copy()
        for earlier in task.after:
            assert earlier < number, "a task waits for earlier ones"
            ready = np.fmax(ready, end[earlier])
        if task.group is not None:
            together = np.zeros(int(task.group.max()) + 1)
            np.maximum.at(together, task.group[present], ready[present])
            ready = together[task.group]
        begin[number, present] = ready[present]
        end[number, present] = ready[present] + task.seconds[present]
        free[task.stream] = np.where(present, end[number], free[task.stream])
    return Timeline(tasks=tuple(tasks), begin=begin, end=end)


def in_one_stream(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks without overlap: a rank computes or takes part in a collective.

    What joins the stages of a pipeline keeps its own streams.
    """
    return [
        Task(
            name=task.name,
            stream="all" if task.stream in ("compute", "network") else task.stream,
            seconds=task.seconds,
            after=task.after,
            group=task.group,
            layer=task.layer,
            micro_batch=task.micro_batch,
        )
        for task in tasks
    ]
