"""The event simulation against a queue of events, and the properties any schedule has."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.simulate.events import Task, in_one_stream, run

RANKS = 3


def by_event_queue(tasks: list[Task]) -> dict[tuple[int, int], float]:
    """Return the end of every (task, rank), found by a clock that jumps from event to event.

    A task is launched on a rank when it is first in its stream's queue there and what it waits for
    has ended there; a collective when that is so on all its ranks.
    """
    queues: dict[tuple[str, int], list[int]] = {}
    for number, task in enumerate(tasks):
        for rank in range(RANKS):
            if not np.isnan(task.seconds[rank]):
                queues.setdefault((task.stream, rank), []).append(number)
    ended: dict[tuple[int, int], float] = {}
    running: list[tuple[float, int, int]] = []
    launched: set[tuple[int, int]] = set()
    now = 0.0

    def ready(number: int, rank: int) -> bool:
        task = tasks[number]
        return queues[task.stream, rank][0] == number and all(
            np.isnan(tasks[a].seconds[rank]) or (a, rank) in ended for a in task.after
        )

    while True:
        for number, task in enumerate(tasks):
            members = [r for r in range(RANKS) if not np.isnan(task.seconds[r])]
            groups = (
                [[r for r in members if task.group[r] == g] for g in set(task.group.tolist())]
                if task.group is not None
                else [[r] for r in members]
            )
            for group in groups:
                if not group or (number, group[0]) in launched:
                    continue
                if all(ready(number, rank) for rank in group):
                    for rank in group:
                        launched.add((number, rank))
                        heapq.heappush(running, (now + task.seconds[rank], number, rank))
        if not running:
            return ended
        now, number, rank = heapq.heappop(running)
        ended[number, rank] = now
        queues[tasks[number].stream, rank].pop(0)
        while running and running[0][0] == now:
            _, number, rank = heapq.heappop(running)
            ended[number, rank] = now
            queues[tasks[number].stream, rank].pop(0)


@st.composite
def programs(draw: st.DrawFn) -> list[Task]:
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 8))):
        collective = draw(st.booleans())
        seconds = np.array(draw(st.lists(st.integers(1, 9), min_size=RANKS, max_size=RANKS)), float)
        if not collective and draw(st.booleans()):
            seconds[draw(st.integers(0, RANKS - 1))] = np.nan
        earlier = st.lists(st.integers(0, number - 1), max_size=2) if number else st.just([])
        tasks.append(
            Task(
                name=f"t{number}",
                stream="network" if collective else "compute",
                seconds=seconds,
                after=tuple(draw(earlier)),
                group=np.array([0, 0, draw(st.integers(0, 1))]) if collective else None,
            )
        )
    return tasks


@settings(max_examples=200, deadline=None)
@given(programs())
def test_every_event_is_where_a_queue_of_events_puts_it(tasks: list[Task]) -> None:
    timeline = run(tasks, RANKS)
    expected = by_event_queue(tasks)
    for (number, rank), end in expected.items():
        assert timeline.end[number, rank] == pytest.approx(end), (number, rank)
    assert np.count_nonzero(~np.isnan(timeline.end)) == len(expected)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_overlap_is_never_slower_than_added_nor_faster_than_the_longer_part(
    tasks: list[Task],
) -> None:
    overlapped, added = run(tasks, RANKS), run(in_one_stream(tasks), RANKS)
    assert overlapped.seconds <= added.seconds + 1e-9
    for stream in ("compute", "network"):
        assert overlapped.seconds >= overlapped.busy_s(stream).max() - 1e-9


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("compute", "network"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_a_pipeline_of_equal_parts_takes_the_closed_form(
    parts: int, compute: float, network: float
) -> None:
    """Parts computed one after another and sent one after another: first, longest x rest, last."""
    tasks: list[Task] = []
    for _ in range(parts):
        tasks.append(Task(name="compute", stream="compute", seconds=np.full(RANKS, compute)))
    for number in range(parts):
        tasks.append(
            Task(
                name="send",
                stream="network",
                seconds=np.full(RANKS, network),
                after=(number,),
                group=np.zeros(RANKS, dtype=np.intp),
            )
        )
    closed = compute + max(compute, network) * (parts - 1) + network
    assert run(tasks, RANKS).seconds == pytest.approx(closed)
    assert run(in_one_stream(tasks), RANKS).seconds == pytest.approx(parts * (compute + network))


def test_a_collective_waits_for_its_slowest_rank_only() -> None:
    tasks = [
        Task(name="work", stream="compute", seconds=np.array([1.0, 5.0, 2.0])),
        Task(
            name="gather",
            stream="network",
            seconds=np.ones(3),
            after=(0,),
            group=np.array([0, 0, 1]),
        ),
    ]
    assert run(tasks, RANKS).end[1].tolist() == [6.0, 6.0, 3.0]
