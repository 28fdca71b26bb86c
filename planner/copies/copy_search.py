"""Copies made, moved, swapped and given up while that helps, with their shares (`set_shares`)."""

import time

import numpy as np

from epplan.planner.cost import Floats, Shares
from epplan.planner.placement.rows import Ints

from .copy_state import CopyState, Price
from .copy_steps import CopyRules, CopySteps, is_better
from .set_shares import share_out

_HOT = 6  # experts that load a phase's worst row most: one of them may get one more copy
_PARTS = (1.0, 0.5)  # of an even share, for a copy more
_LOOKED_AT = 6  # copies more that are priced with the room they need
_LIGHTEST = 3  # copies on a full GPU, one of which may make room
_GIVEN_UP = 4  # copies that cost least to give up, each tried in exchange for another
_SWAPS_A_KICK = 3
_LEAST_GAIN = 1e-5  # of the seconds, by a round of everything


class CopySearch:
    """Copies and shares of one layer under improvement.

    Args:
        state: to begin with.
        rules: where copies may be.
        deadline: when to stop (time.monotonic).
    """

    def __init__(self, state: CopyState, rules: CopyRules, deadline: float) -> None:
        self.state, self._rules, self._deadline = state, rules, deadline

    def improve(self) -> None:
        """Swap, move, make copies and share out while any helps."""
        while not self._is_over():
            before = self.state.price
            self.fill()
            self._descend()
            if not self.state.price.seconds < before.seconds * (1 - _LEAST_GAIN):
                break
        self.state.restart(self.state.shares)

    def fill(self) -> None:
        """Make copies while that helps, and share out."""
        while not self._is_over() and (more := self._added(self.state)) is not None:
            self.state = more
        if not self._rules.equal_shares:
            self.state = share_out(self.state, self._deadline)

    def exchange(self) -> bool:
        """Give one copy up and make another one, if some such exchange helps."""
        for _, expert, shares in self._drops()[:_GIVEN_UP]:
            if self._is_over():
                break
            tried = self.state.copy()
            tried.change({expert: shares})
            tried = self._added(tried) or tried
            if is_better(tried.price, self.state.price):
                self.state = tried
                return True
        return False

    def kick(self, random: np.random.Generator) -> None:
        """Swap or move a few copies at random."""
        for _ in range(_SWAPS_A_KICK):
            copies = np.argwhere(self.state.shares > 0)
            expert, gpu = copies[random.integers(len(copies))].tolist()
            steps = CopySteps(self.state, self._rules, expert, gpu)
            if len(steps):
                self.state.change(steps.after(int(random.integers(len(steps)))))

    def _is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def _descend(self) -> None:
        """Take the best step of one copy after another while any helps."""
        improved = True
        while improved:
            improved = False
            for expert, gpu in np.argwhere(self.state.shares > 0).tolist():
                if self._is_over():
                    return
                if not self.state.shares[expert, gpu]:  # it has been swapped away
                    continue
                changed = CopySteps(self.state, self._rules, expert, gpu).best()
                if changed is not None:
                    self.state.change(changed)
                    improved = True

    def _added(self, state: CopyState) -> CopyState | None:
        """Return it with the copy more that helps most, if one does and may be made."""
        if state.held.sum() >= self._rules.most_copies:
            return None
        found = []
        for expert in _hot(state):
            gpus, after = self._one_more(state, expert)
            prices = state.along(expert, after)
            found += list(zip(prices, [expert] * len(gpus), gpus.tolist(), after, strict=True))
        helping = [one for one in found if is_better(one[0], state.price)]
        for _, expert, gpu, shares in sorted(helping, key=lambda one: one[0])[:_LOOKED_AT]:
            tried = self._with_room(state, gpu)
            if tried is not None:
                tried.change({expert: shares})
                if is_better(tried.price, state.price):
                    return tried
        return None

    def _one_more(self, state: CopyState, expert: int) -> tuple[Ints, Shares]:
        """Return GPUs for one more copy of the expert, [n], and its shares then, [n, gpus]."""
        own, rules = state.shares[expert], self._rules
        gpus = np.flatnonzero((own == 0) & rules.allowed[expert] & (rules.capacity > 0))
        even = 1.0 / (np.count_nonzero(own) + 1)
        found = []
        for part in _PARTS[:1] if rules.equal_shares else _PARTS:
            after = np.repeat((1.0 - part * even) * own[None], len(gpus), axis=0)
            after[np.arange(len(gpus)), gpus] = part * even
            found.append(after)
        return np.tile(gpus, len(found)), np.concatenate(found)

    def _with_room(self, state: CopyState, gpu: int) -> CopyState | None:
        """Return it with a free slot on a GPU, for which a light copy goes where it costs least."""
        rules = self._rules
        free = state.held < rules.capacity
        other = state.copy()
        if free[gpu]:
            return other
        load = state.layer.counts.sum(axis=(0, 1)) * state.shares[:, gpu]
        light = np.flatnonzero(load)
        best: tuple[Price, int, Floats] | None = None
        for expert in light[np.argsort(load[light], kind="stable")][:_LIGHTEST].tolist():
            own = state.shares[expert]
            there = np.flatnonzero(free & (own == 0) & rules.allowed[expert])
            after = np.repeat(own[None], len(there), axis=0)
            after[np.arange(len(there)), there] = own[gpu]
            after[:, gpu] = 0.0
            after = after[[rules.on_hosts(shares) for shares in after]]
            for price, shares in zip(state.along(expert, after), after, strict=True):
                if best is None or price < best[0]:
                    best = price, expert, shares
        if best is None:
            return None
        other.change({best[1]: best[2]})
        return other

    def _drops(self) -> list[tuple[Price, int, Floats]]:
        """Return price, expert and shares of every copy less, the cheapest first."""
        found = []
        for expert in np.flatnonzero((self.state.shares > 0).sum(axis=1) > 1).tolist():
            own = self.state.shares[expert]
            gpus = np.flatnonzero(own)
            after = np.repeat(own[None], len(gpus), axis=0)
            after[np.arange(len(gpus)), gpus] = 0.0
            after /= after.sum(axis=1, keepdims=True)
            after = after[[self._rules.on_hosts(shares) for shares in after]]
            prices = self.state.along(expert, after)
            found += [(price, expert, one) for price, one in zip(prices, after, strict=True)]
        return sorted(found, key=lambda drop: drop[0])


def _hot(state: CopyState) -> list[int]:
    """Return the experts that load the worst row of any phase most."""
    found: set[int] = set()

    def take(amount: Floats) -> None:
        found.update(np.argsort(-amount, kind="stable")[:_HOT].tolist())

    for number, transfer in enumerate(state.layer.transfers):
        worst = int(state.loads[number].argmax())
        amount = np.zeros(len(state.shares))
        for level, rows in zip(state.reach[transfer.window], state.rows[number], strict=True):
            amount += np.einsum("ps,esp,ep->e", rows.row(worst), level.slope, level.at_place)
        take(amount)
    for number, of in state.works.items():
        worst = int(state.work[number][0].argmax())
        take(of.arithmetic[worst] * state.shares[:, worst])
    return sorted(found)
