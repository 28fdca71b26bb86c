"""Swaps of experts where it matters which experts are chosen together.

For one expert, all swaps with another and all moves to a free slot are priced at once, exactly.
What changes is the number of tokens that reach two places of a level (a GPU, an island): where the
expert was the only one of a token's, its old place loses the token; where none was, its new place
gains it; tokens that choose both experts of a swap reach what they reached. How many experts of a
token set are at a place (`hits`) turns all this into sums over the sets of the expert and of its
place.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from epplan.planner.cost import Placement
from epplan.planner.objective import layer_seconds
from epplan.planner.placement.rows import Floats, Ints, PhaseRows
from epplan.planner.placement.search import largest_without
from epplan.planner.token_sets import TokenSets

from .set_rows import SetLayer

_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding
_DOUBLINGS = 3  # exponent 8 of what decides between steps of equal seconds: how level the rows are
_SWAPS_A_KICK = 3

Bools = npt.NDArray[np.bool_]


class SetSearch:
    """A placement of one layer under improvement.

    Args:
        layer: the layer.
        placement: rank of every expert, [experts].
        capacity: most experts on every GPU, [gpus].
        block: of every GPU; experts stay in theirs. None: anywhere.
    """

    def __init__(
        self, layer: SetLayer, placement: Placement, capacity: Ints, block: Ints | None = None
    ) -> None:
        self._layer = layer
        self._capacity = capacity
        self._block = np.zeros(len(capacity), dtype=np.intp) if block is None else block
        self._set(placement)

    def _set(self, placement: Placement) -> None:
        layer = self._layer
        self.placement = placement.astype(np.intp)
        self._windows = [
            _Window(sets, counts, layer.place_of_gpu, self.placement)
            for sets, counts in zip(layer.sets, layer.counts, strict=True)
        ]
        self.seconds, self._level = self._current()

    def descend(self, is_over: Callable[[], bool]) -> None:
        """Take the best step of one expert after another while any helps."""
        improved = True
        while improved and self.seconds * _SIGNIFICANT > self._layer.floor_s:
            improved = False
            for expert in range(self._layer.num_experts):
                if is_over():
                    return
                improved |= self._step(expert)

    def kick(self, random: np.random.Generator) -> None:
        """Swap a few experts at random."""
        placement = self.placement.copy()
        for _ in range(_SWAPS_A_KICK):
            first, second = random.integers(len(placement), size=2)
            if self._block[placement[first]] == self._block[placement[second]]:
                placement[[first, second]] = placement[[second, first]]
        self._set(placement)

    def restart(self, placement: Placement) -> None:
        """Go on from another placement."""
        self._set(placement)

    def _current(self) -> tuple[float, float]:
        """Return seconds and levelness, from scratch."""
        loads = [
            transfer.load(self._windows[transfer.window].reached)
            for transfer in self._layer.transfers
        ]
        durations = [float(load.max(initial=0.0)) for load in loads]
        durations += [phase.seconds(self.placement) for phase in self._layer.others]
        return self._layer.total(durations), float(sum(levelness(load) for load in loads))

    def _step(self, expert: int) -> bool:
        """Take the best swap or move of one expert if it helps."""
        allowed = self._allowed(expert)
        if not allowed.any():
            return False
        seconds, level = self._after(expert)
        seconds = np.where(allowed, seconds, np.inf)
        best = int(seconds.argmin())
        if seconds[best] >= self.seconds * _SIGNIFICANT:
            same = seconds <= self.seconds / _SIGNIFICANT
            level = np.where(same, level, np.inf)
            best = int(level.argmin())
            if not level[best] < self._level * (1 - 1e-6):
                return False
        self._take(expert, best)
        self.seconds, self._level = self._current()
        return True

    def _allowed(self, expert: int) -> Bools:
        """Return which swaps [experts] and moves [gpus] keep capacity and blocks, one array."""
        here = self.placement[expert]
        full = np.bincount(self.placement, minlength=len(self._capacity)) >= self._capacity
        gpus = np.arange(len(self._capacity))
        apart = (gpus != here) & (self._block == self._block[here])
        return np.concatenate([apart[self.placement], apart & ~full])

    def _take(self, expert: int, step: int) -> None:
        num_experts, here = len(self.placement), int(self.placement[expert])
        moved = {expert: int(self._targets()[step])}
        if step < num_experts:
            moved[step] = here
        for window in self._windows:
            window.move(moved)
        for one, gpu in moved.items():
            self.placement[one] = gpu

    def _targets(self) -> Ints:
        """Return the GPU of every swap's partner and of every move."""
        return np.concatenate([self.placement, np.arange(len(self._capacity))])

    def _after(self, expert: int) -> tuple[Floats, Floats]:
        """Return seconds and levelness after every step of one expert, [experts + gpus]."""
        layer, targets = self._layer, self._targets()
        durations: list[Floats] = []
        level = np.zeros(len(targets))
        changes = [window.changes(expert, targets) for window in self._windows]
        for transfer in layer.transfers:
            load = transfer.load(self._windows[transfer.window].reached)[:, None] + sum(
                change.load(matrix)
                for change, matrix in zip(changes[transfer.window], transfer.matrices, strict=True)
            )
            durations.append(load.max(axis=0, initial=0.0))
            level += levelness(load)
        for phase in layer.others:
            make = _compute_after if phase.is_compute else _latency_after
            durations.append(make(phase, self.placement, expert, targets))
        seconds = layer_seconds(layer.objective, layer.constant_s, layer.phases, durations)
        return seconds, level


def levelness(load: Floats) -> Floats:
    """Return a smooth stand-in for the largest row, of [rows] or [rows, candidates]."""
    scale = load.max(initial=1e-300)
    power = load / scale
    for _ in range(_DOUBLINGS):
        power = power * power
    total: Floats = scale * power.sum(axis=0) ** (0.5**_DOUBLINGS)
    return total


class _Change:
    """What steps change at one level: tokens at the old place and at each new one."""

    def __init__(self, here: int, old: Floats, there: Ints, new: Floats) -> None:
        self._here, self._old, self._there, self._new = here, old, there, new  # [steps, sources]

    def load(self, matrix: csc_array) -> Floats:
        """Return the change of every row's seconds, [rows, steps]."""
        steps, num_sources = self._new.shape
        if num_sources == 1:  # a column a place
            dense = matrix.toarray()
            return dense[:, self._there] * self._new[:, 0] + np.outer(
                dense[:, self._here], self._old[:, 0]
            )
        column = (self._there[:, None] * num_sources + np.arange(num_sources)).ravel()
        new = csc_array(
            (self._new.ravel(), column, np.arange(steps + 1) * num_sources),
            shape=(matrix.shape[1], steps),
        )
        first = self._here * num_sources
        total: Floats = (matrix @ new).toarray()
        total += matrix[:, first : first + num_sources] @ self._old.T
        return total


class _Members(NamedTuple):
    """Token sets with one of their experts each, [members]."""

    edge: Ints
    expert: Ints


def _members(sets: TokenSets, edges: Ints) -> _Members:
    experts = sets.experts[edges]
    row, column = np.nonzero(experts >= 0)
    return _Members(edge=edges[row], expert=experts[row, column])


class _Window:
    """One window's tokens under a placement."""

    def __init__(
        self,
        sets: TokenSets,
        counts: Floats,
        place_of_gpu: tuple[Ints, ...],
        placement: Placement,
    ) -> None:
        self.sets, self.counts = sets, counts
        self.members = _members(sets, np.arange(len(sets.weight)))
        order = np.argsort(self.members.expert, kind="stable")
        ends = np.cumsum(np.bincount(self.members.expert, minlength=counts.shape[1]))
        self.edges_of = np.split(self.members.edge[order], ends[:-1])
        self.members_of = [_members(sets, edges) for edges in self.edges_of]
        self._levels = [_Level(self, place, placement) for place in place_of_gpu]

    @property
    def reached(self) -> tuple[Floats, ...]:
        """Tokens that reach the places of each level, [sources, places]."""
        return tuple(level.reached for level in self._levels)

    def changes(self, expert: int, targets: Ints) -> list[_Change]:
        """Return what every step of one expert changes, by level."""
        return [level.change(expert, targets) for level in self._levels]

    def move(self, moved: dict[int, int]) -> None:
        """Put experts on other GPUs."""
        for level in self._levels:
            level.move(moved)

    def by_expert(self, edge: Ints, expert: Ints) -> Floats:
        """Return the tokens of sets, given with one of their experts each, [experts, sources]."""
        num_sources = self.sets.num_sources
        cell = expert * num_sources + self.sets.source[edge]
        size = self.counts.shape[1] * num_sources
        total = np.bincount(cell, weights=self.sets.weight[edge], minlength=size)
        return total.astype(float).reshape(-1, num_sources)


class _Level:
    """Where tokens go at one level of places."""

    def __init__(self, window: _Window, place_of_gpu: Ints, placement: Placement) -> None:
        self._window = window
        self._place_of_gpu = place_of_gpu
        self._place = place_of_gpu[placement]  # of every expert
        sets = window.sets
        self._num_places = int(place_of_gpu.max()) + 1
        self._hits = np.zeros((self._num_places, len(sets.weight)), dtype=np.int16)
        np.add.at(self._hits, (self._place[window.members.expert], window.members.edge), 1)
        self.reached = np.zeros((sets.num_sources, self._num_places))
        self._only = np.zeros_like(window.counts.T)
        self._add(window.members, 1.0)
        self._without: dict[int, Floats] = {}

    def _add(self, members: _Members, sign: float) -> None:
        """Add what some sets give to the tokens of places and of experts alone at theirs."""
        window = self._window
        place = self._place[members.expert]
        hits = self._hits[place, members.edge]
        # A set's experts at a place share out its tokens there.
        source, part = window.sets.source[members.edge], window.sets.weight[members.edge] / hits
        total = np.bincount(
            source * self._num_places + place, weights=part, minlength=self.reached.size
        )
        self.reached = self.reached + sign * total.reshape(self.reached.shape)
        only = hits == 1
        self._only += sign * window.by_expert(members.edge[only], members.expert[only])

    def _tokens_without(self, place: int) -> Floats:
        """Return the tokens of every expert that do not reach a place, [experts, sources]."""
        if place not in self._without:
            window = self._window
            there = np.flatnonzero(self._hits[place, window.members.edge])
            with_place = window.by_expert(window.members.edge[there], window.members.expert[there])
            self._without[place] = window.counts.T - with_place
        return self._without[place]

    def change(self, expert: int, targets: Ints) -> _Change:
        """Return what swaps with every expert and moves to every GPU change, [steps]."""
        window, num_experts = self._window, len(self._place)
        here, there = int(self._place[expert]), self._place_of_gpu[targets]
        own, num_sources = window.edges_of[expert], window.sets.num_sources
        source, weight = window.sets.source, window.sets.weight
        members = window.members_of[expert]
        place = self._place[members.expert]
        hits = self._hits[place, members.edge]

        single = own[self._hits[here, own] == 1]
        lost = np.bincount(source[single], weights=weight[single], minlength=num_sources)
        # A partner that shares the token takes over the place, and leaves the expert its own.
        other = members.expert != expert
        takes = other & (self._hits[here, members.edge] == 1)
        kept = window.by_expert(members.edge[takes], members.expert[takes])
        lonely = other & (hits == 1)
        stays = window.by_expert(members.edge[lonely], members.expert[lonely])
        known = np.bincount(
            place * num_sources + source[members.edge],
            weights=weight[members.edge] / hits,
            minlength=self._num_places * num_sources,
        ).reshape(self._num_places, num_sources)
        gained = window.counts[:, expert] - known  # [places, sources]

        old = np.tile(-lost.astype(float), (len(targets), 1))
        old[:num_experts] += kept + self._tokens_without(here)
        new = gained[there]
        new[:num_experts] += stays - self._only
        old[there == here], new[there == here] = 0.0, 0.0
        return _Change(here, old, there, new)

    def move(self, moved: dict[int, int]) -> None:
        """Put experts on other GPUs."""
        window = self._window
        edges = np.unique(np.concatenate([window.edges_of[expert] for expert in moved]))
        members = _members(window.sets, edges)
        self._add(members, -1.0)
        for expert, gpu in moved.items():
            own, place = window.edges_of[expert], int(self._place_of_gpu[gpu])
            self._hits[self._place[expert], own] -= 1
            self._hits[place, own] += 1
            self._without.pop(int(self._place[expert]), None)
            self._without.pop(place, None)
            self._place[expert] = place
        self._add(members, 1.0)


def _compute_after(phase: PhaseRows, placement: Placement, expert: int, targets: Ints) -> Floats:
    """Return the experts' seconds after every step: two rows a GPU, arithmetic and reading."""
    num_experts, num_gpus = len(placement), phase.alone.shape[1]
    load, here = phase.load(placement), int(placement[expert])
    worst = np.zeros(len(targets))
    steps = np.arange(len(targets))
    for first in range(0, len(load), num_gpus):
        own, each = load[first : first + num_gpus], phase.extra[first : first + num_gpus]
        there = own[targets] + each[targets, expert]
        there[:num_experts] -= each[placement, np.arange(num_experts)]
        back = np.full(len(targets), own[here] - each[here, expert])
        back[:num_experts] += each[here]
        top = np.argsort(-own, kind="stable")[:3]
        touched = (top[None, :] == here) | (top[None, :] == targets[:, None])
        rest = np.where(touched, 0.0, own[top])[steps].max(axis=1)
        worst = np.maximum.reduce([worst, there, back, rest])
    return worst


def _latency_after(phase: PhaseRows, placement: Placement, expert: int, targets: Ints) -> Floats:
    """Return the longest path after every step."""
    experts, here = np.arange(len(placement)), placement[expert]
    others, all_but_two = largest_without(phase.alone[experts, placement], expert)
    after = np.maximum(phase.alone[expert, targets], others)
    after[: len(experts)] = np.maximum.reduce(
        [phase.alone[expert, placement], phase.alone[experts, here], all_but_two]
    )
    return np.asarray(after)
