"""A lower bound on the cost of any EP group: whichever GPUs form it, wherever the experts sit.

Given: traffic counts c[i, e] of `size` ranks, numbered in cluster order; one copy of every expert,
at most `experts_per_gpu` of them on a GPU. Not given: which GPUs, and which expert on which. Every
phase gets a floor, the largest of those below; phases and layers add up as in `planner.cost`.

Inside(n)[e]: of expert e's rows at most this many come from n ranks that sit together. Where
regions are contiguous in cluster order those ranks follow each other, so it is the largest sum over
n consecutive ranks; else the sum of the n largest counts.

Matched. Let every expert (or rank) bring an amount a wherever it sits, and GPU g work it off at
speed v. Of the k experts with most, one sits on a GPU no faster than the
ceil(k / experts_per_gpu)-th fastest of the pool, since fewer GPUs have no room for them. So the
phase lasts max over k of a_k / v_ceil(k / experts_per_gpu), both sorted downwards. Amounts, speeds:
- an expert's FLOPs on a GPU's FLOP/s;
- an expert's rows from other islands, at least all but Inside(largest island), through the GPU's
  way to the network (`pool.Direction.rate`), and the same as seen from the rank that sends: all its
  rows but those of as many experts as its island holds;
- the rows between an expert and other ranks than its GPU's own, through all links of the GPU
  (`pool.Direction.port`), and a rank's rows but those of as many experts as its GPU holds.

Regions (of every level of the pool). Let region p hold n_p ranks, sum n_p = size, the experts X_p,
and let int_p be the rows that start and end in it. What leaves p is (rows of its ranks) - int_p and
takes the cut, and its GPUs' ways to the network, so in time t it is at most t U_p(n_p), with
U_p(n) = min(cut, n largest rates of its GPUs), concave in n. What enters is (rows of its experts) -
int_p, at most t V_p(n_p) likewise. For combine the two directions change places.

1. The region of expert e, with n ranks, holds at least E - (size - n) experts_per_gpu experts, as
   the other GPUs have no room for more. So for some n its entry takes, besides e's rows from
   outside, those of so many less one experts with fewest: of each at least all but Inside(n).
2. One region: if its ranks are a window A of n ranks, int_p is at most the fractional knapsack of
   experts with value c[A, e] and weight (all rows of e) - c[A, e], what enters, in the room
   t V_p(n).
   And int_p >= c[A] - t U_p(n). If no window satisfies both, p does not hold n ranks. (Only where
   regions are contiguous.)
3. All regions: ranks send at least L(n_p), the n_p smallest of all, convex in n, so
   int_p >= max(0, L(n_p) - t U_p(n_p)). But int_p is at most the sum of Inside(n_p)[e] over X_p,
   and every expert is in one region only. Hence t is possible only if for some m, with n_p at most
   m and what 2. leaves,

       min over n of  sum over p of max(0, L(n_p) - t U_p(n_p))  <=  sum over e of Inside(m)[e]

   and the left side, convex in every n_p, is minimal for the `size` smallest increments. In the
   same way what enters all regions is at least all rows - sum over e of Inside(m)[e], and at most
   t times the `size` largest increments of V. The floor is the least t that passes.

Sizes n are taken in steps: (low, high] has the least rows of any n in it and the most capacity.
"""

import numpy as np
import numpy.typing as npt

from epplan.planner.model import ModelSpec
from epplan.topologies.hardware import hardware

from .pool import Floats, Ints, Level, Pool

_PRECISION = 1e-4  # of the bisection; the lower end is the bound
_ROUNDING = 1e-9
_NEVER = 1e9  # rows x seconds per byte that mean there is no way at all
_STEP = 1.15  # ratio of sizes n that are taken together


class _Layer:
    """One layer's traffic as every group has it, in rows."""

    def __init__(self, counts: Floats) -> None:
        self.counts = counts  # [ranks, experts]
        self.of_rank = counts.sum(axis=1)
        self.of_expert = counts.sum(axis=0)
        self._windows: dict[int, _Windows] = {}

    def inside(self, ranks: int, contiguous: bool) -> Floats:
        """Return the most rows of every expert from so many ranks that sit together, [experts]."""
        if not contiguous:
            largest = np.sort(self.counts, axis=0)[len(self.counts) - ranks :]
            total: Floats = largest.sum(axis=0)
            return total
        most: Floats = _window_sums(self.counts, ranks).max(axis=0)
        return most

    def windows(self, ranks: int) -> "_Windows":
        """Return all windows of so many ranks."""
        if ranks not in self._windows:
            self._windows[ranks] = _Windows(_window_sums(self.counts, ranks), self.of_expert)
        return self._windows[ranks]


class _Windows:
    """All windows of n consecutive ranks, with the experts that keep most in them first."""

    def __init__(self, sent: Floats, of_expert: Floats) -> None:
        self.of_ranks = sent.sum(axis=1)  # rows of a window's ranks, [windows]
        share = np.divide(sent, of_expert, out=np.zeros_like(sent), where=of_expert > 0)
        order = np.argsort(-share, axis=1, kind="stable")
        kept = np.take_along_axis(sent, order, axis=1)
        entering = np.take_along_axis(of_expert - sent, order, axis=1)
        nothing = np.zeros((len(sent), 1))
        self._kept = np.concatenate([nothing, kept.cumsum(axis=1)], axis=1)
        self._entering = np.concatenate([nothing, entering.cumsum(axis=1)], axis=1)

    def most_inside(self, room: float) -> Floats:
        """Return the most rows inside a window when at most `room` rows enter it, [windows]."""
        last = self._entering.shape[1] - 1
        full = np.count_nonzero(self._entering <= room, axis=1) - 1  # experts that enter whole
        rows, after = np.arange(len(full)), np.minimum(full + 1, last)
        kept, entering = self._kept[rows, full], self._entering[rows, full]
        more, wider = self._kept[rows, after] - kept, self._entering[rows, after] - entering
        part = np.divide(room - entering, wider, out=np.zeros(len(full)), where=wider > 0)
        most: Floats = kept + more * np.minimum(part, 1.0)
        return most


def _window_sums(counts: Floats, ranks: int) -> Floats:
    """Return sums over every `ranks` consecutive ranks, [windows, experts]."""
    sums = np.concatenate([np.zeros((1, counts.shape[1])), counts.cumsum(axis=0)])
    windows: Floats = sums[ranks:] - sums[: len(sums) - ranks]
    return windows


def choice_bound(pool: Pool, model: ModelSpec, counts: Floats, experts_per_gpu: int) -> float:
    """Return seconds that no group of the pool and no placement on it goes below.

    Args:
        pool: the GPUs to choose from.
        model: the model.
        counts: assignments of a step by rank of the group, [layers, ranks, experts].
        experts_per_gpu: most experts of one layer on a GPU.
    """
    limits = _Limits(pool, model, counts.shape[1], experts_per_gpu)
    known: dict[bytes, float] = {}
    total = 0.0
    for layer in counts:
        key = layer.tobytes()
        if key not in known:
            known[key] = limits.layer_floor(layer)
        total += known[key]
    return total


class _Limits:
    """What the pool allows, and the floors of a layer under it."""

    def __init__(self, pool: Pool, model: ModelSpec, size: int, experts_per_gpu: int) -> None:
        self.pool = pool
        self.model = model
        self.size = size
        self.experts_per_gpu = experts_per_gpu
        self.largest_island = min(size, int(np.bincount(pool.routes.island).max()))
        self.islands_contiguous = not pool.levels or pool.levels[0].contiguous

    def layer_floor(self, counts: Floats) -> float:
        """Return the floor of one layer, counts [ranks, experts]."""
        layer = _Layer(counts)
        return self._compute(layer) + self._transfers(layer)

    def _compute(self, layer: _Layer) -> float:
        model, num_experts = self.model, layer.counts.shape[1]
        flops = layer.of_expert * model.expert_flops_per_row
        # In time t a GPU reads floor(t * speed / bytes) experts: all of them need the num_experts
        # earliest ends of a first, second, ... expert on the fastest GPUs.
        fastest = np.sort(self.pool.hbm_bytes_per_s)[::-1][: self.size]
        ends = np.arange(1, self.experts_per_gpu + 1)[:, None] * model.expert_bytes / fastest
        reading = float(np.sort(ends.ravel())[num_experts - 1])
        return max(self._matched(flops, self.pool.flops_per_s, self.experts_per_gpu), reading)

    def _transfers(self, layer: _Layer) -> float:
        """Return the floors of dispatch and combine together."""
        if self.size == 1:
            return 0.0
        counts = layer.counts
        inside = layer.inside(self.largest_island, self.islands_contiguous)
        to_experts = np.maximum(layer.of_expert - inside, 0.0)
        home = np.sort(counts, axis=1)[:, ::-1]  # a rank's experts, most rows first
        near = self.largest_island * self.experts_per_gpu
        from_ranks = home[:, near:].sum(axis=1)
        past_own_rank = layer.of_expert - counts.max(axis=0)
        past_own_experts = home[:, self.experts_per_gpu :].sum(axis=1)
        latencies = self._latency(bool(to_experts.any()), bool(past_own_rank.any()))
        total = 0.0
        for experts, ranks in (
            (self.pool.into, self.pool.out),  # dispatch: into experts' GPUs, out of ranks' GPUs
            (self.pool.out, self.pool.into),  # combine
        ):
            rows = max(
                self._matched(to_experts, experts.rate, self.experts_per_gpu),
                self._matched(from_ranks, ranks.rate, 1),
                self._matched(past_own_rank, experts.port, self.experts_per_gpu),
                self._matched(past_own_experts, ranks.port, 1),
            )
            for level in self.pool.levels:
                cuts = (level.cut_out, level.cut_in)
                leaving, entering = cuts if ranks is self.pool.out else cuts[::-1]
                regions = _Regions(
                    layer=layer,
                    contiguous=level.contiguous,
                    leaving=self._speeds(level, leaving, ranks.rate),
                    entering=self._speeds(level, entering, experts.rate),
                    experts_per_gpu=self.experts_per_gpu,
                )
                rows = max(rows, regions.hottest_s(float(experts.rate.max())))
                rows = regions.least_s(rows)
            total += rows * self.model.row_bytes + latencies
        return total

    def _latency(self, far: bool, away: bool) -> float:
        """Return the start of a transfer and the least latency of a path that must be used."""
        latency_s, island = self.pool.routes.latency_s, self.pool.routes.island
        reachable = ~self.pool.unreachable
        np.fill_diagonal(reachable, False)
        if far:
            reachable &= island[:, None] != island
        least = latency_s[reachable].min(initial=np.inf) if far or away else 0.0
        return hardware().latency["base"] + (float(least) if np.isfinite(least) else 0.0)

    def _matched(self, amounts: Floats, speeds: Floats, per_gpu: int) -> float:
        """Return max over k of the k-th largest amount over the ceil(k / per_gpu)-th speed."""
        amounts = np.sort(amounts[amounts > 0])[::-1]
        fastest = np.sort(speeds)[::-1]
        if not len(amounts) or not fastest[0]:
            return 0.0  # nothing moves, or the pool has no way for it
        at = np.minimum(np.arange(len(amounts)) // per_gpu, len(fastest) - 1)
        speed = fastest[at]
        return float((amounts / np.where(speed > 0, speed, fastest[0])).max())

    def _speeds(self, level: Level, cut: Floats, rate: Floats) -> Floats:
        """Return U: the most bytes/s between a region and the others with n GPUs, [regions, 1 + n].

        Beyond the number of its GPUs a region's row is NaN.
        """
        members = [np.flatnonzero(level.region == region) for region in range(len(cut))]
        width = min(self.size, max(map(len, members)))
        speeds = np.full((len(cut), width + 1), np.nan)
        for region, gpus in enumerate(members):
            rates = np.sort(rate[gpus])[::-1][:width]
            speeds[region, : len(rates) + 1] = np.minimum(cut[region], [0, *rates.cumsum()])
        return speeds


class _Regions:
    """One level's regions for one layer and phase; times are rows over bytes/s."""

    def __init__(
        self,
        *,
        layer: _Layer,
        contiguous: bool,
        leaving: Floats,
        entering: Floats,
        experts_per_gpu: int,
    ) -> None:
        """Prepare.

        Args:
            layer: the traffic.
            contiguous: whether regions are, in cluster order.
            leaving: U, what n GPUs of a region send out of it, [regions, 1 + n]; NaN where n is
                more than its GPUs.
            entering: V, likewise.
            experts_per_gpu: most experts of the layer on a GPU.
        """
        self._layer = layer
        self._contiguous = contiguous
        # Regions of equal speeds count as often as they are.
        both, self._times = np.unique(
            np.nan_to_num(np.stack([leaving, entering], axis=1), nan=-1.0),
            axis=0,
            return_counts=True,
        )
        both[both < 0] = np.nan
        self._leaving, self._entering = both[:, 0], both[:, 1]  # [kinds, 1 + n]
        self._per_gpu = experts_per_gpu
        self._size = len(layer.counts)
        self._smallest = np.concatenate([[0.0], np.sort(layer.of_rank).cumsum()])  # L
        self._steps = _steps(leaving.shape[1] - 1)
        self._inside = {
            high: layer.inside(high, contiguous) for _, high in self._steps
        }  # [experts]

    def hottest_s(self, rate: float) -> float:
        """Return the floor from single experts and the least that must be with them (1.)."""
        num_experts, times = self._layer.counts.shape[1], []
        for low, high in self._steps:
            outside = np.maximum(self._layer.of_expert - self._inside[high], 0.0)
            others = max(0, num_experts - (self._size - low - 1) * self._per_gpu - 1)
            company = float(np.sort(outside)[:others].sum())
            speed = float(np.nanmax(self._entering[:, low + 1 : high + 1]))
            if not speed or not rate:
                return 0.0  # no way between regions: what is reachable is inside one
            times.append(np.maximum((outside + company) / speed, outside / rate))
        return float(np.min(times, axis=0).max())

    def least_s(self, least: float) -> float:
        """Return the floor from 2. and 3., at least `least`."""
        if self._is_possible(least):
            return least
        lower, upper = least, max(least, np.finfo(float).tiny)
        while not self._is_possible(upper):
            lower, upper = upper, upper * 2
            if upper > _NEVER:
                return least  # no group is possible at all: nothing to bound
        while upper - lower > _PRECISION * upper:
            middle = (lower + upper) / 2
            lower, upper = (lower, middle) if self._is_possible(middle) else (middle, upper)
        return lower

    def _is_possible(self, time: float) -> bool:
        """Tell whether some group may pass all its rows in that time."""
        everything = np.count_nonzero(~np.isnan(self._leaving), axis=1) - 1  # GPUs, [kinds]
        if not self._holds_the_group(time, everything):
            return False
        return not self._contiguous or self._holds_the_group(time, self._limits(time))

    def _limits(self, time: float) -> Ints:
        """Return the most ranks that 2. allows in every kind of region, [kinds]."""
        limits = np.zeros(len(self._leaving), dtype=np.intp)
        for low, high in reversed(self._steps):
            windows = self._layer.windows(high)
            # n ranks are part of such a window: at most high - low - 1 of its ranks are missing.
            sent = windows.of_ranks - (high - low - 1) * self._layer.of_rank.max()
            for kind in np.flatnonzero(limits == 0).tolist():
                number = min(high, int(np.count_nonzero(~np.isnan(self._leaving[kind]))) - 1)
                if number <= low:
                    continue
                inside = windows.most_inside(time * self._entering[kind, number])
                must = sent - time * self._leaving[kind, number]
                if (must <= inside + _ROUNDING * sent).any():
                    limits[kind] = number
        return limits

    def _holds_the_group(self, time: float, limits: Ints) -> bool:
        """Tell whether 3. allows the time for some m, with at most `limits` ranks, [kinds]."""
        rows = float(self._layer.of_rank.sum())
        width = np.arange(self._leaving.shape[1])
        staying = np.diff(np.maximum(0.0, self._smallest[width] - time * self._leaving), axis=1)
        for _, high in self._steps:
            allowed = width[1:] <= np.minimum(limits, high)[:, None]
            inside = float(self._inside[high].sum()) * (1 + _ROUNDING)
            if self._sum_of_smallest(staying, allowed) <= inside:
                speed = -self._sum_of_smallest(-np.diff(self._entering, axis=1), allowed)
                if rows - inside <= time * speed:
                    return True
        return False

    def _sum_of_smallest(self, values: Floats, allowed: npt.NDArray[np.bool_]) -> float:
        """Return the sum of the `size` smallest, kinds counted as often as they are; inf if fewer.

        Args:
            values: increments, [kinds, n].
            allowed: which of them, [kinds, n].
        """
        times = np.broadcast_to(self._times[:, None], values.shape)[allowed]
        chosen = values[allowed]
        order = np.argsort(chosen)
        before = np.concatenate([[0], times[order].cumsum()])
        if before[-1] < self._size:
            return np.inf
        taken = np.clip(self._size - before[:-1], 0, times[order])
        return float((chosen[order] * taken).sum())


def _steps(largest: int) -> list[tuple[int, int]]:
    """Return steps (low, high] from 0 to the largest size."""
    steps, low = [], 0
    while low < largest:
        high = min(largest, max(low + 1, int(low * _STEP)))
        steps.append((low, high))
        low = high
    return steps
