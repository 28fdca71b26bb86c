"""From a problem to a placement with its certificate.

Layers are independent unless memory couples them, and solved side by side in processes when they
are large. The result is priced again by the evaluator, which knows nothing of the linear forms.
Ctrl-C and the time limit end the proof, not the plan: what is found by then is returned with its
true gap.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epplan.errors import EpplanError
from epplan.planner.copies.replicas import start_with_replicas
from epplan.planner.copies.set_copies import SetCopiesTask, start_with_set_copies
from epplan.planner.copies.task import ReplicatedTask
from epplan.planner.placement.highs import solve, solver_name
from epplan.planner.placement.levels import (
    OPTIMAL_GAP,
    Effort,
    LayerPlacement,
    in_id_order,
)
from epplan.planner.placement.program import MICROSECONDS, build_program
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.search import NoRoomError, contiguous
from epplan.planner.placement.terms import gpu_terms
from epplan.planner.together.set_levels import SetTask, start_with_sets
from epplan.planner.together.set_rows import SetLayer, SetRowBuilder
from epplan.planner.together.whole_groups import (
    GroupTask,
    check_groups,
    start_with_groups,
)

from .cost import LayerEvaluation, Shares, evaluate_layer, one_copy
from .layer_task import AnyTask, place_within, prove_within
from .plan import Status
from .problem import Problem, even_capacity, no_room_for_copies
from .token_sets import single_choices
from .turns import each_in_turn

_AGREEMENT = 1e-6  # relative difference allowed between evaluator and linear form
_JOINT_SIZE = 4096  # layers x experts x GPUs up to which memory-coupled layers are one program
_QUICK_S = 2.0  # time for a layer from which a first pass over all layers is worth it
_PROCESSES_SIZE = 32768  # the same, from which starting processes (1 to 2 s) pays

Capacity = npt.NDArray[np.int64]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSolution:
    """One layer's placement and what is proven about it.

    Attributes:
        shares: of every expert's rows on each rank, [experts, ranks].
        evaluation: its cost.
        bound_s: no placement of this layer costs less.
        contiguous_s: cost of experts in id order.
        found_by: how the placement was found.
        floor_s: the part of the bound that single experts cause wherever they sit.
        free_bound_s: the bound without whole groups, where those were asked for.
    """

    shares: Shares
    evaluation: LayerEvaluation
    bound_s: float
    contiguous_s: float
    found_by: str
    floor_s: float
    free_bound_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """All layers, and the certificate of their sum."""

    layers: tuple[LayerSolution, ...]
    bound_s: float  # proven; above the layers' own bounds where memory couples them
    status: Status
    interrupted: bool
    seconds: float
    solver: str

    @property
    def objective_s(self) -> float:
        """Sum over layers."""
        return sum(layer.evaluation.seconds for layer in self.layers)

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s else 0.0


def solve_placement(
    problem: Problem, *, gap: float, time_limit_s: float, seed: int, progress: Progress
) -> Solution:
    """Return the best placement found, with its bound.

    Args:
        problem: the problem; `make_problem` has checked that it has a solution.
        gap: relative gap at which to stop.
        time_limit_s: wall-clock limit over all layers.
        seed: of search and solver.
        progress: called with a line now and then.
    """
    began = time.monotonic()
    effort = Effort(gap=gap, deadline=began + time_limit_s, seed=seed)
    builder = RowBuilder(problem)
    capacity = even_capacity(problem)
    if problem.keep_groups:
        check_groups(problem, capacity)
    work = _Work(problem, builder, capacity, effort, progress)
    try:
        work.run()
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    layers = tuple(work.solutions())
    objective = sum(layer.evaluation.seconds for layer in layers)
    bound = min(max(work.joint_bound_s, sum(layer.bound_s for layer in layers)), objective)
    return Solution(
        layers=layers,
        bound_s=bound,
        status=_status((objective - bound) / objective if objective else 0.0, gap),
        interrupted=interrupted,
        seconds=time.monotonic() - began,
        solver=solver_name(),
    )


class _Work:
    """All distinct layers on their way."""

    def __init__(
        self,
        problem: Problem,
        builder: RowBuilder,
        capacity: Capacity,
        effort: Effort,
        progress: Progress,
    ) -> None:
        self.problem = problem
        self.capacity = capacity  # [layers, gpus]
        self.effort = effort
        self.progress = progress
        self.cells = builder.cells()
        self.same_as = _equal_layers(problem)
        self.rows = {layer: builder.layer(layer) for layer in sorted(set(self.same_as))}
        self.sets: dict[int, SetLayer] = {}
        if problem.sets is not None or self._copies_together:
            of_sets = SetRowBuilder(problem if problem.sets is not None else _by_choice(problem))
            self.sets = {layer: of_sets.layer(layer) for layer in self.rows}
        self.best = {layer: self._start(layer) for layer in self.rows}
        self.joint_bound_s = 0.0
        self._begun = False  # every layer is searched once, whatever gap is asked for

    def run(self) -> None:
        """Improve all layers until their gaps are closed or the time is over."""
        if not self.problem.layers_coupled:
            self._place_all(self.effort, rounds=2 if self._side_by_side else 1)
            return
        # Searched quickly, proven without shares of memory, and improved where that is not enough.
        self._place_all(replace(self.effort.part(0.3), gap=1.0), rounds=1)
        self._prove_coupled(self.effort.part(0.6))
        self._place_all(self.effort, rounds=1)
        special = self.problem.keep_groups or self.problem.replication.extra
        if self._size <= _JOINT_SIZE and self.problem.sets is None and not special:
            self._solve_jointly()

    def _place_all(self, effort: Effort, rounds: int) -> None:
        if not self._begun and len(self.rows) > 1 and effort.left_s > _QUICK_S * len(self.rows):
            # Something for every layer first: Ctrl-C may come while most are not begun.
            for layer in self.rows:
                quick = place_within(self._task(layer), effort, 0.0, lambda better: None)
                self._take_placed(layer, quick)
        layers = [x for x in self.rows if not self.best[x].is_done(self.effort.gap)]
        layers = layers if self._begun else list(self.rows)
        self._begun = True
        for _ in range(rounds if layers else 0):
            tasks = {layer: self._task(layer) for layer in layers}
            budget_s = effort.left_s / len(layers)
            each_in_turn(
                place_within, tasks, effort, self._take_placed, side_by_side=self._side_by_side
            )
            layers = [x for x in self.rows if not self.best[x].is_done(self.effort.gap)]
            if not layers or effort.left_s / len(layers) <= budget_s:
                return  # nothing left to do, or less time for it than was not enough

    @property
    def _size(self) -> int:
        return self.problem.model.num_experts * self.problem.num_ranks * len(self.rows)

    @property
    def _side_by_side(self) -> bool:
        return len(self.rows) > 1 and self._size > _PROCESSES_SIZE

    def solutions(self) -> Iterator[LayerSolution]:
        """Yield every layer's solution, priced by the evaluator."""
        for layer, twin in enumerate(self.same_as):
            yield _layer_solution(self.problem, layer, self.best[twin], self.capacity[layer])

    @property
    def _copies_together(self) -> bool:
        """Whether copies are placed where it matters what is together: token sets, or groups."""
        problem = self.problem
        return bool(problem.replication.extra) and (problem.sets is not None or problem.keep_groups)

    def _start(self, layer: int) -> LayerPlacement:
        if self._copies_together:
            try:
                return start_with_set_copies(self._set_copies(layer, self.capacity[layer]))
            except NoRoomError:
                raise no_room_for_copies(self.problem) from None
        if self.problem.keep_groups:
            return start_with_groups(self._with_groups(layer, self.capacity[layer]))
        if self.problem.sets is not None:
            return start_with_sets(self._with_sets(layer, self.capacity[layer]))
        if not self.problem.replication.extra:
            return in_id_order(self.rows[layer], self.capacity[layer])
        try:
            return start_with_replicas(self._replicated(layer, self.capacity[layer]))
        except NoRoomError:
            raise no_room_for_copies(self.problem) from None

    def _task(self, layer: int, capacity: Capacity | None = None) -> AnyTask:
        """Return what is to be solved, by default within the layer's share of memory."""
        capacity, best = self.capacity[layer] if capacity is None else capacity, self.best[layer]
        if self._copies_together:
            return self._set_copies(layer, capacity), best
        if self.problem.keep_groups:
            return self._with_groups(layer, capacity), best
        if self.problem.sets is not None:
            return self._with_sets(layer, capacity), best
        if self.problem.replication.extra:
            return self._replicated(layer, capacity), best
        return self.rows[layer], self.cells, capacity, best

    def _set_copies(self, layer: int, capacity: Capacity) -> SetCopiesTask:
        groups = None
        if self.problem.model.router.groups > 1:
            groups = self._with_groups(layer, capacity)
        return SetCopiesTask(
            with_sets=self._with_sets(layer, capacity),
            by_counts=self._replicated(layer, capacity),
            groups=groups if groups is not None and groups.fit else None,
            keep_groups=self.problem.keep_groups,
            per_choice=self.problem.sets is None,
        )

    def _with_groups(self, layer: int, capacity: Capacity) -> GroupTask:
        return GroupTask(
            rows=self.rows[layer],
            with_sets=None if self.problem.sets is None else self._with_sets(layer, capacity),
            groups=self.problem.model.router.groups,
            host_of_gpu=self.problem.host_of_gpu,
            cells=self.cells,
            capacity=capacity,
        )

    def _with_sets(self, layer: int, capacity: Capacity) -> SetTask:
        return SetTask(
            layer=self.sets[layer],
            by_counts=self.rows[layer],
            island=self.problem.routes.island,
            cells=self.cells,
            capacity=capacity,
        )

    def _replicated(self, layer: int, capacity: Capacity) -> ReplicatedTask:
        return ReplicatedTask(
            rows=self.rows[layer],
            load=self.problem.counts[:, layer].sum(axis=1).mean(axis=0),
            cell_of_gpu=self.cells,
            host_of_gpu=self.problem.host_of_gpu,
            capacity=capacity,
            rule=self.problem.replication,
        )

    def _take(self, layer: int, better: LayerPlacement) -> None:
        self.best[layer] = better
        gap = 1 - better.bound_s / better.seconds if better.seconds else 0.0
        self.progress(f"layer {layer}: {better.seconds * 1e3:.4g} ms, gap {gap:.2%}")

    def _prove_coupled(self, effort: Effort) -> None:
        """Prove bounds without the shares of memory that placements keep."""
        free = np.full(self.problem.num_ranks, self.problem.experts_per_gpu)
        tasks = {layer: self._task(layer, free) for layer in self.rows}
        each_in_turn(prove_within, tasks, effort, self._take_bound, side_by_side=self._side_by_side)

    def _take_placed(self, layer: int, better: LayerPlacement) -> None:
        if self.problem.layers_coupled:  # its bound relies on the layer's share of memory
            before = self.best[layer]
            bound_s = min(before.bound_s, better.seconds)
            better = replace(better, bound_s=bound_s, free_bound_s=before.free_bound_s)
        self._take(layer, better)

    def _take_bound(self, layer: int, other: LayerPlacement) -> None:
        mine = self.best[layer]
        held = np.bincount(other.placement, minlength=self.problem.num_ranks)
        if other.seconds < mine.seconds and (held <= self.capacity[layer]).all():
            mine = other
        mine = replace(mine, bound_s=self.best[layer].bound_s, free_bound_s=other.free_bound_s)
        self._take(layer, mine.proven(other.bound_s))

    def _solve_jointly(self) -> None:
        terms = {layer: gpu_terms(self.rows[twin]) for layer, twin in enumerate(self.same_as)}
        limit = np.full(self.problem.num_ranks, self.problem.experts_per_gpu)
        program = build_program(terms, limit, self.problem.slots_of_gpu)
        start = {layer: self.best[twin].placement for layer, twin in enumerate(self.same_as)}
        result = solve(
            program.lp,
            start=program.start_from(start),
            gap=self.effort.gap,
            time_limit_s=self.effort.left_s,
            seed=self.effort.seed,
        )
        self.joint_bound_s = result.bound / MICROSECONDS
        found = program.placements(result.values) if result.values else start
        for layer, placement in found.items():
            # What one layer gains another may lose: take the joint solution as a whole.
            self.best[layer] = LayerPlacement(
                placement=placement,
                seconds=terms[layer].seconds(placement),
                bound_s=min(self.best[layer].bound_s, terms[layer].seconds(placement)),
                found_by="integer program over all layers",
                floor_s=terms[layer].floor_s,
            )


def _by_choice(problem: Problem) -> Problem:
    """Return the problem with tokens of one expert each, which travel as choices do."""
    one_source = bool((problem.counts == problem.counts[:, :, :1]).all())
    sets = tuple(
        tuple(single_choices(counts, one_source=one_source) for counts in window)
        for window in problem.counts
    )
    return replace(problem, transfer="direct", sets=sets)


def _equal_layers(problem: Problem) -> list[int]:
    """Return for every layer the first with equal traffic: one solution serves both.

    Memory-coupled layers are all different: what one takes another lacks.
    """
    if problem.layers_coupled:
        return list(range(problem.model.num_moe_layers))
    first: dict[bytes, int] = {}
    return [
        first.setdefault(_traffic_key(problem, layer), layer)
        for layer in range(problem.model.num_moe_layers)
    ]


def _traffic_key(problem: Problem, layer: int) -> bytes:
    parts = [problem.counts[:, layer].tobytes()]
    for window in problem.sets or ():
        sets = window[layer]
        parts += [sets.source.tobytes(), sets.experts.tobytes(), sets.weight.tobytes()]
    return b"|".join(parts)


def _status(reached: float, wanted: float) -> Status:
    if reached <= OPTIMAL_GAP:
        return "optimal"
    return "feasible" if reached <= wanted + OPTIMAL_GAP else "limit"


def _layer_solution(
    problem: Problem, layer: int, best: LayerPlacement, capacity: Capacity
) -> LayerSolution:
    shares = best.shares(problem.num_ranks)
    evaluation = evaluate_layer(problem, layer, shares)
    if abs(evaluation.seconds - best.seconds) > _AGREEMENT * best.seconds:
        raise EpplanError(
            f"layer {layer}: the evaluator prices the placement at {evaluation.seconds} s, the "
            f"program at {best.seconds} s"
        )
    in_order = one_copy(contiguous(problem.model.num_experts, capacity), problem.num_ranks)
    return LayerSolution(
        shares=shares,
        evaluation=evaluation,
        bound_s=min(evaluation.seconds, best.bound_s),
        contiguous_s=evaluate_layer(problem, layer, in_order).seconds,
        found_by=best.found_by,
        floor_s=best.floor_s,
        free_bound_s=best.free_bound_s,
    )
