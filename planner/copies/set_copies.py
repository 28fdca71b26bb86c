"""One layer with replicas where it matters which experts tokens choose together, or whole groups.

    1 bound    least reach (`set_bound`), single experts by their copies, slots (`balance_bound`)
    2 start    the copies planned as if every choice travelled by itself; placements without
               replicas for the same transfer; copies on the hosts of whole groups
    3 search   copies more and less, swaps and moves of copies, shares (`copy_search`)

A token's choice goes to one of its expert's copies at random by their shares, from every source
alike; so a copy on another host spreads tokens over more hosts, and one on the same host does not.
Where whole routing groups are kept, all copies of an expert are on its group's host.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from epplan.planner.cost import Shares
from epplan.planner.placement.levels import Effort, Found, LayerPlacement, Report
from epplan.planner.placement.search import NoRoomError
from epplan.planner.together.set_bound import reach_bound
from epplan.planner.together.set_levels import SetTask, place_with_sets, start_with_sets
from epplan.planner.together.whole_groups import (
    GroupTask,
    groups_for_copies,
    least_group_work,
    place_with_groups,
    start_with_groups,
)

from .balance_bound import least_maximum
from .copy_search import CopySearch
from .copy_state import CopyState
from .copy_steps import CopyRules
from .group_copies import copies_in_hosts
from .replicas import bound_with_replicas, place_replicated, start_with_replicas
from .task import ReplicatedTask

_SHARE_BOUND = 0.2  # of the time
_SHARE_START = 0.2  # of the time left, for each placement to start from
_SHARE_SEARCH = 0.5  # of the time left, for the search from it
_NEAR = 1.1  # of the best: further away, swaps and moves are not tried
_KICKS = 20
_SLOTS_PRECISION = 2e-3
_IMPROVED = " + copies moved and shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCopiesTask:
    """One layer to place.

    Attributes:
        with_sets: its tokens; where choices travel by themselves, tokens with one expert each.
        by_counts: as if every choice travelled by itself.
        groups: the router's groups, if hosts have room for whole ones.
        keep_groups: whether they have to stay whole.
        per_choice: choices do travel by themselves.
    """

    with_sets: SetTask
    by_counts: ReplicatedTask
    groups: GroupTask | None
    keep_groups: bool
    per_choice: bool

    @property
    def most_copies(self) -> int:
        """Copies of all experts at most."""
        return len(self.by_counts.load) + self.by_counts.rule.extra

    def rules(self, shares: Shares) -> CopyRules:
        """Return where copies may be; whole groups stay on the hosts where `shares` has them."""
        task, rule = self.by_counts, self.by_counts.rule
        allowed = np.ones(shares.shape, dtype=bool)
        if self.keep_groups:
            allowed = task.host_of_gpu[shares.argmax(axis=1)][:, None] == task.host_of_gpu[None]
        return CopyRules(
            allowed=allowed,
            capacity=task.capacity,
            most_copies=self.most_copies,
            host_of_gpu=task.host_of_gpu,
            least_hosts=rule.least_copies,
            equal_shares=rule.equal_shares,
        )


def start_with_set_copies(task: SetCopiesTask) -> LayerPlacement:
    """Return a placement to start from, with the bound from single experts.

    Raises:
        NoRoomError: there is none on these GPUs.
    """
    layer = task.with_sets.layer
    if task.keep_groups:
        now = Effort(gap=1.0, deadline=time.monotonic(), seed=0)
        found_by, over_hosts = "groups over hosts", _over_hosts(task, now)
        assert over_hosts is not None  # `check_groups`
        shares = _in_hosts(task, over_hosts)
    else:
        start = start_with_replicas(task.by_counts)
        found_by, shares = start.found_by, start.shares(len(task.by_counts.capacity))
    floor_s = layer.floor_with_copies(task.most_copies)
    return _placed(shares, layer.seconds_of_shares(shares), floor_s, found_by)


def place_set_copies(
    task: SetCopiesTask, start: LayerPlacement, effort: Effort, report: Report
) -> LayerPlacement:
    """Return copies, placement and shares of one layer with a proven bound.

    Args:
        task: the layer.
        start: what to improve on.
        effort: when to stop.
        report: takes what is better on the way, for who ends this by Ctrl-C.
    """
    best = start
    if not effort.left_s:
        return best
    over_hosts = _over_hosts(task, effort.part(_SHARE_BOUND))
    best = _proven(task, best, over_hosts, effort.part(_SHARE_BOUND))
    report(best)
    for name, shares in _starts(task, start, over_hosts, effort):
        if best.is_done(effort.gap) or not effort.left_s:
            break
        search = _search(task, shares, effort.part(_SHARE_SEARCH))
        best = _offered(best, search.state, name)
        search.fill()
        if search.state.price.seconds <= _NEAR * best.seconds:
            search.improve()
        best = _offered(best, search.state, f"{name}{_IMPROVED}")
        report(best)
    if not best.is_done(effort.gap) and effort.left_s:
        best = _exchanged(task, best, effort, report)
    return best


def prove_set_copies(task: SetCopiesTask, start: LayerPlacement, effort: Effort) -> LayerPlacement:
    """Return the placement with a bound on all copies with any shares."""
    over_hosts = _over_hosts(task, effort.part(0.5))
    return _proven(task, start, over_hosts, effort)


def _over_hosts(task: SetCopiesTask, effort: Effort) -> Found | None:
    """Return where whole groups may be, with a bound where choices travel by themselves."""
    if task.groups is None or task.by_counts.rule.survive_hosts:
        return None
    extra = task.by_counts.rule.extra
    return groups_for_copies(task.groups, extra, effort, solved=task.per_choice)


def _proven(
    task: SetCopiesTask, start: LayerPlacement, over_hosts: Found | None, effort: Effort
) -> LayerPlacement:
    sets = task.with_sets
    bound_s = reach_bound(
        sets.layer,
        sets.island,
        sets.capacity,
        effort.deadline,
        copies=task.most_copies,
        work_s=_least_work(task, effort.part(0.5)),
    )
    best = start.proven(bound_s)
    if task.per_choice:
        assert over_hosts is not None  # without groups `replicas` plans choices by themselves
        free_s = min(bound_with_replicas(task.by_counts, effort), best.seconds)
        best = replace(best.proven(free_s), free_bound_s=free_s).proven(over_hosts.bound_s)
    return best


def _least_work(task: SetCopiesTask, effort: Effort) -> list[float]:
    """Return what the experts' work lasts at least, [windows].

    Light experts fill slots (`balance_bound`), and whole groups hosts.
    """
    found, capacity = [], task.with_sets.capacity
    for phase in task.with_sets.layer.others:
        if phase.is_compute:
            amount = phase.own_rows()
            assert amount is not None  # a GPU's arithmetic is its own
            by_slots = least_maximum(
                amount.min(axis=1),
                len(capacity),
                int(capacity.max()),
                task.most_copies,
                precision=_SLOTS_PRECISION,
                time_limit_s=effort.left_s,
            )
            found.append(by_slots)
    if task.keep_groups:
        assert task.groups is not None
        by_groups = least_group_work(task.groups, task.by_counts.rule.extra, effort)
        found = [max(pair) for pair in zip(found, by_groups, strict=True)]
    return found


def _starts(
    task: SetCopiesTask, start: LayerPlacement, over_hosts: Found | None, effort: Effort
) -> Iterator[tuple[str, Shares]]:
    num_gpus = len(task.by_counts.capacity)
    if not task.keep_groups:
        with suppress(NoRoomError):
            alone = start_with_replicas(task.by_counts)
            alone = place_replicated(task.by_counts, alone, effort.part(_SHARE_START))
            yield f"{alone.found_by} by counts", alone.shares(num_gpus)
    if not task.by_counts.rule.survive_hosts:  # else one copy is too few
        for one in _without_replicas(task, effort):
            yield one.found_by, one.shares(num_gpus)
    if over_hosts is not None:
        yield "groups over hosts", _in_hosts(task, over_hosts)
    yield start.found_by, start.shares(num_gpus)


def _in_hosts(task: SetCopiesTask, over_hosts: Found) -> Shares:
    """Return copies that stay on the hosts of groups."""
    of = task.by_counts
    host_of_expert = of.host_of_gpu[over_hosts.placement]
    return copies_in_hosts(of.load, host_of_expert, of.host_of_gpu, of.capacity, of.rule.extra)


def _without_replicas(task: SetCopiesTask, effort: Effort) -> Iterator[LayerPlacement]:
    """Yield placements with one copy of each expert, for the same transfer."""
    if task.per_choice:
        return  # groups over hosts are that
    if task.groups is not None:
        start = start_with_groups(task.groups)
        within = effort.part(_SHARE_START)
        yield place_with_groups(task.groups, start, within, lambda better: None)
    if not task.keep_groups:
        start = start_with_sets(task.with_sets)
        within = effort.part(_SHARE_START)
        yield place_with_sets(task.with_sets, start, within, lambda better: None)


def _search(task: SetCopiesTask, shares: Shares, effort: Effort) -> CopySearch:
    state = CopyState(task.with_sets.layer, shares)
    return CopySearch(state, task.rules(shares), effort.deadline)


def _exchanged(
    task: SetCopiesTask, best: LayerPlacement, effort: Effort, report: Report
) -> LayerPlacement:
    """Improve the best by exchanges of copies, then from a few random steps."""
    random = np.random.default_rng(effort.seed)
    num_gpus = len(task.by_counts.capacity)
    for kick in range(1 + _KICKS):
        shares = best.shares(num_gpus)
        search = _search(task, shares, effort)
        if kick:
            search.kick(random)
        search.improve()
        while effort.left_s and search.exchange():
            search.improve()
        found = _offered(best, search.state, f"{best.found_by.removesuffix(_IMPROVED)}{_IMPROVED}")
        if found is not best:
            best = found
            report(best)
        if best.is_done(effort.gap) or not effort.left_s:
            break
    return best


def _offered(best: LayerPlacement, state: CopyState, found_by: str) -> LayerPlacement:
    if state.price.seconds >= best.seconds * (1 - 1e-9):
        return best
    seconds = state.layer.seconds_of_shares(state.shares)
    found = _placed(state.shares, seconds, best.bound_s, found_by)
    return replace(
        found,
        bound_s=min(best.bound_s, seconds),
        floor_s=best.floor_s,
        free_bound_s=best.free_bound_s,
    )


def _placed(shares: Shares, seconds: float, bound_s: float, found_by: str) -> LayerPlacement:
    expert, gpu = np.nonzero(shares)
    return LayerPlacement(
        placement=gpu,
        seconds=seconds,
        bound_s=min(bound_s, seconds),
        found_by=found_by,
        floor_s=bound_s,
        expert=expert,
        share=shares[expert, gpu],
    )
