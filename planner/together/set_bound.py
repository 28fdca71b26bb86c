"""What transfers last at least, from how few places tokens can reach (`pair_bound`).

The worst row of a kind (all NICs' incoming sides, say) is no less than the rows' mean weighed by
capacity. That mean is one linear row over all tokens and places; where each token that reaches a
place outside its home adds at least a seconds to it, the transfer lasts a times the least reach.
Home is nothing, the token's rank or its island, whichever proves more.

With copies that a token's choices pick at random by their shares, each for itself, the tokens
expected at places are a mean over placements with one copy: draw a copy of every expert once, by its
share. No two experts of a token are the same, so each token's chances are what they were; and every
placement drawn is on GPUs that hold these copies, so it keeps their capacity. What holds for a sum
over rows of all placements therefore holds for copies; for single rows it does not, and what single
experts cause is divided by their copies.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.planner.placement.rows import Ints, PhaseRows

from .pair_bound import Reach, coactivation, most_at_home, most_pairs
from .set_rows import SetLayer, TransferRows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Least:
    """Least reach of all tokens outside some home.

    Attributes:
        counts: which pairs of place and source are not at home, [places, sources].
        reached: places outside home reached at least, over all tokens.
    """

    counts: npt.NDArray[np.bool_]
    reached: float


def reach_bound(
    layer: SetLayer,
    island: Ints,
    capacity: Ints,
    deadline: float = np.inf,
    copies: int | None = None,
) -> float:
    """Return seconds that no placement of a layer goes below.

    Args:
        layer: the layer.
        island: of every GPU, [gpus].
        capacity: most experts on every GPU, [gpus].
        deadline: when to stop improving it (time.monotonic).
        copies: of all experts at most, with any shares; None: one of each.
    """
    return layer.total(least_durations(layer, island, capacity, deadline, copies))


def least_durations(
    layer: SetLayer, island: Ints, capacity: Ints, deadline: float, copies: int | None
) -> list[float]:
    """Return what every phase lasts at least; arguments of `reach_bound`."""
    known = [
        [_least(layer, window, places, island, capacity, deadline) for places in layer.place_of_gpu]
        for window in range(len(layer.sets))
    ]
    transfers = [
        max(_floor(phase, copies), _transfer_bound(phase, known[phase.window]))
        for phase in layer.transfers
    ]
    return [*transfers, *(_other_bound(phase, copies) for phase in layer.others)]


def _floor(phase: TransferRows | PhaseRows, copies: int | None) -> float:
    return phase.floor_s if copies is None else phase.floor_with_copies(copies)


def _other_bound(phase: PhaseRows, copies: int | None) -> float:
    """Return what the experts' work, or the longest path, lasts at least.

    The slowest GPU is no faster than all together, and an expert takes as much of that anywhere.
    """
    floor = _floor(phase, copies)
    if not phase.is_compute:
        return floor
    num_gpus = phase.alone.shape[1]
    together = [
        float((phase.extra[first] * phase.capacity[first]).sum())
        / float(phase.capacity[first : first + num_gpus].sum())
        for first in range(0, len(phase.extra), num_gpus)
    ]
    return max(floor, *together)


def _least(
    layer: SetLayer,
    window: int,
    place_of_gpu: Ints,
    island: Ints,
    capacity: Ints,
    deadline: float,
) -> list[_Least]:
    """Return what is known of one window at one level, for every kind of home."""
    sets, counts = layer.sets[window], layer.counts[window]
    room = np.bincount(place_of_gpu, weights=capacity).astype(np.int64)
    pairs = most_pairs(coactivation(sets, layer.num_experts), room, deadline)

    def reach(at_home: float = 0.0, *, single_home: bool = True) -> float:
        known = Reach(
            tokens=sets.num_tokens,
            assignments=float(counts.sum()),
            pairs=pairs,
            at_home=at_home,
            single_home=single_home,
        )
        return known.least(sets.experts.shape[1])

    every = np.ones((len(room), sets.num_sources), dtype=bool)
    found = [_Least(counts=every, reached=max(reach(), sets.num_tokens))]
    if sets.num_sources == 1:
        return found
    homes = np.zeros((int(island.max()) + 1, layer.num_experts))
    np.add.at(homes, island, counts)
    rooms = np.bincount(island, weights=capacity).astype(np.int64)
    island_of_place = island[np.unique(place_of_gpu, return_index=True)[1]]
    at_home = most_at_home(homes, rooms)
    found.append(
        _Least(
            counts=island_of_place[:, None] != island[None, :],
            reached=reach(at_home, single_home=len(room) == len(rooms)),
        )
    )
    if len(room) == sets.num_sources:
        found.append(
            _Least(
                counts=~np.eye(len(room), dtype=bool),
                reached=reach(most_at_home(counts, capacity)),
            )
        )
    return found


def _transfer_bound(phase: TransferRows, by_level: list[list[_Least]]) -> float:
    best = 0.0
    for kind in np.unique(phase.kind).tolist():
        weight = np.where(phase.kind == kind, phase.capacity, 0.0)
        weight /= weight.sum()
        total = 0.0
        for matrix, known in zip(phase.matrices, by_level, strict=True):
            row = np.asarray(weight @ matrix)
            total += max(
                float(row.reshape(least.counts.shape)[least.counts].min()) * least.reached
                for least in known
                if least.counts.any()
            )
        best = max(best, total)
    return best
