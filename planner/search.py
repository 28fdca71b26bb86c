"""Good placements fast: greedy, then swaps and moves while they help.

The best of these starts the integer program, and is the answer when it meets the bound at once.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .cost import Placement
from .terms import LayerTerms

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding


def contiguous(num_experts: int, capacity: Ints) -> Placement:
    """Return experts in id order on GPUs in rank order, as even as capacity [gpus] allows."""
    taken = np.zeros_like(capacity)
    for _ in range(num_experts):
        free = np.where(taken < capacity, taken, num_experts)
        taken[free.argmin()] += 1
    return np.repeat(np.arange(len(capacity)), taken)


def best_start(
    terms: LayerTerms, capacity: Ints, seed: int, shuffles: int = 3
) -> tuple[str, Placement]:
    """Return the best placement found without the solver, and how it was found.

    Args:
        terms: the layer's objective.
        capacity: most experts in every cell, [cells].
        seed: of the shuffled starts.
        shuffles: how many of those.
    """
    best: tuple[float, str, Placement] | None = None
    for name, start in _starts(terms, capacity, seed, shuffles):
        better = descend(terms, start, capacity)
        for label, placement in ((name, start), (f"{name} + swaps", better)):
            seconds = terms.seconds(placement)
            if best is None or seconds < best[0] * _SIGNIFICANT:
                best = seconds, label, placement
        if best and best[0] * _SIGNIFICANT <= terms.floor_s:
            break
    assert best is not None
    return best[1], best[2]


def _starts(
    terms: LayerTerms, capacity: Ints, seed: int, shuffles: int
) -> Iterator[tuple[str, Placement]]:
    yield "contiguous", contiguous(terms.num_experts, capacity)
    yield "greedy", greedy(terms, capacity)
    random = np.random.default_rng(seed)
    slots = np.repeat(np.arange(len(capacity)), capacity)
    for number in range(shuffles):
        yield f"shuffle {number}", random.permutation(slots)[: terms.num_experts]


def greedy(terms: LayerTerms, capacity: Ints) -> Placement:
    """Place the heaviest expert first, each where the objective grows least."""
    weight = sum(phase.weight * phase.alone.min(axis=1) for phase in terms.phases)
    left = capacity.copy()
    loads = [np.zeros(len(phase.rows)) for phase in terms.phases]
    placement = np.zeros(terms.num_experts, dtype=np.intp)
    for expert in np.argsort(-np.asarray(weight), kind="stable"):
        durations = []
        total = np.zeros(len(capacity))
        for phase, load in zip(terms.phases, loads, strict=True):
            after = load[:, None] + phase.rows[:, expert, :]  # [rows, cells]
            worst = after.max(axis=0, initial=0.0)
            durations.append(np.maximum(worst, phase.alone[expert]))
            total += phase.weight * after.sum(axis=0)
        cost = terms.total(durations)
        # Equal worst rows: the cell that adds least in all.
        order = np.lexsort((total, np.where(left > 0, cost, np.inf)))
        cell = int(order[0])
        placement[expert] = cell
        left[cell] -= 1
        for phase, load in zip(terms.phases, loads, strict=True):
            load += phase.rows[:, expert, cell]
    return placement


def descend(terms: LayerTerms, start: Placement, capacity: Ints) -> Placement:
    """Swap two experts, or move one to a free slot, while the objective falls."""
    placement = start.copy()
    current = terms.seconds(placement)
    improved = True
    while improved and current * _SIGNIFICANT > terms.floor_s:
        improved = False
        for expert in range(len(placement)):
            seconds, candidate = _best_step(terms, placement, expert, capacity)
            if seconds < current * _SIGNIFICANT:
                current, placement, improved = seconds, candidate, True
    return placement


def _best_step(
    terms: LayerTerms, placement: Placement, expert: int, capacity: Ints
) -> tuple[float, Placement]:
    """Return the best swap or move of one expert, with the objective after it."""
    experts, here = np.arange(len(placement)), placement[expert]
    after_swap, after_move = [], []
    for phase in terms.phases:
        rows, alone = phase.rows, phase.alone
        load = rows[:, experts, placement].sum(axis=1, keepdims=True)
        without = load - rows[:, expert, here][:, None]
        others, all_but_two = _largest_without(alone[experts, placement], expert)
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
    candidate = placement.copy()
    if swapped.min() <= moved.min():
        other = int(swapped.argmin())
        candidate[expert], candidate[other] = placement[other], here
        return float(swapped[other]), candidate
    candidate[expert] = int(moved.argmin())
    return float(moved.min()), candidate


def _largest_without(values: Floats, expert: int) -> tuple[float, Floats]:
    """Return the largest value without `expert`, and without it and each other one, [experts]."""
    rest = values.copy()
    rest[expert] = 0.0
    top = int(rest.argmax())
    largest = float(rest[top])
    rest[top] = 0.0
    return largest, np.where(np.arange(len(values)) == top, rest.max(), largest)
