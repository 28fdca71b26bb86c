"""Placing again after a loss, with few bytes moved: what stays stays, and the rest finds room.

    1. keep     every expert with a copy left stays with it (of several, where it costs least)
    2. load     lost experts, heaviest first, where the layer's time grows least; then these alone
                swap and move while that helps: as few bytes as any placement needs
    3. improve  within a budget of bytes: the step of any layer that gains most per byte, until no
                step gains or none is left that the budget allows

A step moves an expert of a rank that sets a phase's time to a free slot, or swaps it with another.
Steps are priced by the linear rows of the solver; the evaluator prices the result again.
`recopy.py` does the same for copies, which take the experts' place here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from epplan.planner.cost import Placement, Shares, evaluate_layer, one_copy
from epplan.planner.groups.neighbours import Neighbours
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.placement.rows import Floats, LayerRows
from epplan.planner.problem import Problem

from .room import Copies, Held, Ints, deal_room, one_copy_each

_SIGNIFICANT = 1 - 1e-9  # a step must gain more than rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A placement next to the present one.

    Attributes:
        placement: rank of every expert, [experts].
        seconds: the layer's time with it.
        loads: experts more (or fewer) to be moved than now.
    """

    placement: Placement
    seconds: float
    loads: int


class LayerRepair:
    """One layer while it is placed again; with replicas, "experts" are copies of experts.

    Args:
        problem: of the ranks that are left.
        number: ordinal of the MoE layer.
        rows: of the experts.
        held: where copies are already, [experts, ranks].
        copy_of: of copies, the expert; None where there is one copy of each. [experts]

    Attributes:
        room: most experts on every rank, [ranks].
        placement: rank of every expert; -1 for those that have none yet.
        seconds: the layer's time, as `take` and `load_lost` keep it.
    """

    def __init__(
        self,
        problem: Problem,
        number: int,
        rows: LayerRows,
        held: Copies,
        copy_of: npt.NDArray[np.intp] | None = None,
    ) -> None:
        self.problem = problem
        self.number = number
        self.rows = rows
        self.held = held
        self.copy_of = copy_of
        self.room = np.full(problem.num_ranks, problem.experts_per_gpu)
        self.placement = np.full(len(held), -1, dtype=np.intp)
        self.seconds = 0.0

    @property
    def loads(self) -> int:
        """Experts that are not where a copy is."""
        return self.loads_of(self.placement)

    def loads_of(self, placement: Placement) -> int:
        """Return how many experts a placement puts where they are not yet."""
        return int((~self.held[np.arange(len(placement)), placement]).sum())

    def heaviest_first(self, experts: npt.NDArray[np.intp]) -> list[int]:
        """Return experts by their rows, falling."""
        rows = self.problem.counts[:, self.number].sum(axis=(0, 1))
        weight = rows if self.copy_of is None else rows[self.copy_of]
        order: list[int] = experts[np.argsort(-weight[experts], kind="stable")].tolist()
        return order

    def _taken(self, expert: int) -> npt.NDArray[np.bool_]:
        """Return the ranks where another copy of the same expert is, [ranks]."""
        taken = np.zeros(len(self.room), dtype=bool)
        if self.copy_of is not None:
            twins = np.flatnonzero(self.copy_of == self.copy_of[expert])
            ranks = self.placement[twins[twins != expert]]
            taken[ranks[ranks >= 0]] = True
        return taken

    def _cannot_swap(self, expert: int, partners: list[int]) -> npt.NDArray[np.bool_]:
        """Return which swaps change nothing or put copies of an expert together, [partners]."""
        here, there = self.placement[expert], self.placement[partners]
        blocked: npt.NDArray[np.bool_] = (there == here) | self._taken(expert)[there]
        if self.copy_of is not None:
            on_here = np.isin(self.copy_of[partners], self.copy_of[self.placement == here])
            blocked |= on_here
        return blocked

    def settle(self, expert: int, ranks: npt.NDArray[np.intp]) -> None:
        """Put an expert on that of `ranks` where the layer's time grows least."""
        seconds = Neighbours(self.rows, self.placement).moves(expert)[ranks]
        self.placement = self.moved(expert, int(ranks[seconds.argmin()]))

    def price(self, placement: Placement) -> float:
        """Return the layer's seconds."""
        return self.rows.seconds(placement)

    def moved(self, expert: int, rank: int) -> Placement:
        """Return the placement with one expert elsewhere."""
        placement = self.placement.copy()
        placement[expert] = rank
        return placement

    def free(self) -> npt.NDArray[np.intp]:
        """Return the ranks with a free slot."""
        placed = self.placement[self.placement >= 0]
        return np.flatnonzero(np.bincount(placed, minlength=len(self.room)) < self.room)

    def best_step(self, experts: list[int], partners: list[int], budget: int) -> Step | None:
        """Return the step that gains most per expert loaded, None where none gains.

        Args:
            experts: those that may move to a free slot or be swapped.
            partners: those they may be swapped with.
            budget: most experts loaded more than now.
        """
        neighbours, free = Neighbours(self.rows, self.placement), self.free()
        missing = ~self.held
        away = missing[np.arange(len(self.placement)), self.placement].astype(int)  # [experts]
        best: tuple[tuple[bool, float], Placement] | None = None
        for expert in experts:
            here = self.placement[expert]
            there = self.placement[partners]
            ends = [free, there]
            seconds = [neighbours.moves(expert)[free], neighbours.swaps(expert)[partners]]
            loads = [missing[expert, end] - away[expert] for end in ends]
            loads[1] = loads[1] + missing[partners, here] - away[partners]
            seconds[0] = np.where(self._taken(expert)[free], np.inf, seconds[0])
            seconds[1] = np.where(self._cannot_swap(expert, partners), np.inf, seconds[1])
            for is_swap in (False, True):
                found = self._most_worth(seconds[is_swap], loads[is_swap], budget)
                if found is None or (best is not None and found[0] <= best[0]):
                    continue
                worth, index = found
                placement = self.moved(expert, int(ends[is_swap][index]))
                if is_swap:
                    placement[partners[index]] = here
                best = worth, placement
        return None if best is None else self._step(best[1])

    def _most_worth(
        self, seconds: Floats, loads: Ints, budget: int
    ) -> tuple[tuple[bool, float], int] | None:
        """Return the worth and number of the best candidate: what loads nothing comes first."""
        gain = self.seconds - seconds
        able = np.flatnonzero((seconds < self.seconds * _SIGNIFICANT) & (loads <= budget))
        if not able.size:
            return None
        is_free = loads[able] <= 0
        worth = gain[able] / np.maximum(loads[able], 1)
        best = np.lexsort((worth, is_free))[-1]
        return (bool(is_free[best]), float(worth[best])), int(able[best])

    def _step(self, placement: Placement) -> Step:
        loads = self.loads_of(placement) - self.loads
        return Step(placement=placement, seconds=self.price(placement), loads=loads)

    def worth(self, step: Step) -> tuple[bool, float]:
        """Return what orders steps: whether it loads nothing more, then seconds per load."""
        return step.loads <= 0, (self.seconds - step.seconds) / max(step.loads, 1)

    def take(self, step: Step) -> None:
        """Make a step."""
        self.placement, self.seconds = step.placement, step.seconds


def least_moved(problem: Problem, held: Held) -> list[Placement] | None:
    """Return a placement of every layer that moves as few experts as can be.

    Args:
        problem: of the ranks that are left.
        held: the copies they hold.

    Returns:
        None where slots or memory leave no room for the lost experts beside what is there.
    """
    builder = RowBuilder(problem)
    layers = [
        LayerRepair(problem, number, builder.layer(number), copies)
        for number, copies in enumerate(held)
    ]
    for layer in layers:
        copies = layer.held.sum(axis=1)
        only = np.flatnonzero(copies == 1)
        layer.placement[only] = layer.held[only].argmax(axis=1)
        for expert in layer.heaviest_first(np.flatnonzero(copies > 1)):
            layer.settle(expert, np.flatnonzero(layer.held[expert]))
    if not _make_room(problem, layers):
        chosen = one_copy_each(problem, held)
        if chosen is None:
            return None
        for layer, copies in zip(layers, chosen, strict=True):
            layer.placement = np.where(copies.any(axis=1), copies.argmax(axis=1), -1)
        _make_room(problem, layers)
    for layer in layers:
        load_lost(layer, np.flatnonzero(~layer.held.any(axis=1)))
    return [layer.placement for layer in layers]


def improve(
    problem: Problem, held: Held, placements: list[Placement], budget: int
) -> list[Placement]:
    """Return placements that are faster and move at most `budget` experts more, of all layers."""
    builder = RowBuilder(problem)
    layers = []
    for number, placement in enumerate(placements):
        layer = LayerRepair(problem, number, builder.layer(number), held[number])
        layer.take(Step(placement=placement, seconds=layer.price(placement), loads=0))
        if problem.layers_coupled:  # memory is dealt out: only swaps
            layer.room = np.bincount(placement, minlength=problem.num_ranks)
        layers.append(layer)
    best = {layer.number: _best_step(layer, budget) for layer in layers}
    while True:
        able = {n: step for n, step in best.items() if step is not None and step.loads <= budget}
        if not able:
            break
        number = max(able, key=lambda n: layers[n].worth(able[n]))
        budget -= able[number].loads
        layers[number].take(able[number])
        for layer in layers:
            step = best[layer.number]
            if layer.number == number or (step is not None and step.loads > budget):
                best[layer.number] = _best_step(layer, budget)
    return [layer.placement for layer in layers]


def align(problem: Problem, held: Held, layers: list[Shares]) -> list[Shares]:
    """Return placements as fast that move less: GPUs of a host change their experts.

    On each host the sets of experts go to the GPUs that hold most of them (an assignment problem),
    unless that makes the layer slower.

    Args:
        problem: of the ranks that are left.
        held: the copies they hold.
        layers: shares of every layer, [experts, ranks].
    """
    builder = RowBuilder(problem)
    hosts = [gpu.host for gpu in problem.gpus]
    members = [np.flatnonzero([other == host for other in hosts]) for host in dict.fromkeys(hosts)]
    aligned = []
    for number, shares in enumerate(layers):
        rows = builder.layer(number)
        seconds = rows.seconds_of_shares(shares)
        for gpus in members:
            there, here = shares[:, gpus] > 0, held[number][:, gpus]
            kept = there.T.astype(int) @ here.astype(int)  # [sets of experts, GPUs]
            own, gpu = linear_sum_assignment(kept, maximize=True)
            changed = shares.copy()
            changed[:, gpus[gpu]] = shares[:, gpus[own]]
            if (found := rows.seconds_of_shares(changed)) <= seconds:
                shares, seconds = changed, found
        aligned.append(shares)
    return aligned


def ranks_that_count(problem: Problem, number: int, shares: Shares) -> set[int]:
    """Return the ranks whose experts set a phase's time in the worst window."""
    worst = evaluate_layer(problem, number, shares).worst
    return {phase.rank for phase in worst.phases}


def _best_step(layer: LayerRepair, budget: int) -> Step | None:
    """Return the step that gains most per byte, among experts of the ranks that set the time."""
    shares = one_copy(layer.placement, layer.problem.num_ranks)
    ranks = ranks_that_count(layer.problem, layer.number, shares)
    experts = [e for e, rank in enumerate(layer.placement.tolist()) if rank in ranks]
    everyone = list(range(len(layer.placement)))
    return layer.best_step(experts, everyone, budget)


def load_lost(layer: LayerRepair, experts: npt.NDArray[np.intp]) -> None:
    """Place the experts that nobody holds, then move and swap these alone while it helps."""
    lost = layer.heaviest_first(experts)
    for expert in lost:
        layer.settle(expert, layer.free())
    layer.seconds = layer.price(layer.placement)
    better = True
    while better:
        better = False
        for expert in lost:
            step = layer.best_step([expert], lost, 0)
            if step is not None:
                layer.take(step)
                better = True


def _make_room(problem: Problem, layers: list[LayerRepair]) -> bool:
    """Deal the room that is left to the layers' lost experts; False where it does not suffice."""
    ranks = problem.num_ranks
    used = np.array([np.bincount(x.placement[x.placement >= 0], minlength=ranks) for x in layers])
    lost = np.array([(layer.placement < 0).sum() for layer in layers])
    room = deal_room(problem, used, lost)
    if room is None:
        return False
    for layer, of_layer in zip(layers, room, strict=True):
        layer.room = of_layer
    return True
