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

Regions (of every level of the pool). Let region p hold n_p ranks, sum n_p = size, and let int_p be
the rows that start and end in it. What leaves p is (rows of its ranks) - int_p and takes the cut,
and GPUs' ways to the network, so in time t it is at most t U_p(n_p), U_p(n) = min(cut, n largest
rates of its GPUs), concave in n. Its ranks send at least L(n_p), the n_p smallest of all, convex in
n. So int_p >= max(0, L(n_p) - t U_p(n_p)). But int_p is at most the sum of Inside(n_p)[e] over the
experts in p, and every expert is in one region only. Hence t is possible only if some n with all
n_p <= m has

    min over n of  sum over p of max(0, L(n_p) - t U_p(n_p))  <=  sum over e of Inside(m)[e]

and the left side, convex in every n_p, is minimal for the `size` smallest increments. In the same
way the sum over regions of what enters is at least all rows - sum over e of Inside(m)[e], and at
most t times the `size` largest increments of U. The floor is the least t over all m.
"""

from dataclasses import dataclass

import numpy as np

from epplan.topologies.hardware import hardware

from .model import ModelSpec
from .pool import Floats, Level, Pool

_STEPS = 40  # of bisection: 1e-12 of the floor found before
_LEVEL_SIZES = 1.15  # ratio of the sizes m that are tried; rounding up only lowers the bound


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One layer's traffic as every group has it, in rows."""

    counts: Floats  # [ranks, experts]
    contiguous: bool  # whether ranks of an island follow each other

    def inside(self, ranks: int, contiguous: bool) -> Floats:
        """Return the most rows of every expert from so many ranks that sit together, [experts]."""
        ranks = min(ranks, len(self.counts))
        if not contiguous:
            largest: Floats = np.sort(self.counts, axis=0)[len(self.counts) - ranks :].sum(axis=0)
            return largest
        sums = np.concatenate([np.zeros((1, self.counts.shape[1])), self.counts.cumsum(axis=0)])
        most: Floats = (sums[ranks:] - sums[: len(sums) - ranks]).max(axis=0)
        return most


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
        layer = _Layer(counts=counts, contiguous=self.islands_contiguous)
        return self._compute(layer) + self._transfers(layer)

    def _compute(self, layer: _Layer) -> float:
        model, num_experts = self.model, layer.counts.shape[1]
        flops = layer.counts.sum(axis=0) * model.expert_flops_per_row
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
        to_experts = np.maximum(counts.sum(axis=0) - inside, 0.0)
        home = np.sort(counts, axis=1)[:, ::-1]  # a rank's experts, most rows first
        near = self.largest_island * self.experts_per_gpu
        from_ranks = home[:, near:].sum(axis=1)
        past_own_rank = counts.sum(axis=0) - counts.max(axis=0)
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
            outgoing = ranks is self.pool.out
            for level in self.pool.levels:
                rows = self._regions(layer, level, rows, outgoing=outgoing)
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

    def _regions(self, layer: _Layer, level: Level, least: float, *, outgoing: bool) -> float:
        """Return the floor from one level, at least `least`, in rows x seconds per byte.

        Args:
            layer: the traffic.
            level: the regions.
            least: the floor so far.
            outgoing: whether ranks send out of regions (dispatch) or get rows back (combine).
        """
        sent = np.sort(layer.counts.sum(axis=1))
        from_ranks, to_experts = (
            (level.cut_out, level.cut_in) if outgoing else (level.cut_in, level.cut_out)
        )
        here, there = (
            (self.pool.out, self.pool.into) if outgoing else (self.pool.into, self.pool.out)
        )
        leaving = self._speeds(level, from_ranks, here.rate)  # [regions, 1 + n]
        entering = self._speeds(level, to_experts, there.rate)
        best = np.inf
        for most in _sizes(leaving.shape[1] - 1):
            inside = float(layer.inside(most, level.contiguous).sum())
            floor = max(
                self._least_for_ranks(sent, leaving[:, : most + 1], inside, least),
                self._least_for_experts(float(sent.sum()), entering[:, : most + 1], inside),
            )
            best = min(best, floor)
            if best <= least:
                return least
        return max(least, best)

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

    def _least_for_ranks(self, sent: Floats, speeds: Floats, inside: float, least: float) -> float:
        """Return the least time in which ranks' rows leave their regions; inf if none is enough."""
        most = speeds.shape[1] - 1
        smallest = np.concatenate([[0.0], sent[:most].cumsum()])  # L

        def too_short(time: float) -> bool:
            staying = np.maximum(0.0, smallest - time * speeds)  # NaN where there is no GPU
            increments = np.diff(staying, axis=1)
            increments = increments[~np.isnan(increments)]
            if len(increments) < self.size:
                return True  # regions of at most so many GPUs do not hold the group
            return float(np.partition(increments, self.size - 1)[: self.size].sum()) > inside

        if not too_short(least):
            return least
        upper = max(least, 1e-12)
        for _ in range(200):
            if not too_short(upper):
                break
            upper *= 2
        else:
            return np.inf
        lower = least
        for _ in range(_STEPS):
            middle = (lower + upper) / 2
            lower, upper = (middle, upper) if too_short(middle) else (lower, middle)
        return lower

    def _least_for_experts(self, rows: float, speeds: Floats, inside: float) -> float:
        """Return the least time in which rows enter their experts' regions."""
        increments = np.diff(speeds, axis=1)
        increments = np.sort(increments[~np.isnan(increments)])[::-1]
        fastest = float(increments[: self.size].sum())
        if len(increments) < self.size:
            return np.inf
        return max(0.0, rows - inside) / fastest if fastest else np.inf


def _sizes(largest: int) -> list[int]:
    """Return the sizes m to try, upwards to the largest."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size = max(size + 1, int(size * _LEVEL_SIZES))
    return [*sizes, largest]
