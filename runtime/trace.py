"""A trace of one step for Perfetto (ui.perfetto.dev) or chrome://tracing: who did what when.

Every rank is a process and each of its tracks, computation and transfers, a thread. Ranks count
from their own start of the step, right after a barrier, because clocks of hosts differ; on a GPU
the times are the device's.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from epplan.planner.plan import Plan

from .clock import Span, Track

_THREADS: dict[Track, int] = {"compute": 0, "communication": 1}


def trace_text(plan: Plan, spans_of_rank: Sequence[Sequence[Span]]) -> str:
    """Return the trace as JSON in the Trace Event format, one event per line."""
    events = [
        json.dumps(event)
        for rank, spans in enumerate(spans_of_rank)
        for event in _events(plan, rank, spans)
    ]
    return '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(events) + "\n]}\n"


def _events(plan: Plan, rank: int, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    planned = plan.ranks[rank]
    title = f"rank {rank}: {planned.host}, GPU {planned.gpu_index}"
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": title}}
    yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    for track, thread in _THREADS.items():
        named = {"pid": rank, "tid": thread, "args": {"name": track}}
        yield {"ph": "M", "name": "thread_name", **named}
    for span in sorted(spans, key=lambda span: (span.begin_s, span.end_s)):
        yield {
            "ph": "X",
            "pid": rank,
            "tid": _THREADS[span.track],
            "name": f"{span.name} m{span.place.micro_batch}",
            "cat": span.name,
            "ts": span.begin_s * 1e6,
            "dur": (span.end_s - span.begin_s) * 1e6,
            "args": span.place._asdict(),
        }
