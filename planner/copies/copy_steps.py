"""Swaps of one copy with another expert's, and its moves to free slots, priced at once.

With a and b the shares that change places between GPUs g and h, rows grow by what both experts'
changes add, which is linear, and by a b times what the two spare each other at each place
(`copy_reach`), which is at least 0. So the linear part is no more than the price. Steps are priced
exactly from the most promising on, until no other can be better.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from epplan.planner.cost import Floats
from epplan.planner.placement.rows import Ints

from .copy_state import Bools, CopyState, Price

_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding
_LEVELLER = 1 - 1e-6
_LOOKED_AT = 16  # steps of one copy that are priced exactly at most
_TOP = 3  # longest paths, of which a step changes two at most


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRules:
    """Where copies may be.

    Attributes:
        allowed: [experts, gpus].
        capacity: most copies on every GPU, [gpus].
        most_copies: of all experts.
        host_of_gpu: [gpus].
        least_hosts: hosts that every expert has copies on.
        equal_shares: copies of an expert take equal shares.
    """

    allowed: Bools
    capacity: Ints
    most_copies: int
    host_of_gpu: Ints
    least_hosts: int
    equal_shares: bool

    def on_hosts(self, shares: Floats) -> bool:
        """Whether an expert with these shares, [gpus], is on enough hosts."""
        return (
            self.least_hosts < 2
            or len(set(self.host_of_gpu[shares > 0].tolist())) >= self.least_hosts
        )


def is_better(price: Price, than: Price) -> bool:
    """Whether seconds gain, or rows are more level in the same seconds."""
    if price.seconds < than.seconds * _SIGNIFICANT:
        return True
    return price.seconds <= than.seconds / _SIGNIFICANT and price.level < than.level * _LEVELLER


class CopySteps:
    """All steps of one copy that keep the rules, with what they cost at least.

    Args:
        state: the present shares.
        rules: where copies may be.
        expert: of the copy.
        gpu: of the copy.
    """

    def __init__(self, state: CopyState, rules: CopyRules, expert: int, gpu: int) -> None:
        self._state, self._expert, self._gpu = state, expert, gpu
        self._share = float(state.shares[expert, gpu])
        shares = state.shares
        other, there = np.nonzero(shares)
        swaps = (shares[expert, there] == 0) & (shares[other, gpu] == 0) & (there != gpu)
        swaps &= rules.allowed[expert, there] & rules.allowed[other, gpu]
        free = (state.held < rules.capacity) & (shares[expert] == 0) & rules.allowed[expert]
        moves = np.flatnonzero(free)
        self._other = np.concatenate([other[swaps], np.full(len(moves), -1)])
        self._there = np.concatenate([there[swaps], moves])
        if rules.least_hosts > 1:
            kept = [
                all(rules.on_hosts(after) for after in self.after(step).values())
                for step in range(len(self))
            ]
            self._other, self._there = self._other[kept], self._there[kept]
        # A move is a swap with no share of any expert.
        self._part = np.where(self._other < 0, 0.0, shares[self._other, self._there])

    def __len__(self) -> int:
        return len(self._there)

    def after(self, step: int) -> dict[int, Floats]:
        """Return the shares of the experts that a step changes, [gpus] each."""
        expert, gpu, shares = self._expert, self._gpu, self._state.shares
        other, there = int(self._other[step]), int(self._there[step])
        changed = {expert: shares[expert].copy()}
        changed[expert][[gpu, there]] = 0.0, self._share
        if other >= 0:
            changed[other] = shares[other].copy()
            changed[other][[gpu, there]] = shares[other, there], 0.0
        return changed

    def best(self) -> Mapping[int, Floats] | None:
        """Return the shares that the best step changes, or None if none helps."""
        if not len(self):
            return None
        now = self._state.price
        loads, work, paths = self._loads(), self._work(), self._paths()
        seconds, level = self._state.total(loads, work, paths)
        best, taken = now, -1
        for step in self._promising(seconds, level):
            if taken >= 0 and seconds[step] >= best.seconds * _SIGNIFICANT:
                break
            price = self._exact(step, loads, work, paths)
            if is_better(price, best):
                best, taken = price, step
        return self.after(taken) if taken >= 0 else None

    def _promising(self, seconds: Floats, level: Floats) -> list[int]:
        """Return the steps that may gain seconds, the best first, or else those that may level."""
        now = self._state.price
        faster = np.flatnonzero(seconds < now.seconds * _SIGNIFICANT)
        faster = faster[np.argsort(seconds[faster], kind="stable")]
        same = np.flatnonzero(
            (seconds >= now.seconds * _SIGNIFICANT)
            & (seconds <= now.seconds / _SIGNIFICANT)
            & (level < now.level * _LEVELLER)
        )
        same = same[np.argsort(level[same], kind="stable")]
        order: list[int] = np.concatenate([faster[:_LOOKED_AT], same[:_LOOKED_AT]]).tolist()
        return order

    def _loads(self) -> list[Floats]:
        """Return what the rows of transfers are at least, [rows, steps] each."""
        state, found = self._state, []
        changes = [self._tokens(window) for window in range(len(state.reach))]
        for transfer, load, rows in zip(
            state.layer.transfers, state.loads, state.rows, strict=True
        ):
            after = np.repeat(load[:, None], len(self), axis=1)
            for of_level, (here, old, there, new) in zip(
                rows, changes[transfer.window], strict=True
            ):
                after += of_level.at(here, old) + of_level.each(there, new)
            found.append(after)
        return found

    def _tokens(self, window: int) -> list[tuple[int, Floats, Ints, Floats]]:
        """Return by level: the place left and what it gets; those entered and what they get."""
        found = []
        share, part, other = self._share, self._part[:, None], self._other
        for level in self._state.reach[window]:
            here, there = int(level.place_of_gpu[self._gpu]), level.place_of_gpu[self._there]
            own = level.slope[self._expert]
            old = part * level.slope[other, :, here] - share * own[:, here]
            new = share * own[:, there].T - part * level.slope[other, :, there]
            old[there == here], new[there == here] = 0.0, 0.0
            found.append((here, old, there, new))
        return found

    def _work(self) -> dict[int, tuple[Floats, Floats]]:
        found, steps = {}, np.arange(len(self))
        expert, gpu, other, there = self._expert, self._gpu, self._other, self._there
        copy = np.where(other < 0, 0.0, 1.0)
        for number, of in self._state.works.items():
            parts = []
            for now, each, own, theirs in (
                (self._state.work[number][0], of.arithmetic, self._share, self._part),
                (self._state.work[number][1], of.reading, 1.0, copy),
            ):
                after = np.repeat(now[:, None], len(self), axis=1)
                after[gpu] += theirs * each[gpu, other] - own * each[gpu, expert]
                after[there, steps] += own * each[there, expert] - theirs * each[there, other]
                parts.append(after)
            found[number] = (parts[0], parts[1])
        return found

    def _paths(self) -> dict[int, Floats]:
        """Return the longest path after every step, [steps]."""
        shares, gpus = self._state.shares, self._state.shares.shape[1]
        copies = np.flatnonzero(shares)
        gone = np.stack(
            [
                np.full(len(self), self._expert * gpus + self._gpu),
                np.where(self._other < 0, -1, self._other * gpus + self._there),
            ]
        )
        found = {}
        for number, alone in self._state.paths.items():
            longest = copies[np.argsort(-alone.flat[copies], kind="stable")[:_TOP]]
            left = ~(longest[:, None, None] == gone[None]).any(axis=1)
            rest = np.where(left, alone.flat[longest][:, None], 0.0).max(axis=0, initial=0.0)
            back = np.where(self._other < 0, 0.0, alone[self._other, self._gpu])
            found[number] = np.maximum.reduce([rest, alone[self._expert, self._there], back])
        return found

    def _exact(
        self,
        step: int,
        loads: list[Floats],
        work: dict[int, tuple[Floats, Floats]],
        paths: dict[int, Floats],
    ) -> Price:
        """Return the price of a step."""
        state, other, there = self._state, int(self._other[step]), int(self._there[step])
        exact = [load[:, [step]] for load in loads]
        if other >= 0:
            product = self._share * float(self._part[step])
            for number, transfer in enumerate(state.layer.transfers):
                for level, rows in zip(
                    state.reach[transfer.window], state.rows[number], strict=True
                ):
                    places = {int(level.place_of_gpu[gpu]) for gpu in (self._gpu, there)}
                    for place in places if len(places) > 1 else ():
                        spared = level.spared(self._expert, other, place)
                        exact[number] += rows.at(place, product * spared[None])
        seconds, level_of = state.total(
            exact,
            {n: (parts[0][:, [step]], parts[1][:, [step]]) for n, parts in work.items()},
            {n: path[[step]] for n, path in paths.items()},
        )
        return Price(float(seconds[0]), float(level_of[0]))
