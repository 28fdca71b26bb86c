"""One layer with replicas: how many copies of which expert, where, and what share each takes.

    1 bound    no copies with any shares can be faster: a linear program over cells
    2 round    its solution has few experts in several cells: the copies that carry most are made
    3 count    or the next copy goes to the expert with most rows a copy, in equal shares
    4 place    copies as items by topology levels, never two of an expert on a GPU
    5 share    the best shares of these copies: a linear program

The layout of `rebalance` comes first, with 5; then 2, 4, 5; then 3, 4, 5, again with its shares
while it helps. Equal shares, where an engine knows nothing else, are 3 and 4; the bound holds for
them too.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.levels import (
    Effort,
    LayerPlacement,
    Limits,
    Report,
    fill_cells,
    place_layer,
)
from epplan.planner.placement.rows import Ints, LayerRows
from epplan.planner.placement.search import Limit, NoRoomError, descend, spread
from epplan.planner.placement.terms import cell_terms
from epplan.planner.problem import Replication
from epplan.planner.rebalance import rebalance

from .balance_bound import least_maximum
from .counts import count_copies, near_counts
from .shares import LEAST_SHARE, Relaxation, Relaxed, best_shares

_ROUNDS = 4  # of placing and sharing
_SLACKS = (0.003, 0.006, 0.01)  # given up over cells, to have copies left inside of them
_PULLS = 2
_KICKS = (4, 16)  # inside cells: a quick round first
_TRIES_BEFORE_SLOTS = 2  # candidates; most layers are done by then
_SLOTS_SHARE = 0.3  # of the time left, for the bound by slots
_SLOTS_PRECISION = 2e-3
_FULL = 0.9  # of an average GPU's rows: what one copy should not exceed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedTask:
    """One layer to be solved with replicas.

    Attributes:
        rows: of one copy of each expert.
        load: rows of every expert, mean over windows, [experts].
        cell_of_gpu: `RowBuilder.cells`.
        host_of_gpu: numbers, [gpus].
        capacity: most copies on every GPU, [gpus].
        rule: what is allowed.
    """

    rows: LayerRows
    load: Floats
    cell_of_gpu: Ints
    host_of_gpu: Ints
    capacity: npt.NDArray[np.int64]
    rule: Replication

    @property
    def room(self) -> npt.NDArray[np.int64]:
        """Most copies in every cell, [cells]."""
        return np.bincount(self.cell_of_gpu, weights=self.capacity).astype(np.int64)

    @property
    def host_of_cell(self) -> Ints:
        """Number of every cell's host, [cells]."""
        host = np.zeros(len(self.room), dtype=np.intp)
        host[self.cell_of_gpu] = self.host_of_gpu
        return host


def start_with_replicas(task: ReplicatedTask) -> LayerPlacement:
    """Return a placement to start from: `rebalance`'s, or equal shares dealt out where room is.

    Raises:
        NoRoomError: there is none on these GPUs.
    """
    expert, share = _items(task, task.rule.extra)
    try:
        placement = spread(len(expert), task.capacity, _limits(task, expert).on_gpus)
    except NoRoomError:  # for so many copies of the hottest experts
        expert, placement = np.nonzero(_in_a_circle(task))
        share = 1.0 / np.bincount(expert)[expert]
    dealt = _from_items(task, expert, share, placement, "dealt out")
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
    for tried, found in enumerate(_candidates(task, relaxed, effort)):
        if tried == _TRIES_BEFORE_SLOTS:
            slots_s = min(best.seconds, max(best.bound_s, _bound_by_slots(task, best, effort)))
            best = replace(best, bound_s=slots_s)
        if found.seconds < best.seconds * (1 - 1e-9):
            best = replace(found, bound_s=min(found.seconds, best.bound_s))
            if report is not None:
                report(best)
        if best.is_done(effort.gap) or not effort.left_s:
            break
    return best


def bound_with_replicas(task: ReplicatedTask, effort: Effort) -> float:
    """Return seconds below which no copies with any shares can come."""
    return _proven(task, *_relaxed(task, effort))


def _relaxed(task: ReplicatedTask, effort: Effort) -> tuple[list[float], Relaxed | None]:
    """Return what every phase lasts at least by the number of copies, and the relaxation."""
    num_copies = len(task.load) + task.rule.extra
    floors = [phase.floor_with_copies(num_copies) for phase in task.rows.phases]
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
    task: ReplicatedTask, relaxed: Relaxed | None, effort: Effort
) -> Iterator[LayerPlacement]:
    for found in [] if task.rule.equal_shares else _rebalanced(task):
        yield _shared(task, found, effort)
    if not task.rule.equal_shares and relaxed is not None:
        for kicks, slack in product(_KICKS, _SLACKS):
            with suppress(NoRoomError):
                yield from _rounded(task, relaxed, slack, kicks, effort)
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


def _rounded(
    task: ReplicatedTask, relaxed: Relaxed, slack: float, kicks: int, effort: Effort
) -> Iterator[LayerPlacement]:
    """Yield the relaxation's solution with as many copies as allowed."""
    expert, cells, share = copies_of_relaxation(_concentrated(task, relaxed, slack, effort), task)
    limits = _limits(task, expert)
    rows = task.rows.copies(expert, share)
    for found_by in ("relaxation rounded", "relaxation rounded + swaps over hosts"):
        placement = fill_cells(
            rows, task.cell_of_gpu, task.capacity, limits, cells, effort.deadline, kicks
        )
        yield _shared(task, _from_items(task, expert, share, placement, found_by), effort)
        cells = descend(
            cell_terms(rows, task.cell_of_gpu), cells, task.room, limits.on_cells, effort.deadline
        )


def _concentrated(task: ReplicatedTask, relaxed: Relaxed, slack: float, effort: Effort) -> Shares:
    """Return the relaxation's shares with most experts in one cell, phases `slack` longer."""
    terms = cell_terms(task.rows, task.cell_of_gpu)
    single = len(task.load) / (len(task.load) + task.rule.extra)
    room = np.ceil(task.room * single).astype(np.int64)  # the rest is for further copies
    program = Relaxation(terms, [0.0] * len(terms.phases), room)
    shares = relaxed.shares
    # An expert with more rows than an average GPU needs several copies anyway: as many cells.
    free = np.ceil(task.load / (_FULL * task.load.sum() / len(task.capacity)))[:, None]
    for _ in range(_PULLS):
        rank_of_cell = np.argsort(np.argsort(-shares, axis=1, kind="stable"), axis=1)
        pull = np.where(rank_of_cell < free, 0.0, task.load[:, None])
        pulled = program.concentrate(relaxed, pull / task.load.mean(), slack, effort.left_s)
        if pulled is None:
            break
        shares = pulled.shares
    return shares


def copies_of_relaxation(shares: Shares, task: ReplicatedTask) -> tuple[Ints, Ints, Floats]:
    """Return expert, cell and share of every copy that keeps most of `shares` [experts, cells].

    Every expert sits where most of it is. Copies are added one by one: first where one would carry
    more than an average GPU, then in the further cells that have a share, the largest first, then
    where copies carry most.
    """
    amount = shares * task.load[:, None]
    fair = task.load.sum() / task.capacity.sum() * task.capacity.max()  # rows of an average GPU
    gpus, most = np.bincount(task.cell_of_gpu), amount.max()
    left, host = task.room.copy(), task.host_of_cell
    copies = np.zeros(shares.shape, dtype=np.int64)
    for expert in np.argsort(-task.load, kind="stable"):
        for _ in range(task.rule.least_copies):
            elsewhere = ~np.isin(host, host[copies[expert] > 0])
            wish = np.where((left > 0) & elsewhere, shares[expert] + 1e-9, 0.0)
            cell = int(wish.argmax())
            if not wish[cell]:
                raise NoRoomError
            copies[expert, cell] += 1
            left[cell] -= 1
    for _ in range(task.rule.extra - (task.rule.least_copies - 1) * len(shares)):
        inside = np.where(copies > 0, amount / np.maximum(copies, 1), 0.0)
        carries = np.select(
            [inside > _FULL * fair, copies == 0], [amount + 2 * most, amount + most], inside
        )
        carries[(copies >= gpus) | (left == 0) | (amount == 0)] = 0.0
        best = int(carries.argmax())
        if not carries.flat[best]:
            break
        copies.flat[best] += 1
        left[best % len(left)] -= 1
    kept = np.where(copies > 0, np.maximum(shares, LEAST_SHARE), 0.0)
    kept /= kept.sum(axis=1, keepdims=True)
    experts, cells = np.nonzero(copies)
    times = copies[experts, cells]
    part = kept[experts, cells] / times
    return np.repeat(experts, times), np.repeat(cells, times), np.repeat(part, times)


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
    yield _from_items(task, expert, share, placement, "rebalance")


def _placed(task: ReplicatedTask, copies: Ints, effort: Effort) -> LayerPlacement:
    """Return equal shares of given counts [experts], placed by levels."""
    expert = np.repeat(np.arange(len(copies)), copies)
    share = 1.0 / copies[expert]
    limits = _limits(task, expert)
    rows = task.rows.copies(expert, share)
    placement = spread(len(expert), task.capacity, limits.on_gpus)
    start = _start(rows, placement)
    placed = place_layer((rows, task.cell_of_gpu, task.capacity, start, limits), effort)
    return _from_items(task, expert, share, placed.placement, placed.found_by)


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
    limits = _limits(task, expert)
    placement = spread(len(expert), task.capacity, limits.on_gpus)
    for _ in range(_ROUNDS):
        rows = task.rows.copies(expert, share)
        start = _start(rows, placement)
        placed = place_layer((rows, task.cell_of_gpu, task.capacity, start, limits), effort)
        placement = placed.placement
        found = _from_items(task, expert, share, placement, placed.found_by)
        yield found
        if task.rule.equal_shares or not extra:
            return
        found = _shared(task, found, effort)
        yield found
        assert found.share is not None
        share = found.share


def _shared(task: ReplicatedTask, found: LayerPlacement, effort: Effort) -> LayerPlacement:
    """Return the placement with the best shares."""
    assert found.expert is not None
    shares = best_shares(task.rows, found.shares(len(task.capacity)), effort.left_s)
    share = shares[found.expert, found.placement]
    return _from_items(task, found.expert, share, found.placement, found.found_by)


def _items(task: ReplicatedTask, extra: int) -> tuple[Ints, Floats]:
    """Return the expert of every copy, and equal shares."""
    copies = _count(task, extra)
    expert = np.repeat(np.arange(len(copies)), copies)
    return expert, 1.0 / copies[expert]


def _count(task: ReplicatedTask, extra: int) -> Ints:
    least, most = task.rule.least_copies, int((task.capacity > 0).sum())
    return count_copies(task.load, extra, least, most)


def _limits(task: ReplicatedTask, expert: Ints) -> Limits:
    """Return what keeps copies apart: one of an expert on a GPU, and not all on one host."""
    num_experts, num_gpus = len(task.load), len(task.capacity)
    in_cell = Limit(
        group=expert,
        domain=np.arange(len(task.room)),
        most=np.tile(np.bincount(task.cell_of_gpu), (num_experts, 1)),
    )
    on_gpu = Limit(
        group=expert,
        domain=np.arange(num_gpus),
        most=np.ones((num_experts, num_gpus), dtype=np.int64),
    )
    hosts = [replace(limit, domain=task.host_of_cell) for limit in _over_hosts(task, expert)]
    return Limits(on_gpus=(on_gpu, *_over_hosts(task, expert)), on_cells=(in_cell, *hosts))


def _over_hosts(task: ReplicatedTask, expert: Ints) -> list[Limit]:
    if not task.rule.survive_hosts:
        return []
    copies = np.bincount(expert)
    most = np.tile((copies - task.rule.survive_hosts)[:, None], (1, task.host_of_gpu.max() + 1))
    return [Limit(group=expert, domain=task.host_of_gpu, most=most)]


def _from_items(
    task: ReplicatedTask, expert: Ints, share: Floats, placement: Ints, found_by: str
) -> LayerPlacement:
    placed = LayerPlacement(
        placement=placement,
        seconds=0.0,
        bound_s=0.0,
        found_by=found_by,
        floor_s=0.0,
        expert=expert,
        share=share,
    )
    seconds = task.rows.seconds_of_shares(placed.shares(len(task.capacity)))
    return replace(placed, seconds=seconds)
