"""One layer with replicas: how many copies of which expert, where, and what share each takes.

    1 bound    no copies with any shares can be faster: a linear program over cells
    2 round    its solution to copies, placed and shared (`rounding`)
    3 count    or the next copy goes to the expert with most rows a copy, in equal shares
    4 place    these as items by topology levels, never two of an expert on a GPU
    5 share    the best shares of these copies: a linear program

The layout of `rebalance` comes first, with 5; then 2 with different slacks; then 3, 4, 5, again
with its shares while it helps. Equal shares, where an engine knows nothing else, are 3 and 4; the
bound holds for them too.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Floats
from epplan.planner.placement.levels import (
    Effort,
    LayerPlacement,
    Report,
    place_layer,
)
from epplan.planner.placement.rows import Ints, LayerRows
from epplan.planner.placement.search import NoRoomError, spread
from epplan.planner.placement.terms import cell_terms
from epplan.planner.rebalance import rebalance

from .balance_bound import least_maximum
from .counts import count_copies, near_counts
from .rounding import rounded
from .shares import LEAST_SHARE, Relaxation, Relaxed
from .task import ReplicatedTask

_ROUNDS = 4  # of placing and sharing
_SLACKS = (0.003, 0.006, 0.01, 0.002, 0.0045)  # each with copies of its own
_FAR = 0.02  # a gap that no other rounding closes: then the bound by slots comes
_FEW_TRIES, _TRIES = 4, 10  # candidates before that bound: one slack's, or those of three
_SLOTS_SHARE = 0.3  # of the time left, for the bound by slots
_SLOTS_PRECISION = 2e-3


def start_with_replicas(task: ReplicatedTask) -> LayerPlacement:
    """Return a placement to start from: `rebalance`'s, or equal shares dealt out where room is.

    Raises:
        NoRoomError: there is none on these GPUs.
    """
    expert, share = _items(task, task.rule.extra)
    try:
        placement = spread(len(expert), task.capacity, task.limits(expert).on_gpus)
    except NoRoomError:  # for so many copies of the hottest experts
        expert, placement = np.nonzero(_in_a_circle(task))
        share = 1.0 / np.bincount(expert)[expert]
    dealt = task.priced(expert, share, placement, "dealt out")
    return min([dealt, *_rebalanced(task)], key=lambda found: found.seconds)


def _in_a_circle(task: ReplicatedTask) -> npt.NDArray[np.bool_]:
    """Return copies [experts, gpus] that keep all rules, whenever there are some (`feasibility`).

    Raises:
        NoRoomError: there are none.
    """
    num_experts, least = len(task.load), task.rule.least_copies
    held = np.zeros((num_experts, len(task.capacity)), dtype=bool)
    left = np.minimum(task.capacity, num_experts)
    dealt = 0
    for host in range(task.host_of_gpu.max() + 1):
        gpus = np.flatnonzero(task.host_of_gpu == host)
        number = min(left[gpus].sum(), num_experts, least * num_experts - dealt)
        slots = np.repeat(gpus, left[gpus])[:number]
        held[(dealt + np.arange(number)) % num_experts, slots] = True
        left -= np.bincount(slots, minlength=len(left))
        dealt += number
    if dealt < least * num_experts:
        raise NoRoomError
    for gpu in np.repeat(np.arange(len(left)), left)[: num_experts + task.rule.extra - dealt]:
        held[np.where(held[:, gpu], len(left) + 1, held.sum(axis=1)).argmin(), gpu] = True
    return held


def place_replicated(
    task: ReplicatedTask, start: LayerPlacement, effort: Effort, report: Report | None = None
) -> LayerPlacement:
    """Return copies, placement and shares of one layer with a proven bound.

    Args:
        task: the layer.
        start: what to improve on.
        effort: when to stop.
        report: takes every better one on the way.
    """
    floors, relaxed = _relaxed(task, effort)
    best = replace(start, bound_s=min(start.seconds, _proven(task, floors, relaxed)))
    if report is not None:
        report(best)
    if not effort.left_s:
        return best
    by_slots = False
    for tried, found in enumerate(_candidates(task, relaxed, best.bound_s, effort)):
        if not by_slots and tried >= (_TRIES if best.is_done(_FAR) else _FEW_TRIES):
            best, by_slots = best.proven(_bound_by_slots(task, best, effort)), True
        if found.seconds < best.seconds * (1 - 1e-9):
            best = replace(found, bound_s=min(found.seconds, best.bound_s))
            if report is not None:
                report(best)
        if best.is_done(effort.gap) or not effort.left_s:
            return best
    return best if by_slots else best.proven(_bound_by_slots(task, best, effort))


def bound_with_replicas(task: ReplicatedTask, effort: Effort) -> float:
    """Return seconds below which no copies with any shares can come."""
    return _proven(task, *_relaxed(task, effort))


def _relaxed(task: ReplicatedTask, effort: Effort) -> tuple[list[float], Relaxed | None]:
    """Return what every phase lasts at least by the number of copies, and the relaxation."""
    num_copies = len(task.load) + task.rule.extra
    floors = [phase.floor_with_copies(num_copies) for phase in task.rows.phases]
    if not effort.left_s:
        return floors, None
    terms = cell_terms(task.rows, task.cell_of_gpu)
    return floors, Relaxation(terms, floors, task.room).solve(effort.left_s)


def _bound_by_slots(task: ReplicatedTask, best: LayerPlacement, effort: Effort) -> float:
    """Return a bound that sees how light experts fill slots (`balance_bound`).

    Of every GPU one row counts that no other GPU's experts load: what an expert adds to such a row
    is at least the least it adds to any GPU's.
    """
    num_copies, gpus = len(task.load) + task.rule.extra, len(task.capacity)
    shares, slots = best.shares(gpus), int(task.capacity.max())
    floors = []
    for number, phase in enumerate(task.rows.phases):
        floor, amount = phase.floor_with_copies(num_copies), phase.own_rows()
        reached = phase.seconds_of_shares(shares)
        if amount is not None and floor < reached * (1 - _SLOTS_PRECISION):
            by_slots = least_maximum(
                amount.min(axis=1),
                gpus,
                slots,
                num_copies,
                precision=_SLOTS_PRECISION,
                most=reached,
                time_limit_s=_SLOTS_SHARE * effort.left_s / (len(task.rows.phases) - number),
            )
            floor = max(floor, by_slots)
        floors.append(floor)
    relaxed = Relaxation(cell_terms(task.rows, task.cell_of_gpu), floors, task.room)
    found = relaxed.solve(effort.left_s)
    return max(task.rows.total(floors), found.bound_s if found else 0.0)


def _proven(task: ReplicatedTask, floors: list[float], relaxed: Relaxed | None) -> float:
    return max(task.rows.total(floors), relaxed.bound_s if relaxed else 0.0)


def _candidates(
    task: ReplicatedTask, relaxed: Relaxed | None, bound_s: float, effort: Effort
) -> Iterator[LayerPlacement]:
    for found in [] if task.rule.equal_shares else _rebalanced(task):
        yield task.shared(found, effort.left_s)
    if not task.rule.equal_shares and relaxed is not None:
        enough_s = bound_s / (1 - effort.gap) if effort.gap < 1 else np.inf
        for slack in _SLACKS:
            with suppress(NoRoomError):
                yield from rounded(task, relaxed, slack, enough_s, effort)
    with suppress(NoRoomError):  # for copies counted by rows
        yield from _by_levels(task, task.rule.extra, effort)
    if not task.rule.survive_hosts:
        yield from _by_levels(task, 0, effort)  # a replica costs a second reading of its weights
    if task.rule.equal_shares:
        yield from _other_counts(task, effort)


def _other_counts(task: ReplicatedTask, effort: Effort) -> Iterator[LayerPlacement]:
    """Yield ever better equal shares: one copy less of an expert, and one more of another or none.

    Counting by rows does not see that a copy may be in the way where it would sit; here every count
    is placed and priced.
    """
    copies = _count(task, task.rule.extra)
    least, most = task.rule.least_copies, int((task.capacity > 0).sum())
    total, best = len(task.load) + task.rule.extra, np.inf
    while True:
        for changed in near_counts(task.load, copies, total, least, most):
            if not effort.left_s:
                return
            with suppress(NoRoomError):
                found = _placed(task, changed, replace(effort, gap=1.0))
                if found.seconds < best * (1 - 1e-9):
                    best, copies = found.seconds, changed
                    yield found
                    break
        else:
            return


def _rebalanced(task: ReplicatedTask) -> Iterator[LayerPlacement]:
    """Yield the layout of the fast path, which sees neither links nor hosts."""
    num_gpus, num_slots = len(task.capacity), len(task.load) + task.rule.extra
    if task.rule.survive_hosts or num_slots % num_gpus or np.ptp(task.capacity):
        return
    if num_slots > task.capacity.sum():
        return
    shares: Literal["equal", "free"] = "equal" if task.rule.equal_shares else "free"
    done = rebalance(task.load[None], num_slots, num_gpus, shares=shares)
    expert, share = done.expert_of_slot[0], np.maximum(done.share_of_slot[0], LEAST_SHARE)
    share = share / np.bincount(expert, share)[expert]
    placement = np.arange(num_slots) * num_gpus // num_slots
    yield task.priced(expert, share, placement, "rebalance")


def _placed(task: ReplicatedTask, copies: Ints, effort: Effort) -> LayerPlacement:
    """Return equal shares of given counts [experts], placed by levels."""
    expert = np.repeat(np.arange(len(copies)), copies)
    share = 1.0 / copies[expert]
    limits = task.limits(expert)
    rows = task.rows.copies(expert, share)
    placement = spread(len(expert), task.capacity, limits.on_gpus)
    start = _start(rows, placement)
    placed = place_layer((rows, task.cell_of_gpu, task.capacity, start, limits), effort)
    return task.priced(expert, share, placed.placement, placed.found_by)


def _start(rows: LayerRows, placement: Ints) -> LayerPlacement:
    return LayerPlacement(
        placement=placement,
        seconds=rows.seconds(placement),
        bound_s=0.0,
        found_by="dealt out",
        floor_s=0.0,
    )


def _by_levels(task: ReplicatedTask, extra: int, effort: Effort) -> Iterator[LayerPlacement]:
    """Yield placements of copies counted by rows, each starting from the one before."""
    expert, share = _items(task, extra)
    limits = task.limits(expert)
    placement = spread(len(expert), task.capacity, limits.on_gpus)
    for _ in range(_ROUNDS):
        rows = task.rows.copies(expert, share)
        start = _start(rows, placement)
        placed = place_layer((rows, task.cell_of_gpu, task.capacity, start, limits), effort)
        placement = placed.placement
        found = task.priced(expert, share, placement, placed.found_by)
        yield found
        if task.rule.equal_shares or not extra:
            return
        found = task.shared(found, effort.left_s)
        yield found
        assert found.share is not None
        share = found.share


def _items(task: ReplicatedTask, extra: int) -> tuple[Ints, Floats]:
    """Return the expert of every copy, and equal shares."""
    copies = _count(task, extra)
    expert = np.repeat(np.arange(len(copies)), copies)
    return expert, 1.0 / copies[expert]


def _count(task: ReplicatedTask, extra: int) -> Ints:
    least, most = task.rule.least_copies, int((task.capacity > 0).sum())
    return count_copies(task.load, extra, least, most)
