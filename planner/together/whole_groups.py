"""One layer whose routing groups stay whole: all experts of a group on one host.

A router that keeps a token to g of G groups of experts then sends it to g hosts at most, and
engines count on that. Groups are ranges of ids, of equal size. Hosts take whole groups, so the
program over hosts has groups as items: what a group adds to a row is the sum of what its experts
add at least, and its bound holds for all placements that keep groups whole. Inside a host experts
are free.
"""

from dataclasses import dataclass, replace

import numpy as np

from epplan.errors import InfeasibleError
from epplan.planner.cost import Placement
from epplan.planner.objective import Objective
from epplan.planner.placement.levels import (
    Effort,
    Found,
    LayerPlacement,
    Limits,
    Report,
    fill_cells,
    place_layer,
    run_program,
)
from epplan.planner.placement.rows import Ints, LayerRows
from epplan.planner.placement.search import best_start
from epplan.planner.placement.terms import LayerTerms, cell_terms
from epplan.planner.problem import Problem

from .set_bound import reach_bound
from .set_levels import SetTask
from .set_search import SetSearch

_SHARE_FREE = 0.25  # of the time left, for the bound without whole groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTask:
    """One layer to place.

    Attributes:
        rows: its rows; by counts alone where `with_sets` is given.
        with_sets: its tokens, where it matters which experts are chosen together.
        groups: number of routing groups.
        host_of_gpu: [gpus].
        cells: `RowBuilder.cells`, [gpus].
        capacity: most experts on every GPU, [gpus].
    """

    rows: LayerRows
    with_sets: SetTask | None
    groups: int
    host_of_gpu: Ints
    cells: Ints
    capacity: Ints

    @property
    def group_of_expert(self) -> Ints:
        """Routing group of every expert, [experts]."""
        number: Ints = np.arange(self.rows.num_experts) * self.groups // self.rows.num_experts
        return number

    @property
    def room(self) -> Ints:
        """Most groups on every host, [hosts]."""
        size = self.rows.num_experts // self.groups
        room = np.bincount(self.host_of_gpu, weights=self.capacity)
        return room.astype(np.int64) // size

    @property
    def fit(self) -> bool:
        """Whether hosts have room for all groups."""
        return bool(self.room.sum() >= self.groups)

    def seconds(self, placement: Placement) -> float:
        """Return the cost of a placement, [experts]."""
        form = self.rows if self.with_sets is None else self.with_sets.layer
        return form.seconds(placement)

    @property
    def floor_s(self) -> float:
        """A bound from single experts."""
        return (self.rows if self.with_sets is None else self.with_sets.layer).floor_s


def check_groups(problem: Problem, capacity: Ints) -> None:
    """Refuse groups that no host, or too few hosts, can hold whole.

    Args:
        problem: the problem.
        capacity: most experts of every layer on every GPU, [layers, gpus].

    Raises:
        InfeasibleError: with the room of every host.
    """
    groups, experts = problem.model.router.groups, problem.model.num_experts
    size = experts // groups
    for layer, of_layer in enumerate(capacity):
        room = np.bincount(problem.host_of_gpu, weights=of_layer).astype(np.int64)
        held = int((room // size).sum())
        if held < groups:
            raise InfeasibleError(
                f"--keep-groups: layer {problem.model.moe_layers[layer]} has {groups} routing "
                f"groups of {size} experts, and the hosts hold {held} whole ones",
                problems=[
                    f"{host} has room for {number} experts of a layer: {number // size} groups"
                    for host, number in zip(problem.hosts, room.tolist(), strict=True)
                ],
                hints=[
                    "allow more experts on a GPU (--experts-per-gpu), or use more GPUs (--ep)",
                    "leave out --keep-groups: the engine then sends a token to more hosts",
                ],
            )


def start_with_groups(task: GroupTask) -> LayerPlacement:
    """Return groups in order on hosts in order, with the bound from single experts."""
    placement = _filled(task, _in_order(task), deadline=0.0)
    return LayerPlacement(
        placement=placement,
        seconds=task.seconds(placement),
        bound_s=task.floor_s,
        found_by="groups in order",
        floor_s=task.floor_s,
    )


def place_with_groups(
    task: GroupTask, start: LayerPlacement, effort: Effort, report: Report
) -> LayerPlacement:
    """Return a placement that keeps groups whole, with a bound on all that do.

    Args:
        task: the layer.
        start: what to improve on.
        effort: when to stop.
        report: takes what is better on the way, for who ends this by Ctrl-C.
    """
    best = start
    terms = _group_terms(task)
    name, hosts = best_start(terms, task.room, effort.seed, deadline=effort.deadline)
    best = _offered(task, best, hosts, f"{name} over groups", effort)
    report(best)
    if task.with_sets is not None:
        best = _improved(task, best, effort)
        sets = task.with_sets
        work_s = least_group_work(task, 0, effort.part(_SHARE_FREE))
        bound_s = reach_bound(
            sets.layer, sets.island, sets.capacity, effort.deadline, work_s=work_s
        )
        return best.proven(bound_s)
    best = replace(best, free_bound_s=_free_bound(task, effort))
    best = best.proven(max(terms.floor_s, best.free_bound_s or 0.0))
    report(best)
    if not best.is_done(effort.gap):
        with run_program(terms, task.room, hosts, effort) as found:
            best = _offered(task, best, found.placement, "integer program over groups", effort)
            best = best.proven(found.bound_s)
            report(best)
    return best


def groups_for_copies(task: GroupTask, extra: int, effort: Effort, *, solved: bool) -> Found:
    """Return a placement to make copies from, and what no copies of whole groups go below.

    All copies of a group's experts are on its host, so over hosts rows are those of one copy each.
    What one expert causes on one GPU is divided by the copies it may have there; a path is not.

    Args:
        task: the layer, by counts.
        extra: copies of all experts on top of one each.
        effort: when to stop.
        solved: by the integer program; else the bound is that of single experts.
    """
    terms = _copies_terms(task, extra)
    _, hosts = best_start(terms, task.room, effort.seed, deadline=effort.deadline)
    bound_s = terms.floor_s
    if solved and effort.left_s:
        with run_program(terms, task.room, hosts, effort) as found:
            hosts, bound_s = found.placement, max(bound_s, found.bound_s)
    return Found(placement=_filled(task, hosts, effort.deadline), bound_s=bound_s)


def least_group_work(task: GroupTask, extra: int, effort: Effort) -> list[float]:
    """Return what the experts' work lasts at least with whole groups on hosts, [windows].

    Args:
        task: the layer.
        extra: copies of all experts on top of one each.
        effort: when to stop.
    """
    found = []
    for phase in _copies_terms(task, extra).phases:
        if phase.is_compute:
            alone = LayerTerms(
                phases=(replace(phase, window=0, weight=1.0),),
                constant_s=np.zeros(1),
                objective=Objective(),
            )
            found.append(alone.floor_s)
            _, hosts = best_start(alone, task.room, effort.seed, deadline=effort.deadline)
            if effort.left_s:
                with run_program(alone, task.room, hosts, effort) as program:
                    found[-1] = max(found[-1], program.bound_s)
    return found


def _copies_terms(task: GroupTask, extra: int) -> LayerTerms:
    """Return the layer over hosts with groups as items whose experts have copies."""
    gpus = np.bincount(task.host_of_gpu[task.capacity > 0]).max()
    copies = min(1 + extra, int(gpus))
    terms = _group_terms(task)
    phases = [
        replace(phase, alone=phase.alone / copies) if len(phase.rows) else phase
        for phase in terms.phases
    ]
    return replace(terms, phases=tuple(phases))


def _free_bound(task: GroupTask, effort: Effort) -> float:
    """Return a bound on all placements, whole groups or not."""
    start = start_with_groups(task)
    within = replace(effort, deadline=effort.deadline - (1 - _SHARE_FREE) * effort.left_s)
    return place_layer((task.rows, task.cells, task.capacity, start), within).bound_s


def _in_order(task: GroupTask) -> Placement:
    return np.repeat(np.arange(len(task.room)), task.room)[: task.groups]


def _group_terms(task: GroupTask) -> LayerTerms:
    """Return the layer over hosts with groups as items."""
    terms, group = cell_terms(task.rows, task.host_of_gpu), task.group_of_expert
    phases = []
    for phase in terms.phases:
        rows = np.zeros((task.groups, len(phase.rows), phase.rows.shape[2]))
        np.add.at(rows, group, phase.rows.transpose(1, 0, 2))
        alone = np.zeros((task.groups, phase.alone.shape[1]))
        np.maximum.at(alone, group, phase.alone)
        phases.append(replace(phase, rows=rows.transpose(1, 0, 2), alone=alone))
    return replace(terms, phases=tuple(phases))


def _filled(task: GroupTask, hosts: Placement, deadline: float) -> Placement:
    """Return GPUs of experts for hosts of groups, [groups], with swaps until `deadline`."""
    cells = hosts[task.group_of_expert]
    return fill_cells(task.rows, task.host_of_gpu, task.capacity, Limits(), cells, deadline)


def _offered(
    task: GroupTask, best: LayerPlacement, hosts: Placement, found_by: str, effort: Effort
) -> LayerPlacement:
    placement = _filled(task, hosts, effort.deadline)
    if task.with_sets is not None:
        search = SetSearch(task.with_sets.layer, placement, task.capacity, task.host_of_gpu)
        search.descend(lambda: not effort.left_s)
        placement = search.placement
    seconds = task.seconds(placement)
    if seconds < best.seconds * (1 - 1e-9):
        return replace(best, placement=placement, seconds=seconds, found_by=found_by)
    return best


def _improved(task: GroupTask, best: LayerPlacement, effort: Effort) -> LayerPlacement:
    """Exchange whole groups between hosts while that helps, with swaps inside hosts after each."""
    group, improved = task.group_of_expert, True
    while improved and effort.left_s:
        improved = False
        for first in range(task.groups):
            for second in range(first):
                swapped = best.placement.copy()
                one, other = np.flatnonzero(group == first), np.flatnonzero(group == second)
                swapped[one], swapped[other] = best.placement[other], best.placement[one]
                if task.seconds(swapped) >= best.seconds * (1 - 1e-9):
                    continue
                assert task.with_sets is not None
                search = SetSearch(task.with_sets.layer, swapped, task.capacity, task.host_of_gpu)
                search.descend(lambda: not effort.left_s)
                best = replace(
                    best,
                    placement=search.placement,
                    seconds=search.seconds,
                    found_by="exchanges of groups + swaps",
                )
                improved = True
    return best
