"""One layer where it matters which experts are chosen together: search, then proof.

    1  bounds on all placements, from single experts and from pairs of experts (`set_bound`)
    2  starts: id order, the placement for counts alone, experts grouped by common tokens
    3  swaps and moves on the exact rows (`set_search`), the best shaken up and improved again
    4  the integer program over islands, or GPUs in small groups, for a tighter bound and perhaps a
       better placement

This is partition of a hypergraph, which is hard in practice, too: the gap that is proven stays wide
where tokens are many and choose nearly at random.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from epplan.planner.cost import Placement
from epplan.planner.placement.levels import Effort, LayerPlacement, Report
from epplan.planner.placement.rows import Floats, Ints, LayerRows
from epplan.planner.placement.search import NoRoomError, best_start, contiguous
from epplan.planner.placement.terms import cell_terms

from .pair_bound import coactivation
from .set_bound import reach_bound
from .set_program import run_set_program
from .set_rows import SetLayer
from .set_search import SetSearch

_SMALL = 256  # experts x GPUs up to which the program over GPUs is tried
_SHARE_BOUND = 0.2  # of the time, for the bound from pairs; it takes seconds at most
_KICKS_SMALL = 20
_KICKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTask:
    """One layer to place.

    Attributes:
        layer: its tokens and phases.
        by_counts: the layer as if every choice travelled by itself: a start.
        island: of every GPU, [gpus].
        cells: `RowBuilder.cells`, [gpus].
        capacity: most experts on every GPU, [gpus].
    """

    layer: SetLayer
    by_counts: LayerRows
    island: Ints
    cells: Ints
    capacity: Ints


def start_with_sets(task: SetTask) -> LayerPlacement:
    """Return experts in id order, with the bound from single experts."""
    placement = contiguous(task.layer.num_experts, task.capacity)
    floor_s = task.layer.floor_s
    return LayerPlacement(
        placement=placement,
        seconds=task.layer.seconds(placement),
        bound_s=floor_s,
        found_by="contiguous",
        floor_s=floor_s,
    )


def place_with_sets(
    task: SetTask, start: LayerPlacement, effort: Effort, report: Report
) -> LayerPlacement:
    """Return a placement of one layer with a proven bound.

    Args:
        task: the layer.
        start: what to improve on.
        effort: when to stop.
        report: takes what is better on the way, for who ends this by Ctrl-C.
    """
    best = start
    if effort.left_s:
        deadline = effort.deadline - (1 - _SHARE_BOUND) * effort.left_s
        best = best.proven(reach_bound(task.layer, task.island, task.capacity, deadline))
        report(best)
    for better in _searched(task, best, effort):
        best = better
        report(best)
    num_gpus = len(task.capacity)
    small = task.layer.num_experts * num_gpus <= _SMALL
    if not best.is_done(effort.gap):
        best = _shaken(task, best, effort, _KICKS_SMALL if small else _KICKS)
        report(best)
    if int(task.island.max()) and not best.is_done(effort.gap) and effort.left_s:
        best = _by_program(task, best, task.island, effort)
    if small and not best.is_done(effort.gap) and effort.left_s:
        best = _by_program(task, best, np.arange(num_gpus), effort)
    return best


def _offered(best: LayerPlacement, search: SetSearch, found_by: str) -> LayerPlacement:
    if search.seconds < best.seconds * (1 - 1e-9):
        return replace(
            best, placement=search.placement.copy(), seconds=search.seconds, found_by=found_by
        )
    return best


def _searched(task: SetTask, start: LayerPlacement, effort: Effort) -> Iterator[LayerPlacement]:
    """Improve every start by swaps, and yield the best so far."""
    best = start
    for name, placement in _starts(task, start, effort):
        if best.is_done(0.0) or not effort.left_s:
            break
        search = SetSearch(task.layer, placement, task.capacity)
        best = _offered(best, search, name)
        search.descend(lambda: not effort.left_s)
        best = _offered(best, search, f"{name} + swaps")
        yield best


def _starts(
    task: SetTask, start: LayerPlacement, effort: Effort
) -> Iterator[tuple[str, Placement]]:
    together = sum(coactivation(sets, task.layer.num_experts) for sets in task.layer.sets)
    load = task.layer.counts.sum(axis=(0, 1))
    yield "common tokens", _grouped(np.asarray(together), load, task)
    with suppress(NoRoomError):
        room = np.bincount(task.cells, weights=task.capacity).astype(np.int64)
        terms = cell_terms(task.by_counts, task.cells)
        name, cells = best_start(terms, room, effort.seed, 0, deadline=effort.deadline)
        yield f"{name} over hosts by counts", _filled(cells, task.cells, load, task.capacity)
    yield start.found_by, start.placement


def _grouped(together: Floats, load: Floats, task: SetTask) -> Placement:
    """Return experts grouped by common tokens, islands first, then GPUs inside each."""
    capacity, island = task.capacity, task.island
    rooms = np.bincount(island, weights=capacity).astype(np.int64)
    of_island = _partition(together, load, rooms)
    placement = np.zeros(len(load), dtype=np.intp)
    for number in range(len(rooms)):
        experts, gpus = np.flatnonzero(of_island == number), np.flatnonzero(island == number)
        inside = _partition(together[np.ix_(experts, experts)], load[experts], capacity[gpus])
        placement[experts] = gpus[inside]
    return placement


def _partition(together: Floats, load: Floats, room: Ints) -> Placement:
    """Return a place of every expert: the heaviest first, by common tokens and even load.

    A place takes an expert by the tokens they share, less what it would be above an even load.
    """
    left, held = room.astype(np.int64).copy(), np.zeros(len(room))
    even = load.sum() * room / max(1, room.sum())
    shared = np.zeros((len(room), len(load)))  # tokens that an expert shares with a place
    place = np.zeros(len(load), dtype=np.intp)
    for expert in np.argsort(-load, kind="stable").tolist():
        above = np.maximum(held + load[expert] - even, 0.0)
        gain = np.where(left > 0, shared[:, expert] - above, -np.inf)
        best = int(np.lexsort((held, -gain))[0])
        place[expert] = best
        left[best] -= 1
        held[best] += load[expert]
        shared[best] += together[expert]
    return place


def _filled(cells: Placement, cell_of_gpu: Ints, load: Floats, capacity: Ints) -> Placement:
    """Return GPUs for experts whose cells are given: the heaviest first, to the emptiest GPU."""
    held, left = np.zeros(len(capacity)), capacity.astype(np.int64).copy()
    placement = np.zeros(len(cells), dtype=np.intp)
    for expert in np.argsort(-load, kind="stable").tolist():
        open_gpus = (cell_of_gpu == cells[expert]) & (left > 0)
        gpu = int(np.where(open_gpus, held, np.inf).argmin())
        placement[expert] = gpu
        held[gpu] += load[expert]
        left[gpu] -= 1
    return placement


def _shaken(task: SetTask, best: LayerPlacement, effort: Effort, kicks: int) -> LayerPlacement:
    """Improve the best again from a few random swaps."""
    random = np.random.default_rng(effort.seed)
    search = SetSearch(task.layer, best.placement, task.capacity)
    for _ in range(kicks):
        if best.is_done(effort.gap) or not effort.left_s:
            break
        search.restart(best.placement)
        search.kick(random)
        search.descend(lambda: not effort.left_s)
        best = _offered(best, search, best.found_by)
    return best


def _by_program(
    task: SetTask, best: LayerPlacement, cell_of_gpu: Ints, effort: Effort
) -> LayerPlacement:
    result = run_set_program(task.layer, cell_of_gpu, task.capacity, best.placement, effort)
    if result is None:
        return best
    cells, bound_s = result
    load = task.layer.counts.sum(axis=(0, 1))
    placement = _filled(cells, cell_of_gpu, load, task.capacity)
    search = SetSearch(task.layer, placement, task.capacity)
    where = "GPUs" if len(set(cell_of_gpu.tolist())) == len(cell_of_gpu) else "islands"
    search.descend(lambda: not effort.left_s)
    best = _offered(best, search, f"integer program over {where} + swaps")
    return best.proven(bound_s)
