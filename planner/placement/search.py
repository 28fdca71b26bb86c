"""Good placements fast: greedy, then swaps and moves while they help.

The best of these starts the integer program, and is the answer when it meets the bound at once.
What is placed are items: experts, or copies of experts, which `Limit`s keep apart.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Placement

from .terms import LayerTerms

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How many items of a group may sit in a domain: one copy of an expert on a GPU, say.

    Attributes:
        group: of every item, [items].
        domain: of every cell, [cells].
        most: items, [groups, domains].
    """

    group: Ints
    domain: Ints
    most: Ints

    def count(self, placement: Placement) -> Ints:
        """Return the items placed so far, [groups, domains]; cell -1 is nowhere yet."""
        placed = placement >= 0
        count = np.zeros_like(self.most)
        np.add.at(count, (self.group[placed], self.domain[placement[placed]]), 1)
        return count

    def within(self, items: Ints, cells: Ints) -> "Limit":
        """Return the limit for some items on some cells, which are numbered anew."""
        return Limit(group=self.group[items], domain=self.domain[cells], most=self.most)


class NoRoomError(Exception):
    """No place is left for an item: found by trying, not proven."""


def contiguous(num_experts: int, capacity: Ints) -> Placement:
    """Return experts in id order on GPUs in rank order, as even as capacity [gpus] allows."""
    taken = np.zeros_like(capacity)
    for _ in range(num_experts):
        free = np.where(taken < capacity, taken, num_experts)
        taken[free.argmin()] += 1
    return np.repeat(np.arange(len(capacity)), taken)


def spread(num_items: int, capacity: Ints, limits: Sequence[Limit]) -> Placement:
    """Return a placement that keeps all limits: large groups first, each where most room is.

    For one copy of an expert on a GPU this finds a placement whenever there is one (the greedy
    construction in Gale and Ryser's theorem).

    Raises:
        NoRoomError: an item finds no place.
    """
    size = np.bincount(limits[0].group)[limits[0].group] if limits else np.ones(num_items)
    placement = np.full(num_items, -1)
    left = capacity.copy()
    for item in np.argsort(-size, kind="stable"):
        room = np.where(_open(placement, int(item), left, limits), left, 0)
        cell = int(room.argmax())
        if not room[cell]:
            raise NoRoomError
        placement[item] = cell
        left[cell] -= 1
    return placement


def _open(
    placement: Placement, item: int, left: Ints, limits: Sequence[Limit]
) -> npt.NDArray[np.bool_]:
    """Return the cells that may take an item not placed yet, [cells]."""
    free: npt.NDArray[np.bool_] = left > 0
    for limit in limits:
        group = limit.group[item]
        held = limit.domain[placement[(limit.group == group) & (placement >= 0)]]
        full = np.bincount(held, minlength=limit.most.shape[1]) >= limit.most[group]
        free &= ~full[limit.domain]
    return free


def best_start(
    terms: LayerTerms,
    capacity: Ints,
    seed: int,
    shuffles: int = 3,
    limits: Sequence[Limit] = (),
    deadline: float = inf,
) -> tuple[str, Placement]:
    """Return the best placement found without the solver, and how it was found.

    Args:
        terms: the layer's objective.
        capacity: most experts in every cell, [cells].
        seed: of the shuffled starts.
        shuffles: how many of those.
        limits: on items that belong together.
        deadline: time.monotonic() from which the first start is returned as it is.

    Raises:
        NoRoomError: the limits leave an item no place.
    """
    best: tuple[float, str, Placement] | None = None
    for name, start in _starts(terms, capacity, seed, shuffles, limits):
        better = descend(terms, start, capacity, limits, deadline)
        for label, placement in ((name, start), (f"{name} + swaps", better)):
            seconds = terms.seconds(placement)
            if best is None or seconds < best[0] * _SIGNIFICANT:
                best = seconds, label, placement
        if best and best[0] * _SIGNIFICANT <= terms.floor_s:
            break
        if time.monotonic() >= deadline:
            break
    assert best is not None
    return best[1], best[2]


def _starts(
    terms: LayerTerms, capacity: Ints, seed: int, shuffles: int, limits: Sequence[Limit]
) -> Iterator[tuple[str, Placement]]:
    yield "greedy", greedy(terms, capacity, limits)
    if limits:
        return
    yield "contiguous", contiguous(terms.num_experts, capacity)
    random = np.random.default_rng(seed)
    slots = np.repeat(np.arange(len(capacity)), capacity)
    for number in range(shuffles):
        yield f"shuffle {number}", random.permutation(slots)[: terms.num_experts]


def greedy(terms: LayerTerms, capacity: Ints, limits: Sequence[Limit] = ()) -> Placement:
    """Place the heaviest expert first, each where the objective grows least.

    Raises:
        NoRoomError: the limits leave an item no place.
    """
    weight = sum(phase.weight * phase.alone.min(axis=1) for phase in terms.phases)
    left = capacity.copy()
    loads = [np.zeros(len(phase.rows)) for phase in terms.phases]
    placement = np.full(terms.num_experts, -1)
    for expert in np.argsort(-np.asarray(weight), kind="stable"):
        free = _open(placement, int(expert), left, limits)
        if not free.any():  # too late for this one: begin with what is hard to place
            return spread(terms.num_experts, capacity, limits)
        durations = []
        total = np.zeros(len(capacity))
        for phase, load in zip(terms.phases, loads, strict=True):
            after = load[:, None] + phase.rows[:, expert, :]  # [rows, cells]
            worst = after.max(axis=0, initial=0.0)
            durations.append(np.maximum(worst, phase.alone[expert]))
            total += phase.weight * after.sum(axis=0)
        cost = terms.total(durations)
        # Equal worst rows: the cell that adds least in all.
        order = np.lexsort((total, np.where(free, cost, np.inf)))
        cell = int(order[0])
        placement[expert] = cell
        left[cell] -= 1
        for phase, load in zip(terms.phases, loads, strict=True):
            load += phase.rows[:, expert, cell]
    return placement


def descend(
    terms: LayerTerms,
    start: Placement,
    capacity: Ints,
    limits: Sequence[Limit] = (),
    deadline: float = inf,
) -> Placement:
    """Swap two experts, or move one to a free slot, while the objective falls and time is left."""
    placement = start.copy()
    current = terms.seconds(placement)
    improved = True
    while improved and current * _SIGNIFICANT > terms.floor_s:
        improved = False
        for expert in range(len(placement)):
            if time.monotonic() >= deadline:
                return placement
            seconds, candidate = _best_step(terms, placement, expert, capacity, limits)
            if seconds < current * _SIGNIFICANT:
                current, placement, improved = seconds, candidate, True
    return placement


def _best_step(
    terms: LayerTerms,
    placement: Placement,
    expert: int,
    capacity: Ints,
    limits: Sequence[Limit],
) -> tuple[float, Placement]:
    """Return the best swap or move of one expert, with the objective after it."""
    experts, here = np.arange(len(placement)), placement[expert]
    after_swap, after_move = [], []
    for phase in terms.phases:
        rows, alone = phase.rows, phase.alone
        load = rows[:, experts, placement].sum(axis=1, keepdims=True)
        without = load - rows[:, expert, here][:, None]
        others, all_but_two = largest_without(alone[experts, placement], expert)
        worst = (without + rows[:, expert, :]).max(axis=0, initial=0.0)
        after_move.append(np.maximum(np.maximum(worst, alone[expert]), others))
        exchange = rows[:, experts, here] - rows[:, experts, placement]  # others leave for here
        worst = (without + exchange + rows[:, expert, placement]).max(axis=0, initial=0.0)
        after_swap.append(
            np.maximum.reduce([worst, alone[expert, placement], alone[experts, here], all_but_two])
        )
    swapped, moved = terms.total(after_swap), terms.total(after_move)
    swapped[expert] = np.inf
    moved[np.bincount(placement, minlength=len(capacity)) >= capacity] = np.inf
    for limit in limits:
        full = limit.count(placement) >= limit.most
        forbid(limit, full, placement, expert, moved, swapped)
    candidate = placement.copy()
    if swapped.min() <= moved.min():
        other = int(swapped.argmin())
        candidate[expert], candidate[other] = placement[other], here
        return float(swapped[other]), candidate
    candidate[expert] = int(moved.argmin())
    return float(moved.min()), candidate


def forbid(
    limit: Limit,
    full: npt.NDArray[np.bool_],
    placement: Placement,
    item: int,
    moved: Floats,
    swapped: Floats,
) -> None:
    """Set to infinity what would break the limit: moves [cells] and swaps [items] of one item.

    `full` tells where the limit is reached, [groups, domains].
    """
    group, domain = limit.group, limit.domain
    here, there = domain[placement[item]], domain[placement]
    moved[full[group[item], domain] & (domain != here)] = np.inf
    breaks = full[group[item], there] | full[group, here]
    swapped[breaks & (group != group[item]) & (there != here)] = np.inf


def largest_without(values: Floats, expert: int) -> tuple[float, Floats]:
    """Return the largest value without `expert`, and without it and each other one, [experts]."""
    rest = values.copy()
    rest[expert] = 0.0
    top = int(rest.argmax())
    largest = float(rest[top])
    rest[top] = 0.0
    return largest, np.where(np.arange(len(values)) == top, rest.max(), largest)
