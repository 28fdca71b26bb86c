"""What kind of task a layer is, and who solves it; importable, so that processes can."""

from dataclasses import replace

from epplan.planner.copies.replicas import bound_with_replicas, place_replicated
from epplan.planner.copies.set_copies import SetCopiesTask, place_set_copies, prove_set_copies
from epplan.planner.copies.task import ReplicatedTask
from epplan.planner.placement.levels import Effort, LayerPlacement, Report, Task, place_layer
from epplan.planner.together.set_levels import SetTask, place_with_sets
from epplan.planner.together.whole_groups import GroupTask, place_with_groups

AnyTask = (
    Task
    | tuple[ReplicatedTask, LayerPlacement]
    | tuple[SetTask, LayerPlacement]
    | tuple[GroupTask, LayerPlacement]
    | tuple[SetCopiesTask, LayerPlacement]
)


def place_within(task: AnyTask, effort: Effort, budget_s: float, report: Report) -> LayerPlacement:
    """Solve one layer within its own time, from when it starts."""
    effort = effort.within(budget_s)
    if isinstance(task[0], SetCopiesTask):
        return place_set_copies(task[0], task[1], effort, report)
    if isinstance(task[0], ReplicatedTask):
        return place_replicated(task[0], task[1], effort, report)
    if isinstance(task[0], GroupTask):
        return place_with_groups(task[0], task[1], effort, report)
    if isinstance(task[0], SetTask):
        return place_with_sets(task[0], task[1], effort, report)
    return place_layer(task, effort, report)


def prove_within(task: AnyTask, effort: Effort, budget_s: float, report: Report) -> LayerPlacement:
    """Return a placement of which only the bound counts."""
    if isinstance(task[0], SetCopiesTask):
        return prove_set_copies(task[0], task[1], effort.within(budget_s))
    if isinstance(task[0], ReplicatedTask):
        return replace(task[1], bound_s=bound_with_replicas(task[0], effort.within(budget_s)))
    return place_within(task, effort, budget_s, report)
