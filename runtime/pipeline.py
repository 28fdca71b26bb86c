"""Micro-batches that compute in turn while each other's rows are under way.

Every rank runs the same micro-batches in the same turns, so that all issue their collectives in
the same order. A micro-batch beyond the sequences there are is empty, and takes its turns too.
"""

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

# Where a micro-batch yields in a MoE layer: its counts, its rows, or its outputs are under way.
Point = Literal["counted", "sent", "returned"]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the sequences of a step are split, and when micro-batches take turns."""

    micro_batches: int
    in_flight: int  # at a time; memory is for so many
    turns: frozenset[Point]
    reason: str


def take_turns(
    batches: Iterable[Generator[Point, None, Outcome]], schedule: Schedule
) -> list[Outcome]:
    """Run micro-batches to their ends; the next one begins when one ends.

    Returns:
        What each returned, in their order.
    """
    waiting = enumerate(batches)
    flying = deque(islice(waiting, schedule.in_flight))
    outcomes: dict[int, Outcome] = {}
    while flying:
        number, batch = flying.popleft()
        try:
            while next(batch) not in schedule.turns:
                pass
        except StopIteration as end:
            outcomes[number] = end.value
            flying.extend(islice(waiting, 1))
        else:
            flying.append((number, batch))
    return [outcomes[number] for number in range(len(outcomes))]
