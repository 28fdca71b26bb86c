"""Micro-batches that compute in turn while each other's rows are under way.

Every rank runs the same micro-batches in the same turns, so that all issue their collectives in
the same order. A micro-batch beyond the sequences there are is empty, and takes its turns too.
"""

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

# Where a micro-batch yields in a MoE layer: its attention is queued, its counts are under way, its
# rows are, its experts are queued, its outputs are under way.
Point = Literal["attended", "counted", "sent", "computed", "returned"]
Turns = tuple[frozenset[Point], ...]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the sequences of a step are split, and when micro-batches take turns.

    Attributes:
        micro_batches: parts of a step.
        in_flight: at a time; memory is for so many.
        turns: where micro-batch n lets the other one run: the points of `turns[n % len(turns)]`.
        reason: why so many.
    """

    micro_batches: int
    in_flight: int
    turns: Turns
    reason: str


# One micro-batch after the other.
NO_TURNS: Turns = (frozenset(),)

# With gloo the computation itself is what runs between start and end of a transfer.
CPU_TURNS: Turns = (frozenset({"sent", "returned"}),)

# On a GPU computation and transfers are a queue each, and nothing overtakes in a queue. The host
# queues ahead, but must read a micro-batch's counts before it can send its rows, and what it must
# not do is wait for them with nothing queued. Two that yield at different points make these queues:
#
#     computation  attention0  attention1  experts0  experts1  attention0  ...
#     transfers          counts0  rows0  counts1  rows1  outputs0  outputs1  counts0  ...
#
# Were both to yield at the same points, counts1 would stand before rows0, which could then leave
# only once attention1 had ended; or outputs0 before rows1, and those only after experts0.
GPU_TURNS: Turns = (
    frozenset({"counted", "sent", "computed", "returned"}),
    frozenset({"attended", "counted", "computed", "returned"}),
)


def take_turns(
    batches: Iterable[Generator[Point, None, Outcome]], schedule: Schedule
) -> list[Outcome]:
    """Run micro-batches to their ends; the next one begins in the place of one that ends.

    Returns:
        What each returned, in their order.
    """
    waiting = enumerate(batches)
    flying = deque(islice(waiting, schedule.in_flight))
    outcomes: dict[int, Outcome] = {}
    while flying:
        number, batch = flying.popleft()
        try:
            while next(batch) not in schedule.turns[number % len(schedule.turns)]:
                pass
        except StopIteration as end:
            outcomes[number] = end.value
            flying.extendleft(islice(waiting, 1))
        else:
            flying.append((number, batch))
    return [outcomes[number] for number in range(len(outcomes))]
