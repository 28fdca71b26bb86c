"""How many tokens reach places where experts have copies, kept up to date while shares change.

A token's choice of expert e goes to place p with e's share there, q[e,p], drawn by itself:

    reached[s,p] = sum over token sets u of source s of  w[u] (1 - prod over e in u of (1 - q[e,p]))
    slope[e,s,p] = d reached / d q[e,p]             sum over u with e of w[u] prod over the rest
    spared[s,p]  = - d2 reached / d q[e,p] d q[f,p]  sum over u with both of w[u] prod over the rest

Each q enters linearly, so these say exactly what one expert's change is worth, or two experts'.
"""

from copy import copy

import numpy as np

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.rows import Ints
from epplan.planner.token_sets import TokenSets


class CopyReach:
    """One window's tokens at one level of places.

    Args:
        sets: the tokens.
        counts: their assignments, [sources, experts].
        place_of_gpu: [gpus].
        shares: of every expert's rows on each GPU, [experts, gpus].
    """

    def __init__(self, sets: TokenSets, counts: Floats, place_of_gpu: Ints, shares: Shares) -> None:
        self._sets, self._counts = sets, counts
        self.place_of_gpu = place_of_gpu
        num_experts, num_places = len(shares), int(place_of_gpu.max()) + 1
        # No expert (-1) is the last, and is nowhere.
        self._experts = np.where(sets.experts < 0, num_experts, sets.experts)
        set_of, column = np.nonzero(sets.experts >= 0)
        expert = sets.experts[set_of, column]
        order = np.argsort(expert, kind="stable")
        ends = np.cumsum(np.bincount(expert, minlength=num_experts))
        self._sets_of = np.split(set_of[order], ends[:-1])
        at_place = shares @ np.eye(num_places)[place_of_gpu]
        self._missed = np.concatenate([1.0 - at_place, np.ones((1, num_places))])
        self.reached = np.zeros((sets.num_sources, num_places))
        self.slope = np.zeros((num_experts, sets.num_sources, num_places))
        for place in range(num_places):
            self._fill(place, np.flatnonzero(at_place[:, place]))

    def _fill(self, place: int, experts: Ints) -> None:
        """Compute one place from nothing, for the experts that are there."""
        there = np.zeros(len(self._sets.weight), dtype=bool)
        for expert in experts.tolist():
            there[self._sets_of[expert]] = True
        chosen = np.flatnonzero(there)
        missed = self._missed[self._experts[chosen], place]
        weight = self._sets.weight[chosen]
        self.reached[:, place] = np.bincount(
            self._sets.source[chosen],
            weights=weight * (1.0 - missed.prod(axis=1)),
            minlength=self._sets.num_sources,
        )
        taken = self._by_expert(chosen, 1.0 - _all_but_one(missed))
        self.slope[:, :, place] = self._counts.T - taken

    def _by_expert(self, chosen: Ints, part: Floats) -> Floats:
        """Add up parts of the weight of sets, [sets, k], by expert and source."""
        num_experts, num_sources = len(self._missed) - 1, self._sets.num_sources
        cell = self._experts[chosen] * num_sources + self._sets.source[chosen][:, None]
        total = np.bincount(
            cell.ravel(),
            weights=(self._sets.weight[chosen][:, None] * part).ravel(),
            minlength=(num_experts + 1) * num_sources,
        )
        return total.astype(np.float64).reshape(num_experts + 1, num_sources)[:num_experts]

    @property
    def at_place(self) -> Floats:
        """Share of every expert at every place, [experts, places]."""
        return 1.0 - self._missed[:-1]

    def copy(self) -> "CopyReach":
        """Return the same, to go back to."""
        other = copy(self)
        other._missed, other.slope = self._missed.copy(), self.slope.copy()
        other.reached = self.reached.copy()
        return other

    def spared(self, expert: int, other: int, place: int) -> Floats:
        """Return how much two experts spare each other at a place, [sources]."""
        own = self._sets_of[expert]
        chosen = own[(self._experts[own] == other).any(axis=1)]
        experts = self._experts[chosen]
        missed = np.where(
            (experts == expert) | (experts == other), 1.0, self._missed[experts, place]
        )
        total = np.bincount(
            self._sets.source[chosen],
            weights=self._sets.weight[chosen] * missed.prod(axis=1),
            minlength=self._sets.num_sources,
        )
        return total.astype(np.float64)

    def change(self, expert: int, more: Floats) -> None:
        """Give an expert more, or less, of a share on GPUs, [gpus]."""
        at_place = np.bincount(self.place_of_gpu, weights=more, minlength=self.reached.shape[1])
        chosen = self._sets_of[expert]
        own = self._experts[chosen] == expert
        for place in np.flatnonzero(at_place).tolist():
            missed = np.where(own, 1.0, self._missed[self._experts[chosen], place])
            seconds = self._by_expert(chosen, _all_but_one(missed))
            seconds[expert] = 0.0
            self.reached[:, place] += at_place[place] * self.slope[expert, :, place]
            self.slope[:, :, place] -= at_place[place] * seconds
            self._missed[expert, place] -= at_place[place]


def _all_but_one(values: Floats) -> Floats:
    """Return for every column the product of all others, [sets, k]."""
    before, after = np.ones_like(values), np.ones_like(values)
    np.cumprod(values[:, :-1], axis=1, out=before[:, 1:])
    after[:, :-1] = np.cumprod(values[:, :0:-1], axis=1)[:, ::-1]
    return before * after
