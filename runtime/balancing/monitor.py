"""Load of experts and ranks, from the counts of steps.

All numbers are rows: a token sent to two experts is two rows. Everything comes from the counts
matrices that dispatch gathers anyway, so that every rank knows the same without asking.

Shapes: L MoE layers, W ranks, P slots per rank, S = W x P slots, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.plan import Plan

from .waits import Waits


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBalance:
    """How evenly one layer's rows spread."""

    layer: int  # absolute
    max_over_mean: float  # of the ranks' rows; 1 is even, and so is a layer without rows
    jain: float  # (sum x)^2 / (n sum x^2) of the ranks' rows: 1 is even, 1 / n is one rank
    idle_experts: tuple[int, ...]
    cross_host_share: float  # of the rows whose expert is on another host


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Rows of one step or of a window of steps, over all ranks."""

    expert_load: list[list[int]]  # [MoE layers][experts]
    rank_load: list[list[int]]  # [MoE layers][ranks]
    balance: tuple[LayerBalance, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What the monitor tells about some steps."""

    step: int  # the last one, counted from 1
    steps: int
    seconds: float  # of these steps, on this rank
    load: Load
    drift: tuple[float | None, ...]  # by layer; None until there is a mix to compare with
    waits: Waits | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Rows, added up in a form that outlives a change of the slot table."""

    experts_LWE: Tensor  # by source rank and expert
    ranks_LW: Tensor  # by destination rank
    crossing_L: Tensor  # to another host

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            experts_LWE=self.experts_LWE + other.experts_LWE,
            ranks_LW=self.ranks_LW + other.ranks_LW,
            crossing_L=self.crossing_L + other.crossing_L,
        )


def measure_load(plan: Plan, counts_LWWP: Tensor) -> Load:
    """Return the load of experts and ranks.

    Args:
        plan: says which expert is in which slot and which rank on which host.
        counts_LWWP: rows by MoE layer, source rank, destination rank and slot.
    """
    return _load(plan, _sums(plan, counts_LWWP))


def expert_counts(plan: Plan, counts_LWWP: Tensor) -> Tensor:
    """Return rows by MoE layer, source rank and expert, [L, W, E]: the form of a counts file."""
    by_slot_LWS = counts_LWWP.flatten(2)
    # A column more for empty slots, which have no rows.
    experts = plan.model.num_experts
    expert_LS = torch.tensor(
        [[experts if e is None else e for e in slots] for slots in plan.expert_of_slot]
    )
    counts_LWE = by_slot_LWS.new_zeros(*by_slot_LWS.shape[:2], experts + 1)
    counts_LWE.scatter_add_(2, expert_LS[:, None].expand_as(by_slot_LWS), by_slot_LWS)
    return counts_LWE[:, :, :experts]


def drift(mix_LE: Tensor, reference_LE: Tensor) -> list[float]:
    """Return, by layer, the share of rows that go to other experts than before.

    Total variation distance of the two mixes, whatever their sizes: 0 is the same mix, 1 has no
    expert in common. A layer without rows has not drifted.
    """
    shares = [load.double() / load.sum(-1, keepdim=True) for load in (mix_LE, reference_LE)]
    distance_L = (shares[0] - shares[1]).abs().sum(-1) / 2
    return [float(distance) for distance in distance_L.nan_to_num(0.0)]


@dataclass(slots=True, kw_only=True)
class Monitor:
    """Adds steps up to windows; every rank has one, and all say the same but for the seconds.

    Args:
        window: steps of a window.
    """

    window: int
    _step: int = 0
    _steps: int = 0
    _seconds: float = 0.0
    _sums: _Sums | None = None
    _reference_LE: Tensor | None = None

    @property
    def has_steps(self) -> bool:
        """Whether there was a step since the last window."""
        return self._steps > 0

    def after_step(self, plan: Plan, counts_LWWP: Tensor, seconds: float) -> bool:
        """Add a step, and return whether it completes a window.

        Args:
            plan: whose slot table the step used.
            counts_LWWP: what dispatch counted.
            seconds: how long the step took.
        """
        sums = _sums(plan, counts_LWWP)
        self._sums = sums if self._sums is None else self._sums + sums
        self._step += 1
        self._steps += 1
        self._seconds += seconds
        return self._steps >= self.window

    def close_window(self, plan: Plan, waits: Waits | None = None) -> tuple[Window, Tensor]:
        """Return the window, with its counts_LWE by source rank and expert; the next one begins."""
        assert self._sums is not None, "no step since the last window"
        sums = self._sums
        mix_LE = sums.experts_LWE.sum(1)
        shift: Sequence[float | None] = [None] * len(mix_LE)
        if self._reference_LE is not None:
            shift = drift(mix_LE, self._reference_LE)
        window = Window(
            step=self._step,
            steps=self._steps,
            seconds=self._seconds,
            load=_load(plan, sums),
            drift=tuple(shift),
            waits=waits,
        )
        self._sums, self._steps, self._seconds = None, 0, 0.0
        return window, sums.experts_LWE

    def compare_with(self, counts_LWE: Tensor, *, only_first: bool = False) -> None:
        """Measure drift from this mix on: the one the present slot table was made for.

        Args:
            counts_LWE: its counts.
            only_first: not if there is a mix to compare with already.
        """
        if self._reference_LE is None or not only_first:
            self._reference_LE = counts_LWE.sum(1)


def _sums(plan: Plan, counts_LWWP: Tensor) -> _Sums:
    rows_LWW = counts_LWWP.sum(-1)
    hosts = [rank.host for rank in plan.ranks]
    away_WW = torch.tensor([[a != b for b in hosts] for a in hosts])
    return _Sums(
        experts_LWE=expert_counts(plan, counts_LWWP),
        ranks_LW=rows_LWW.sum(1),
        crossing_L=(rows_LWW * away_WW).sum((1, 2)),
    )


def _load(plan: Plan, sums: _Sums) -> Load:
    expert_load: list[list[int]] = sums.experts_LWE.sum(1).tolist()
    rank_load: list[list[int]] = sums.ranks_LW.tolist()
    crossing: list[int] = sums.crossing_L.tolist()
    return Load(
        expert_load=expert_load,
        rank_load=rank_load,
        balance=tuple(
            _balance(layer, by_rank, by_expert, rows)
            for layer, by_rank, by_expert, rows in zip(
                plan.model.moe_layers, rank_load, expert_load, crossing, strict=True
            )
        ),
    )


def _balance(
    layer: int, rank_load: list[int], expert_load: list[int], crossing: int
) -> LayerBalance:
    total, num_ranks = sum(rank_load), len(rank_load)
    return LayerBalance(
        layer=layer,
        max_over_mean=max(rank_load) * num_ranks / total if total else 1.0,
        jain=total**2 / (num_ranks * sum(rows**2 for rows in rank_load)) if total else 1.0,
        idle_experts=tuple(expert for expert, rows in enumerate(expert_load) if not rows),
        cross_host_share=crossing / total if total else 0.0,
    )
