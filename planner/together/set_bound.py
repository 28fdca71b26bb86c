"""What a layer lasts at least, from how few places tokens can reach (`pair_bound`).

The worst row of a kind (all NICs' incoming sides, say) is no less than the rows' mean weighed by
capacity. That mean is one linear row over all tokens and places; where each token that reaches a
place outside its home adds at least a seconds to it, the transfer lasts a times the least reach.
Home is nothing, the token's rank or its island, whichever proves more.

The fewer places tokens reach, the more of the work is at few of them. If the experts work t
seconds, no place has more assignments than its GPUs do in t, which pairs and so reach depend on:

    layer >= least over t of  (t and what transfers last at least within t)

for every window. Transfers within t last no less than within more, so in steps t1 < t2 < ... the
least of (t1 and transfers within t2), (t2 and transfers within t3), ... is proven.

The same holds for copies with shares, but for single experts: what one causes by itself is divided
by its copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.planner.placement.rows import Floats, Ints, PhaseRows

from .pair_bound import (
    Reach,
    coactivation,
    most_at_home,
    most_pairs,
    most_pairs_within,
    spectrum,
)
from .set_rows import SetLayer, TransferRows

_STEP = 1.002  # between values of t


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    """One way to see tokens' homes.

    Attributes:
        counts: which pairs of place and source are not at home, [places, sources].
        at_home: most choices that stay at home; 0 where homes count like other places.
        single: whether a home is one place.
    """

    counts: npt.NDArray[np.bool_]
    at_home: float = 0.0
    single: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is known of the tokens of one window at one level of places.

    Attributes:
        tokens: number of tokens.
        assignments: their choices.
        top_k: most choices of a token.
        pairs: most pairs of one token's experts at one place, in any placement.
        spectrum: of the tokens, [places].
        work: assignments that every place does in a second, [places].
        fits: most assignments that the slots of every place may get, [places].
        homes: ways to see homes.
    """

    tokens: float
    assignments: float
    top_k: int
    pairs: float
    spectrum: Floats
    work: Floats
    fits: Floats
    homes: tuple[_Home, ...]

    def least(self, work_s: float) -> list[float]:
        """Return the places reached at least outside each kind of home, over all tokens.

        Args:
            work_s: seconds that the experts work at most.
        """
        heaviest = float(np.minimum(self.work * work_s, self.fits).max())
        within = most_pairs_within(self.spectrum, heaviest, self.assignments)
        found = []
        for home in self.homes:
            known = Reach(
                tokens=self.tokens,
                assignments=self.assignments,
                pairs=min(self.pairs, within),
                at_home=home.at_home,
                single_home=home.single,
            )
            everywhere = self.tokens if home.counts.all() else 0.0
            found.append(max(known.least(self.top_k), everywhere))
        return found


def reach_bound(
    layer: SetLayer,
    island: Ints,
    capacity: Ints,
    deadline: float = np.inf,
    copies: int | None = None,
    work_s: Sequence[float] = (),
) -> float:
    """Return seconds that no placement of a layer goes below.

    Args:
        layer: the layer.
        island: of every GPU, [gpus].
        capacity: most experts on every GPU, [gpus].
        deadline: when to stop improving it (time.monotonic).
        copies: of all experts at most, with any shares; None: one of each.
        work_s: what the experts' work lasts at least for other reasons, [windows].
    """
    windows = range(len(layer.sets))
    least_work = np.array(work_s or [0.0] * len(windows))
    seconds = np.array(
        [
            _Window(layer, window, island, capacity, deadline, copies).least_s(least_work[window])
            for window in windows
        ]
    )
    return float(layer.objective.seconds(seconds))


class _Window:
    """One window of a layer: what its phases last at least."""

    def __init__(
        self,
        layer: SetLayer,
        window: int,
        island: Ints,
        capacity: Ints,
        deadline: float,
        copies: int | None,
    ) -> None:
        self._objective, self._constant_s = layer.objective, float(layer.constant_s[window])
        others = [phase for phase in layer.others if phase.window == window]
        (self._work,) = (phase for phase in others if phase.is_compute)
        self._work_s = _least_work(self._work, copies)
        self._paths_s = sum(
            phase.weight * _floor(phase, copies) for phase in others if not phase.is_compute
        )
        transfers = [phase for phase in layer.transfers if phase.window == window]
        self._known = [
            _known(layer, window, places, island, capacity, self._work, deadline)
            for places in (layer.place_of_gpu if transfers else ())
        ]
        self._transfers = [
            (phase.weight, _floor(phase, copies), _slopes(phase, self._known))
            for phase in transfers
        ]

    def least_s(self, work_s: float) -> float:
        """Return the seconds of the window at least, whose work lasts so long at least."""
        work_s = max(work_s, self._work_s)
        best = np.inf
        while True:
            more_s = work_s * _STEP
            best = min(best, self._seconds(self._transfers_s(more_s), work_s))
            if self._seconds(self._transfers_s(np.inf), more_s) >= best:
                return best  # no longer work is faster, whatever transfers last then
            work_s = more_s

    def _seconds(self, transfers_s: float, work_s: float) -> float:
        transfer = self._constant_s + self._paths_s + transfers_s
        return float(self._objective.window_seconds(np.array(transfer), np.array(work_s)))

    def _transfers_s(self, work_s: float) -> float:
        """Return what transfers last at least while experts work so long at most."""
        least = [known.least(work_s) for known in self._known]
        return sum(
            weight
            * max(
                floor,
                *(
                    sum(
                        max(a * reached for a, reached in zip(own, of_level, strict=True))
                        for own, of_level in zip(by_level, least, strict=True)
                    )
                    for by_level in slopes
                ),
            )
            for weight, floor, slopes in self._transfers
        )


def _floor(phase: TransferRows | PhaseRows, copies: int | None) -> float:
    return phase.floor_s if copies is None else phase.floor_with_copies(copies)


def _least_work(phase: PhaseRows, copies: int | None) -> float:
    """Return what the experts' work lasts at least.

    The slowest GPU is no faster than all together, and an expert takes as much of that anywhere.
    """
    num_gpus = phase.alone.shape[1]
    together = [
        float((phase.extra[first] * phase.capacity[first]).sum())
        / float(phase.capacity[first : first + num_gpus].sum())
        for first in range(0, len(phase.extra), num_gpus)
    ]
    return max(_floor(phase, copies), *together)


def _known(
    layer: SetLayer,
    window: int,
    place_of_gpu: Ints,
    island: Ints,
    capacity: Ints,
    work: PhaseRows,
    deadline: float,
) -> _Known:
    """Return what is known of one window at one level."""
    sets, counts = layer.sets[window], layer.counts[window]
    room = np.bincount(place_of_gpu, weights=capacity).astype(np.int64)
    together, load = coactivation(sets, layer.num_experts), counts.sum(axis=0)
    falling = np.concatenate([[0.0], np.cumsum(np.sort(load)[::-1])])
    arithmetic = work.extra[: len(place_of_gpu)].sum(axis=1)  # of all experts on one GPU
    return _Known(
        tokens=sets.num_tokens,
        assignments=float(counts.sum()),
        top_k=sets.experts.shape[1],
        pairs=most_pairs(together, room, deadline),
        spectrum=spectrum(together, load, len(room)),
        work=np.bincount(place_of_gpu, weights=counts.sum() / arithmetic).astype(np.float64),
        fits=falling[np.minimum(room, len(load))],
        homes=tuple(_homes(layer, window, place_of_gpu, island, capacity)),
    )


def _homes(
    layer: SetLayer, window: int, place_of_gpu: Ints, island: Ints, capacity: Ints
) -> list[_Home]:
    counts, num_sources = layer.counts[window], layer.sets[window].num_sources
    places = int(place_of_gpu.max()) + 1
    found = [_Home(counts=np.ones((places, num_sources), dtype=bool))]
    if num_sources == 1:
        return found
    homes = np.zeros((int(island.max()) + 1, layer.num_experts))
    np.add.at(homes, island, counts)
    rooms = np.bincount(island, weights=capacity).astype(np.int64)
    island_of_place = island[np.unique(place_of_gpu, return_index=True)[1]]
    found.append(
        _Home(
            counts=island_of_place[:, None] != island[None, :],
            at_home=most_at_home(homes, rooms),
            single=places == len(rooms),
        )
    )
    if places == num_sources:
        found.append(
            _Home(counts=~np.eye(places, dtype=bool), at_home=most_at_home(counts, capacity))
        )
    return found


def _slopes(phase: TransferRows, known: list[_Known]) -> list[list[list[float]]]:
    """Return the least seconds a place reached adds to rows' means, [kinds][levels][homes]."""
    found = []
    for kind in np.unique(phase.kind).tolist():
        weight = np.where(phase.kind == kind, phase.capacity, 0.0)
        weight /= weight.sum()
        by_level = []
        for matrix, of_level in zip(phase.matrices, known, strict=True):
            row = np.asarray(weight @ matrix)
            homes = [home.counts for home in of_level.homes]
            by_level.append(
                [
                    float(row.reshape(counts.shape)[counts].min()) if counts.any() else 0.0
                    for counts in homes
                ]
            )
        found.append(by_level)
    return found
