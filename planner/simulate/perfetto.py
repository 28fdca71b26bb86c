"""A timeline in Chrome's trace format, which ui.perfetto.dev opens: a process a rank, a thread a
stream.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from epplan.files import write_atomically

from .events import Timeline


def write_trace(path: Path, timeline: Timeline, ranks: list[str]) -> None:
    """Write every task of every rank; compressed if the name ends in .gz.

    Args:
        path: the file.
        timeline: of a step.
        ranks: what to call them.

    Raises:
        InputError: the file cannot be written.
    """
    text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(_events(timeline, ranks))
    data = (text + "\n]}\n").encode()
    write_atomically(path, gzip.compress(data, 6) if path.suffix == ".gz" else data)


def _events(timeline: Timeline, ranks: list[str]) -> Iterator[str]:
    names = dict.fromkeys(task.stream for task in timeline.tasks)
    streams = {name: number for number, name in enumerate(names)}
    for number, rank in enumerate(ranks):
        yield _name("process_name", number, 0, rank)
        for stream in streams:
            label = "compute and network" if stream == "all" else stream
            yield _name("thread_name", number, streams[stream], label)
    for task, begin, end in zip(timeline.tasks, timeline.begin, timeline.end, strict=True):
        name = json.dumps(f"{task.name} L{task.layer} mb{task.micro_batch}")
        thread, category = streams[task.stream], json.dumps(task.name)
        for process in np.flatnonzero(~np.isnan(begin)).tolist():
            start, length = begin[process] * 1e6, (end[process] - begin[process]) * 1e6
            yield (
                f'{{"ph": "X", "pid": {process}, "tid": {thread}, "ts": {start:.3f}, '
                f'"dur": {length:.3f}, "name": {name}, "cat": {category}}}'
            )


def _name(kind: str, process: int, thread: int, value: str) -> str:
    event = {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": value}}
    return json.dumps(event)
