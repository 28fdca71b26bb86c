"""Placing again after a loss, with few bytes moved: what stays stays, and the rest finds room.

    1. keep     every expert with a copy left stays with it (of several, where it costs least)
    2. load     lost experts, heaviest first, where the layer's time grows least; then these alone
                swap and move while that helps: as few bytes as any placement needs
    3. improve  within a budget of bytes: the step of any layer that gains most per byte, until no
                step gains or none is left that the budget allows

A step moves an expert of a rank that sets a phase's time to a free slot, or swaps it with another.
Steps are priced by the linear rows of the solver; the evaluator prices the result again.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from .cost import Placement, evaluate_layer, one_copy
from .neighbours import Neighbours
from .problem import Problem
from .rows import Floats, RowBuilder

Copies = npt.NDArray[np.bool_]  # of one layer, [experts, ranks]
Held = npt.NDArray[np.bool_]  # copies that are there already, [layers, experts, ranks]
Ints = npt.NDArray[np.int64]

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


class _Layer:
    """One layer while it is placed again.

    Attributes:
        number: ordinal of the MoE layer.
        held: copies that are there already, [experts, ranks].
        room: most experts on every rank, [ranks].
        placement: rank of every expert; -1 for those that have none yet.
    """

    def __init__(self, builder: RowBuilder, problem: Problem, number: int, held: Copies) -> None:
        self.problem = problem
        self.number = number
        self.held = held
        self.rows = builder.layer(number)
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
        order: list[int] = experts[np.argsort(-rows[experts], kind="stable")].tolist()
        return order

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
            seconds[1] = np.where(there == here, np.inf, seconds[1])
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
    layers = [_Layer(builder, problem, number, copies) for number, copies in enumerate(held)]
    for layer in layers:
        copies = layer.held.sum(axis=1)
        only = np.flatnonzero(copies == 1)
        layer.placement[only] = layer.held[only].argmax(axis=1)
        for expert in layer.heaviest_first(np.flatnonzero(copies > 1)):
            layer.settle(expert, np.flatnonzero(layer.held[expert]))
    if not _make_room(problem, layers):
        return None
    for layer in layers:
        _load_lost(layer)
    return [layer.placement for layer in layers]


def improve(
    problem: Problem, held: Held, placements: list[Placement], budget: int
) -> list[Placement]:
    """Return placements that are faster and move at most `budget` experts more, of all layers."""
    builder = RowBuilder(problem)
    layers = []
    for number, placement in enumerate(placements):
        layer = _Layer(builder, problem, number, held[number])
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


def align(problem: Problem, held: Held, placements: list[Placement]) -> list[Placement]:
    """Return placements as fast that move less: GPUs of a host change their experts.

    On each host the sets of experts go to the GPUs that hold most of them (an assignment problem),
    unless that makes the layer slower.
    """
    builder = RowBuilder(problem)
    hosts = [gpu.host for gpu in problem.gpus]
    members = [np.flatnonzero([other == host for other in hosts]) for host in dict.fromkeys(hosts)]
    aligned = []
    for number, placement in enumerate(placements):
        layer = _Layer(builder, problem, number, held[number])
        layer.take(Step(placement=placement, seconds=layer.price(placement), loads=0))
        for gpus in members:
            there = [np.flatnonzero(layer.placement == gpu) for gpu in gpus]
            kept = np.array([[layer.held[own, gpu].sum() for gpu in gpus] for own in there])
            changed = layer.placement.copy()
            for own, gpu in zip(*linear_sum_assignment(kept, maximize=True), strict=True):
                changed[there[own]] = gpus[gpu]
            seconds = layer.price(changed)
            if seconds <= layer.seconds:
                layer.take(Step(placement=changed, seconds=seconds, loads=0))
        aligned.append(layer.placement)
    return aligned


def _best_step(layer: _Layer, budget: int) -> Step | None:
    """Return the step that gains most per byte, among experts of the ranks that set the time."""
    shares = one_copy(layer.placement, layer.problem.num_ranks)
    worst = evaluate_layer(layer.problem, layer.number, shares).worst
    ranks = {phase.rank for phase in worst.phases}
    experts = [e for e, rank in enumerate(layer.placement.tolist()) if rank in ranks]
    everyone = list(range(len(layer.placement)))
    return layer.best_step(experts, everyone, budget)


def _load_lost(layer: _Layer) -> None:
    """Place the experts that nobody holds, then move and swap these alone while it helps."""
    lost = layer.heaviest_first(np.flatnonzero(~layer.held.any(axis=1)))
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


def _make_room(problem: Problem, layers: list[_Layer]) -> bool:
    """Deal the memory that is left to the layers' lost experts; False where it does not suffice.

    A maximum flow: from layers with lost experts over (layer, rank) slots to ranks' memory.
    """
    num_layers, ranks = len(layers), problem.num_ranks
    used = np.array([np.bincount(x.placement[x.placement >= 0], minlength=ranks) for x in layers])
    if (used > problem.experts_per_gpu).any():
        return False
    if not problem.layers_coupled:
        return True
    lost = np.array([(layer.placement < 0).sum() for layer in layers])
    source, sink = num_layers + ranks, num_layers + ranks + 1
    flow = np.zeros((sink + 1, sink + 1), dtype=np.int32)
    flow[source, :num_layers] = lost
    flow[:num_layers, num_layers:source] = np.maximum(problem.experts_per_gpu - used, 0)
    flow[num_layers:source, sink] = np.maximum(problem.slots_of_gpu - used.sum(axis=0), 0)
    found = maximum_flow(csr_array(flow), source, sink)
    dealt = found.flow.toarray()[:num_layers, num_layers:source]
    for layer, before, more in zip(layers, used, dealt, strict=True):
        layer.room = before + more
    return bool(found.flow_value == lost.sum() and (used.sum(axis=0) <= problem.slots_of_gpu).all())
