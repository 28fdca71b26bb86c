"""A phase made ready to be timed: of a plan, of its baseline, or of one rank alone.

Shapes: B sequences, S positions, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from epplan.launcher.bench_options import BenchOptions
from epplan.planner.plan import Plan
from epplan.runtime.baseline.pipeline_parallel import Grid, PipelineParallelModel
from epplan.runtime.baseline.tensor_parallel import never_waits
from epplan.runtime.build import make_dispatcher
from epplan.runtime.clock import PhaseClock
from epplan.runtime.decode import DecodeGraph, GraphedDecode
from epplan.runtime.dispatchers.channel import Channel
from epplan.runtime.dispatchers.dispatch import Dispatcher
from epplan.runtime.dispatchers.one_rank import OneRank
from epplan.runtime.layer.filled_cache import filled_cache
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.layer.layers import Layer, build_layers
from epplan.runtime.model import ExpertParallelModel
from epplan.runtime.pipeline import NO_TURNS, Schedule
from epplan.runtime.schedule import Workload, choose_dispatcher, choose_schedule, choose_transfer
from epplan.runtime.weights import SeededWeights, seeded_hidden

from .bench_result import Phase
from .workload import cache_bytes, tensor_bytes

_BASELINE_DECODE_STEPS = 8  # back to back: the next step fills the pipeline the last one drains


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A phase that is ready to be timed on this rank."""

    step: Callable[[], object]
    clock: PhaseClock | None  # None where nothing marks parts
    bytes_read: int
    how: str
    graph: bool = False
    steps_at_once: int = 1


def one_rank_job(
    layers: list[Layer], options: BenchOptions, weights: SeededWeights, phase: Phase
) -> Job:
    """Return one rank's step with its experts and no transfers."""
    spec, device = weights.spec, weights.device
    parts = options.micro_batches or 1
    schedule = Schedule(micro_batches=parts, in_flight=1, turns=NO_TURNS, reason="one rank")
    clock = PhaseClock(device)
    dispatcher = OneRank()
    model = ExpertParallelModel(spec, layers, dispatcher, schedule, clock)
    x_BSH = _hidden(options, weights, 0, phase)
    caches = _caches(options, weights, phase, parts)

    def run(x_BSH: Tensor) -> Tensor:
        batches = model.run(x_BSH, dispatcher, caches=caches)
        _rewind(caches, options.before(phase))
        return batches[0].hidden_BSH if parts == 1 else torch.cat([b.hidden_BSH for b in batches])

    with_graph = _is_graphed(phase, options, device)
    step = DecodeGraph(run, x_BSH) if with_graph else _marked(run, clock)
    return Job(
        step=lambda: step(x_BSH),
        clock=None if with_graph else clock,
        bytes_read=tensor_bytes(layers)
        + cache_bytes(spec, options.sequences, options.before(phase)),
        how="no transfers",
        graph=with_graph,
    )


class PlanBench:
    """Jobs of the plan: expert parallelism over all ranks."""

    def __init__(
        self, plan: Plan, options: BenchOptions, weights: SeededWeights, rank: int
    ) -> None:
        self._plan, self._options, self._weights, self._rank = plan, options, weights, rank
        self._clock = PhaseClock(weights.device)
        self._channel = Channel(
            rank=rank, world_size=plan.world_size, device=weights.device, clock=self._clock
        )
        self._layers = build_layers(plan, rank, weights)

    def job(self, phase: Phase) -> Job:
        """Return a phase with the dispatcher and schedule that its size asks for."""
        plan, options, spec = self._plan, self._options, self._plan.model
        workload = Workload(
            sequences=options.sequences,
            positions=options.positions(phase),
            device_type=self._weights.device.type,
        )
        with_graph = _is_graphed(phase, options, self._weights.device)
        kind, reason = choose_dispatcher(
            "auto", plan, workload, "share", transfer=None, graph=with_graph
        )
        with_graph &= kind == "padded"  # the others wait for counts
        transfer, note = choose_transfer(None, plan, kind)
        asked = options.micro_batches if options.overlap else 1
        schedule = choose_schedule(asked, plan, workload, kind)
        parts = schedule.micro_batches
        dispatcher: Dispatcher = make_dispatcher(
            kind,
            self._channel,
            plan,
            tokens=ceil(options.sequences / parts) * options.positions(phase),
            capacity_factor=1.25,
            transfer=transfer,
            fp8=False,
        )
        model = ExpertParallelModel(spec, self._layers, dispatcher, schedule, self._clock)
        x_BSH = _hidden(options, self._weights, self._rank, phase)
        caches = _caches(options, self._weights, phase, parts)
        graphed = GraphedDecode(model, caches or []) if with_graph else None

        def step() -> None:
            if graphed is not None:
                graphed(x_BSH)
            else:
                model.forward(x_BSH, caches=caches)
                _rewind(caches, options.before(phase))

        return Job(
            step=step,
            clock=None if with_graph else self._clock,
            graph=with_graph,
            bytes_read=tensor_bytes(self._layers)
            + cache_bytes(spec, options.sequences, options.before(phase)),
            how=f"by {kind} ({reason}), {parts} micro-batches ({schedule.reason})"
            + ("" if note is None else f", {note}"),
        )


class BaselineBench:
    """Jobs of the baseline: tensor and pipeline parallelism over all ranks."""

    def __init__(
        self, plan: Plan, options: BenchOptions, weights: SeededWeights, rank: int
    ) -> None:
        self._plan, self._options, self._weights = plan, options, weights
        self._clock = PhaseClock(weights.device)
        self._grid = parse_grid(options.baseline)
        self._model = PipelineParallelModel(weights, self._grid, rank, self._clock)

    def job(self, phase: Phase) -> Job:
        """Return a phase; all ranks' sequences pass all stages."""
        options, spec, grid = self._options, self._plan.model, self._grid
        sequences = options.sequences * self._plan.world_size
        parts = min(self._micro_batches(phase), sequences)
        hidden = [
            _hidden(options, self._weights, source, phase)
            for source in range(self._plan.world_size)
        ]
        x_BSH = torch.cat(hidden)
        caches = None
        if phase == "decode":
            caches = self._model.filled_caches(sequences, parts, options.context)

        def run(x_BSH: Tensor) -> Tensor | None:
            result = self._model.forward(
                x_BSH, num_micro_batches=parts, overlap=options.overlap, caches=caches
            )
            _rewind(caches, options.before(phase))
            return result.hidden_BSH

        with_graph = (
            _is_graphed(phase, options, self._weights.device)
            and grid.stages == parts == 1
            and never_waits(spec, x_BSH.flatten(0, 1))
        )
        step = DecodeGraph(run, x_BSH) if with_graph else run
        cached = cache_bytes(spec, sequences, options.before(phase)) // self._plan.world_size
        turns = "two in flight" if options.overlap and parts > 1 else "one at a time"
        return Job(
            step=lambda: step(x_BSH),
            clock=None if with_graph else self._clock,
            graph=with_graph,
            bytes_read=self._model.weight_bytes + cached,
            how=f"in {parts} micro-batches, {turns}",
            steps_at_once=_BASELINE_DECODE_STEPS if phase == "decode" and grid.stages > 1 else 1,
        )

    def _micro_batches(self, phase: Phase) -> int:
        """Return as many as keep every stage busy; in prefill twice as many, which take turns.

        In decode more of them would take longer: each reads all weights.
        """
        if self._options.micro_batches is not None:
            return self._options.micro_batches
        return self._grid.stages * (2 if self._options.overlap and phase == "prefill" else 1)


def _is_graphed(phase: Phase, options: BenchOptions, device: torch.device) -> bool:
    """Return whether the phase is one that a CUDA graph can hold."""
    return phase == "decode" and options.graph and device.type == "cuda"


def parse_grid(text: str | None) -> Grid:
    """Return the grid of `tpNppM`."""
    assert text is not None
    shards, _, stages = text.removeprefix("tp").partition("pp")
    return Grid(shards=int(shards), stages=int(stages))


def _hidden(options: BenchOptions, weights: SeededWeights, rank: int, phase: Phase) -> Tensor:
    shape = (options.sequences, options.positions(phase), weights.spec.hidden_size)
    return seeded_hidden(options.seed, rank, shape, device=weights.device, dtype=weights.dtype)


def _caches(
    options: BenchOptions, weights: SeededWeights, phase: Phase, parts: int
) -> list[KvCache] | None:
    """Return a filled cache for each micro-batch of a decode step."""
    if phase == "prefill":
        return None
    share, rest = divmod(options.sequences, parts)
    return [
        filled_cache(
            weights.spec.attention,
            num_layers=weights.spec.num_layers,
            sequences=share + (number < rest),
            context=options.context,
            device=weights.device,
            dtype=weights.dtype,
        )
        for number in range(parts)
    ]


def _rewind(caches: list[KvCache] | None, length: int) -> None:
    for cache in caches or ():
        cache.truncate(length)


def _marked(run: Callable[[Tensor], Tensor], clock: PhaseClock) -> Callable[[Tensor], Tensor]:
    """Return the step with its clock started and without gradients."""

    def step(x_BSH: Tensor) -> Tensor:
        with torch.inference_mode():
            clock.start()
            return run(x_BSH)

    return step
