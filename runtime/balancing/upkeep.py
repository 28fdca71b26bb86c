"""Between the steps of a run: watch, report, balance.

Every rank has an `Upkeep` and calls it alike after the same steps. It holds the plan in use, which
changes layer by layer while experts move.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.checks.finite import FiniteCheck
from epplan.runtime.clock import Place
from epplan.runtime.dispatchers.local import Local
from epplan.runtime.dispatchers.replicas import replicas_of_rank
from epplan.runtime.layer.experts import stack_experts
from epplan.runtime.layer.layers import MoeWeights
from epplan.runtime.model import ExpertParallelModel, Step
from epplan.runtime.options import Options
from epplan.runtime.watchdog import At
from epplan.runtime.weights import Weights

from .balance import OutputChanges, updated_bias
from .metrics import LineLog, Metrics, Progress, check_prometheus, served
from .migrate import Experts, Migration, empty_like
from .monitor import Monitor, expert_counts
from .rebalancing import Rebalancing
from .waits import WaitLog, Waits

_AFTER = Place(-1, -1)  # a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkept:
    """What a run's upkeep did."""

    plan: Plan  # in use at the end
    output_changes: tuple[str, ...]
    progress: Progress
    waits: Waits | None  # of the last window
    notes: tuple[str, ...]


class Upkeep:
    """Watches, reports and balances a model; a context manager.

    Args:
        plan: what the model was built from.
        options: which of it all is on.
        model: of this rank; its hooks and layers are changed.
        weights: of the model.
        at: how this rank says where it is.

    Raises:
        InputError: metrics cannot be served or written.
    """

    def __init__(
        self, plan: Plan, options: Options, model: ExpertParallelModel, weights: Weights, at: At
    ) -> None:
        self._options, self._model, self._weights, self._at = options, model, weights, at
        self._rank = model.dispatcher.channel.rank
        self._first_plan = plan
        self._changes = OutputChanges(
            bias_rate=options.gating_bias, capacity_factor=options.drop_beyond
        )
        self._finite = FiniteCheck(self._rank, plan.slots_per_rank)
        self._monitor = Monitor(window=options.window)
        self._waits = WaitLog(plan.model.moe_layers, plan.world_size)
        self._last_waits: Waits | None = None
        self._rebalancing = Rebalancing(
            plan=plan,
            rank=self._rank,
            threshold=options.rebalance_drift or 0.0,
            start=self._migration,
        )
        # Nothing travels with the local dispatcher: every rank holds what it needs.
        self._may_move = options.rebalance_drift is not None and not isinstance(
            model.dispatcher, Local
        )
        self._tokens = self._dropped = self._step = 0
        self._is_balancing = False
        self._own_bias_LE = [moe.bias_E for moe in self._moe_layers()]
        if options.gating_bias is not None:
            self._give_biases()
        model.hooks.finite = self._finite
        model.hooks.rows_under_way = self._rows_under_way
        self._closing = ExitStack()
        self._metrics: Metrics | None = None
        self._log: LineLog | None = None

    def __enter__(self) -> Self:
        """Open what rank 0 reports to."""
        options = self._options
        if self._rank == 0 and options.metrics is not None:
            self._log = LineLog(options.metrics)
            self._closing.callback(self._log.close)
        if self._rank == 0 and options.metrics_port is not None:
            check_prometheus()
            labels = {"model": self.plan.model.name, "plan": self._first_plan.sha256()[:12]}
            self._metrics = Metrics(labels)
            self._closing.enter_context(served(self._metrics, options.metrics_port))
        self._closing.callback(self._rebalancing.close)
        return self

    def __exit__(self, *error: object) -> None:
        """Close it, and give up a question to the planner that is still open."""
        self._closing.close()

    @property
    def plan(self) -> Plan:
        """The plan in use."""
        return self._rebalancing.plan

    @contextmanager
    def balancing(self) -> Iterator[None]:
        """Let balancing change outputs, and experts move, in the steps of the block."""
        self._is_balancing = True
        self._model.hooks.capacity_factor = self._options.drop_beyond
        try:
            yield
        finally:
            self._is_balancing = False
            self._model.hooks.capacity_factor = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Take back, in the block, what has changed outputs so far."""
        changed = [moe.bias_E for moe in self._moe_layers()]
        self._set_biases(self._own_bias_LE)
        try:
            yield
        finally:
            self._set_biases(changed)

    def before_step(self) -> None:
        """Say that the next step begins."""
        self._step += 1
        self._at(f"step {self._step}")

    @property
    def changes_outputs(self) -> bool:
        """Whether balancing that changes outputs is on."""
        return bool(self._changes.notes())

    def check(self) -> None:
        """Check that all numbers of the last step are finite; a collective.

        Raises:
            EpplanError: some are not; the same on all ranks.
        """
        channel = self._model.dispatcher.channel
        self._finite.agree(self.plan, lambda own: channel.gather_to_host(own, _AFTER).wait()[:-1])

    def after_step(self, step: Step, seconds: float) -> None:
        """Take note of a step; a collective.

        Raises:
            EpplanError: numbers are not finite, or an expert arrived damaged.
        """
        self._at(f"the end of step {self._step}")
        self.check()
        plan = self.plan
        self._waits.after_step(self._model.clock.spans())
        is_full = self._monitor.after_step(plan, step.counts_LWWP, seconds)
        tokens = step.experts_LTK.shape[1] * plan.world_size
        self._tokens += tokens
        rows = tokens * plan.model.top_k * plan.model.num_moe_layers
        self._dropped += rows - int(step.counts_LWWP.sum())
        if self._is_balancing and self._options.gating_bias is not None:
            self._adjust_biases(plan, step.counts_LWWP)
        self._rebalancing.between_steps()
        if is_full:
            self._close_window()

    def finish(self) -> Upkept:
        """Report what is left of a window, and let nothing travel any more; a collective."""
        self._rebalancing.settle()
        if self._monitor.has_steps:
            self._close_window(last=True)
        notes = [f"not rebalanced: {problem}" for problem in self._rebalancing.problems]
        if self._rebalancing.layers_left:
            notes.append(
                f"{self._rebalancing.layers_left} layers were still being rebalanced at the end"
            )
        return Upkept(
            plan=self.plan,
            output_changes=self._changes.notes(),
            progress=self.progress,
            waits=self._last_waits,
            notes=tuple(notes),
        )

    def _close_window(self, *, last: bool = False) -> None:
        self._last_waits = self._waits.gather()
        window, counts_LWE = self._monitor.close_window(self.plan, self._last_waits)
        if self._log is not None:
            self._log.write(window, self.progress)
        if self._metrics is not None:
            self._metrics.update(window, self.progress)
        if not self._may_move:
            self._monitor.compare_with(counts_LWE, only_first=True)
        elif self._is_balancing and not last:
            self._rebalancing.after_window(self._monitor, window, counts_LWE)

    @property
    def progress(self) -> Progress:
        """Totals of the run so far."""
        moved = self._rebalancing.moved
        return Progress(
            tokens=self._tokens,
            dropped_rows=self._dropped,
            rebalances=self._rebalancing.tables,
            moved_experts=moved.experts,
            moved_bytes=moved.bytes,
            layers_to_move=self._rebalancing.layers_left,
        )

    def _rows_under_way(self, place: Place) -> None:
        self._at(f"step {self._step}, layer {place.layer}")
        self._rebalancing.between_layers()

    def _moe_layers(self) -> list[MoeWeights]:
        layers = (self._model.layers[layer] for layer in self._first_plan.model.moe_layers)
        return [
            layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MoeWeights)
        ]

    def _migration(self, old: Plan, new: Plan) -> Migration:
        held = [expert for moe in self._moe_layers() for expert in moe.experts if expert]
        # A rank without any expert of the plan builds one, for its shapes.
        pattern = held[0] if held else self._weights.expert(old.model.moe_layers[0], 0)
        return Migration(
            old,
            new,
            self._rank,
            experts_of=lambda layer: self._moe_layers()[layer].experts,
            empty_expert=lambda: empty_like(pattern),
            install=self._install,
        )

    def _install(self, plan: Plan, layer: int, experts: Experts) -> None:
        """Put a layer's new table and experts into use, between two steps."""
        device = self._weights.device
        replicas = replicas_of_rank(plan, layer, self._rank, self._options.replicas, device)
        moe = self._moe_layers()[layer]
        # Into one block again, without which grouped products could not be used any more, and the
        # old block would stay for the experts that stay.
        self._set_moe(layer, replace(moe, experts=stack_experts(experts), replicas=replicas))
        self._rebalancing.installed(plan)

    def _set_moe(self, ordinal: int, moe: MoeWeights) -> None:
        index = self._first_plan.model.moe_layers[ordinal]
        self._model.layers[index] = replace(self._model.layers[index], feed_forward=moe)

    def _set_biases(self, bias_LE: list[Tensor | None]) -> None:
        for ordinal, (moe, bias_E) in enumerate(zip(self._moe_layers(), bias_LE, strict=True)):
            self._set_moe(ordinal, replace(moe, bias_E=bias_E))

    def _give_biases(self) -> None:
        """Give every layer a bias of its own, to be adjusted."""
        experts = self._first_plan.model.num_experts
        zeros_E = torch.zeros(experts, device=self._weights.device)
        self._set_biases(
            [(zeros_E if bias is None else bias).clone() for bias in self._own_bias_LE]
        )

    def _adjust_biases(self, plan: Plan, counts_LWWP: Tensor) -> None:
        rate = self._options.gating_bias
        assert rate is not None
        rows_LE = expert_counts(plan, counts_LWWP).sum(1).to(self._weights.device)
        for moe, rows_E in zip(self._moe_layers(), rows_LE, strict=True):
            assert moe.bias_E is not None
            moe.bias_E.copy_(updated_bias(moe.bias_E, rows_E, rate))
