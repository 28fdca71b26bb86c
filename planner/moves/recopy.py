"""Placing replicas again after a loss, with few bytes moved.

1. keep    every copy that is left stays: an expert that has one costs no bytes
2. room    where lost experts find none, copies of experts that have others are given up, the
           one with fewest rows first
3. load    lost experts as in `repair`, with copies in the place of experts
4. share   the best shares of all copies, a linear program; 3 and 4 again while that helps
5. add     within a budget of bytes, the step of any layer that gains most per byte: one more
           copy of an expert on a rank that sets a phase's time, or a move or swap of one
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.planner.copies.shares import LEAST_SHARE, best_shares
from epplan.planner.cost import Floats, Shares
from epplan.planner.groups.neighbours import Neighbours
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.rows import LayerRows
from epplan.planner.problem import Problem

from .repair import LayerRepair, load_lost, ranks_that_count
from .room import Copies, Held, Ints, deal_room, one_copy_each

_ROUNDS = 4  # of placing and sharing
_HEAVIEST = 4  # experts of the ranks that set the time, whose copies may change
_TRIED = 12  # of their changes, the most promising: each costs a linear program
_SHARING_S = 10.0  # a linear program over the shares of given copies
_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding


def least_moved_copies(problem: Problem, held: Held, before: list[Shares]) -> list[Shares] | None:
    """Return shares of every layer that load as few experts as can be: those without a copy.

    Args:
        problem: of the ranks that are left, with the replicas it allows.
        held: the copies they hold.
        before: the shares these had, [experts, ranks] by layer.

    Returns:
        None where no room can be made for the lost experts.
    """
    found = _make_room(problem, held)
    if found is None:
        return None
    kept, room = found
    builder = RowBuilder(problem)
    layers = []
    for number, copies in enumerate(kept):
        start = np.where(copies, np.maximum(before[number], LEAST_SHARE), 0.0)
        layer = _Recopied(problem, number, builder.layer(number), held[number])
        layers.append(_refill(layer, start, room[number]))
    return layers


def more_copies(
    problem: Problem, held: Held, layers: list[Shares], budget: int, time_limit_s: float
) -> list[Shares]:
    """Return shares that are faster and load at most `budget` experts more, of all layers.

    Args:
        problem: of the ranks that are left, with the replicas it allows.
        held: the copies they hold.
        layers: the shares to begin with, [experts, ranks] by layer.
        budget: most experts loaded more.
        time_limit_s: when to stop with what is found.
    """
    deadline = time.monotonic() + time_limit_s
    builder = RowBuilder(problem)
    repaired = [
        _Recopied(problem, number, builder.layer(number), held[number])
        for number in range(len(layers))
    ]
    shares = list(layers)
    used = sum(np.count_nonzero(layer, axis=0) for layer in layers)  # [ranks]
    steps = [
        layer.best_step(shares[number], problem.slots_of_gpu - used, budget)
        for number, layer in enumerate(repaired)
    ]
    while True:
        able = [n for n, step in enumerate(steps) if step is not None and step.loads <= budget]
        if not able or time.monotonic() > deadline:
            return shares
        number = max(able, key=lambda n: _worth(steps[n]))
        taken = steps[number]
        assert taken is not None
        before, shares[number] = shares[number], taken.shares
        budget -= taken.loads
        used = used + np.count_nonzero(taken.shares, axis=0) - np.count_nonzero(before, axis=0)
        free = problem.slots_of_gpu - used
        for other, step in enumerate(steps):
            if other == number or (step is not None and not step.is_allowed(budget, free)):
                steps[other] = repaired[other].best_step(shares[other], free, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharesStep:
    """A layer's shares next to its present ones."""

    shares: Shares
    gain_s: float
    loads: int
    grows: npt.NDArray[np.int64]  # copies more on every rank, [ranks]

    def is_allowed(self, budget: int, free: npt.NDArray[np.int64]) -> bool:
        """Tell whether bytes and memory suffice still."""
        return self.loads <= budget and bool((self.grows <= np.maximum(free, 0)).all())


def _worth(step: _SharesStep | None) -> tuple[bool, float]:
    """Return what orders steps: whether it loads nothing more, then seconds per load."""
    assert step is not None
    return step.loads <= 0, step.gain_s / max(step.loads, 1)


@dataclass(frozen=True, slots=True)
class _Recopied:
    """One layer whose copies are placed again: what does not change."""

    problem: Problem
    number: int
    rows: LayerRows
    held: Copies

    def shared(self, shares: Shares) -> Shares:
        """Return the best shares of the copies in `shares`, or equal ones where those are ruled."""
        if self.problem.replication.equal_shares:
            copies = shares > 0
            equal: Shares = copies / copies.sum(axis=1, keepdims=True)
            return equal
        if not (np.count_nonzero(shares, axis=1) > 1).any():
            return shares
        return best_shares(self.rows, shares, _SHARING_S)

    def items(self, shares: Shares, more: Ints) -> tuple[LayerRepair, Shares]:
        """Return the copies in `shares` as experts to be placed, and further ones without a place.

        Args:
            shares: of the copies that have a place.
            more: experts of which one more copy is to be placed.

        Returns:
            The copies, the further ones last; and the share of each.
        """
        experts, ranks = np.nonzero(shares)
        copies = np.count_nonzero(shares, axis=1)
        rest = np.ones(len(shares))
        rest[more] = copies[more] / (copies[more] + 1.0)
        share = shares[experts, ranks] * rest[experts]
        experts = np.concatenate([experts, more]).astype(np.intp)
        share = np.concatenate([share, 1.0 - rest[more]])
        repair = LayerRepair(
            self.problem,
            self.number,
            self.rows.copies(experts, share),
            self.held[experts],
            experts,
        )
        repair.placement[: len(ranks)] = ranks
        return repair, share

    def from_items(self, repair: LayerRepair, share: Floats) -> Shares:
        """Return placed copies as the best shares of them."""
        assert repair.copy_of is not None
        shares = np.zeros(self.held.shape)
        shares[repair.copy_of, repair.placement] = share
        return self.shared(shares)

    def best_step(
        self, shares: Shares, free: npt.NDArray[np.int64], budget: int
    ) -> _SharesStep | None:
        """Return the step that gains most per byte, None where none gains.

        Args:
            shares: the present ones.
            free: copies that each rank's memory takes further, [ranks].
            budget: most experts loaded more than now.
        """
        seconds, loads = self.rows.seconds_of_shares(shares), self._loads(shares)
        steps = []
        for found in self._near(shares, free):
            gain = seconds - self.rows.seconds_of_shares(found)
            if gain > seconds * (1 - _SIGNIFICANT):
                step = _SharesStep(
                    shares=found,
                    gain_s=gain,
                    loads=self._loads(found) - loads,
                    grows=np.count_nonzero(found, axis=0) - np.count_nonzero(shares, axis=0),
                )
                if step.is_allowed(budget, free):
                    steps.append(step)
        return max(steps, key=_worth, default=None)

    def _loads(self, shares: Shares) -> int:
        return int(np.count_nonzero((shares > 0) & ~self.held))

    def _near(self, shares: Shares, free: npt.NDArray[np.int64]) -> Iterator[Shares]:
        """Yield the shares next to these that promise most, before shares are made anew.

        Of the heaviest experts on the ranks that set the time, a further copy, and each copy
        elsewhere; of every host the best rank.
        """
        ranks = list(ranks_that_count(self.problem, self.number, shares))
        on_them = np.flatnonzero((shares[:, ranks] > 0).any(axis=1))
        rows = self.problem.counts[:, self.number].sum(axis=(0, 1))
        heaviest = on_them[np.argsort(-rows[on_them], kind="stable")][:_HEAVIEST]
        has_room = np.count_nonzero(shares, axis=0) < self._room(shares, free)
        may_add = np.count_nonzero(shares) < self.problem.copies_per_layer
        found: list[tuple[float, LayerRepair, Floats, int, int]] = []
        for expert in heaviest.tolist():
            able = np.flatnonzero(has_room & (shares[expert] == 0))
            starts = [self.items(shares, np.array([], dtype=np.intp))]
            if may_add:
                starts.append(self.items(shares, np.array([expert], dtype=np.intp)))
            for repair, share in starts:
                assert repair.copy_of is not None
                own = np.flatnonzero(repair.copy_of == expert)
                further = own[repair.placement[own] < 0]
                neighbours = Neighbours(repair.rows, repair.placement)
                for item in further if further.size else own:
                    seconds = neighbours.moves(int(item))
                    for rank in self._best_of_hosts(seconds, able):
                        found.append((float(seconds[rank]), repair, share, int(item), rank))
        found.sort(key=lambda candidate: candidate[0])
        for _, repair, share, item, rank in found[:_TRIED]:
            before = repair.placement
            repair.placement = repair.moved(item, rank)
            yield self.from_items(repair, share)
            repair.placement = before

    def _best_of_hosts(self, seconds: Floats, ranks: Ints) -> list[int]:
        """Return of every host that one of `ranks` with the least seconds."""
        best: dict[str, int] = {}
        for rank in ranks.tolist():
            host = self.problem.gpus[rank].host
            if host not in best or seconds[rank] < seconds[best[host]]:
                best[host] = rank
        return list(best.values())

    def _room(self, shares: Shares, free: npt.NDArray[np.int64]) -> Ints:
        """Return the most copies of every rank, [ranks]."""
        used = np.count_nonzero(shares, axis=0)
        room: Ints = np.minimum(used + np.maximum(free, 0), self.problem.experts_per_gpu)
        return room


def _refill(layer: _Recopied, kept: Shares, room: Ints) -> Shares:
    """Return the kept copies and the lost experts, placed and shared."""
    lost = np.flatnonzero(~kept.any(axis=1))
    total = kept.sum(axis=1, keepdims=True)
    start = kept / np.where(total > 0, total, 1.0)
    best, best_s = None, np.inf
    for _ in range(_ROUNDS):
        repair, share = layer.items(start, lost)
        repair.room = room
        load_lost(repair, np.arange(len(share) - len(lost), len(share)))
        found = layer.from_items(repair, share)
        seconds = layer.rows.seconds_of_shares(found)
        if seconds >= best_s * _SIGNIFICANT:
            break
        best, best_s = found, seconds
        start = np.where(kept > 0, found, 0.0)
    assert best is not None
    return best


def _make_room(problem: Problem, held: Held) -> tuple[Held, Ints] | None:
    """Return the copies that stay and the most of every rank, both by layer; None: no room."""
    lost = (~held.any(axis=2)).sum(axis=1)  # [layers]

    def room_beside(kept: Held) -> Ints | None:
        used = kept.sum(axis=1)  # [layers, ranks]
        crowded = used.sum(axis=1) + lost > problem.copies_per_layer
        return None if crowded.any() else deal_room(problem, used, lost)

    if (room := room_beside(held)) is not None:
        return held, room
    kept = one_copy_each(problem, held)
    if kept is None:
        return None
    load = problem.counts.sum(axis=(0, 2)) / np.maximum(held.sum(axis=2), 1)  # [layers, experts]
    spare = np.argwhere(held & ~kept)
    for place in map(tuple, spare[np.argsort(-load[spare[:, 0], spare[:, 1]], kind="stable")]):
        kept[place] = True
        kept[place] = room_beside(kept) is not None
    room = room_beside(kept)
    assert room is not None
    return kept, room
