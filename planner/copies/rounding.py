"""From the relaxation's shares to copies: few experts in several cells, then copies as allowed.

1 pull     the relaxation again, with phases a little longer and most experts in one cell
2 count    copies of the cells that keep a share, as many as allowed
3 place    cells filled by greedy, then swaps over all GPUs on a smooth objective
4 share    the best shares of these copies: a linear program; again from 3 while it helps
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.levels import Effort, LayerPlacement, fill_cells
from epplan.planner.placement.rows import Ints
from epplan.planner.placement.search import NoRoomError
from epplan.planner.placement.smooth import descend_smoothly
from epplan.planner.placement.terms import cell_terms

from .shares import LEAST_SHARE, Relaxation, Relaxed
from .task import ReplicatedTask

_PULLS = 2
_ROUNDS = 2  # of swaps and sharing; a third gains little
_FULL = 0.9  # of an average GPU's rows: what one copy should not exceed
_WORTH = 0.02  # of the same: a copy for less is no help


def rounded(
    task: ReplicatedTask, relaxed: Relaxed, slack: float, enough_s: float, effort: Effort
) -> Iterator[LayerPlacement]:
    """Yield ever better copies near the relaxation's solution.

    Args:
        task: the layer.
        relaxed: the solution.
        slack: part by which phases may last longer, to have few experts in several cells.
        enough_s: a cost from which nothing better is looked for.
        effort: when to stop.

    Raises:
        NoRoomError: copies find no place.
    """
    expert, cells, share = copies_of_relaxation(concentrated(task, relaxed, slack, effort), task)
    rows, limits = task.rows.copies(expert, share), task.limits(expert)
    placement = fill_cells(rows, task.cell_of_gpu, task.capacity, limits, cells, effort.deadline)
    found = task.priced(expert, share, placement, "relaxation rounded")
    found = task.shared(found, effort.left_s)
    yield found
    for _ in range(_ROUNDS):
        assert found.share is not None
        placement = descend_smoothly(
            task.rows.copies(expert, found.share),
            found.placement,
            task.capacity,
            limits.on_gpus,
            enough_s=enough_s,
            deadline=effort.deadline,
        )
        better = task.priced(expert, found.share, placement, "relaxation rounded + swaps")
        better = task.shared(better, effort.left_s)
        if better.seconds >= found.seconds:
            return
        found = better
        yield found
        if not effort.left_s:
            return


def concentrated(task: ReplicatedTask, relaxed: Relaxed, slack: float, effort: Effort) -> Shares:
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

    Heavy experts come first, each with the copies it needs to stay below an average GPU, in
    proportion to its shares (Webster's apportionment). Copies that are left go one by one to cells
    whose share has no copy, the largest first, then to where copies carry most.
    """
    amount = shares * task.load[:, None]
    fair = task.load.sum() / task.capacity.sum() * task.capacity.max()  # rows of an average GPU
    gpus, most = np.bincount(task.cell_of_gpu), amount.max()
    left, copies = task.room.copy(), np.zeros(shares.shape, dtype=np.int64)
    extra = task.rule.extra - (task.rule.least_copies - 1) * len(shares)

    def carried(copies: npt.NDArray[np.int64]) -> Floats:
        """Return the rows of every copy, [experts, cells]."""
        return _kept(shares, copies) * task.load[:, None] / np.maximum(copies, 1)

    for expert in np.argsort(-task.load, kind="stable"):
        for number in range(task.rule.least_copies + extra):
            open_ = (left > 0) & (copies[expert] < gpus)
            if number < task.rule.least_copies:
                open_ &= ~np.isin(task.host_of_cell, task.host_of_cell[copies[expert] > 0])
                if not open_.any():
                    raise NoRoomError
            elif not (open_ & (carried(copies)[expert] > _FULL * fair)).any():
                break
            cell = np.where(open_, shares[expert] / (copies[expert] + 0.5), -1.0).argmax()
            copies[expert, cell] += 1
            left[cell] -= 1
            extra -= number >= task.rule.least_copies
    for _ in range(extra):
        wish = np.where(copies > 0, carried(copies), amount + most * (amount > _WORTH * fair))
        wish[(copies >= gpus) | (left == 0) | (amount == 0)] = 0.0
        best = int(wish.argmax())
        if not wish.flat[best]:
            break
        copies.flat[best] += 1
        left[best % len(left)] -= 1
    kept = _kept(shares, copies)
    experts, cells = np.nonzero(copies)
    times = copies[experts, cells]
    part = kept[experts, cells] / times
    return np.repeat(experts, times), np.repeat(cells, times), np.repeat(part, times)


def _kept(shares: Shares, copies: npt.NDArray[np.int64]) -> Shares:
    """Return shares of the cells that have copies, [experts, cells]."""
    kept = np.where(copies > 0, np.maximum(shares, LEAST_SHARE), 0.0)
    total: Shares = kept / np.maximum(kept.sum(axis=1, keepdims=True), LEAST_SHARE)
    return total
