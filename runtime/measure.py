"""Run one rank's part of the model: warm up, time, verify, and put the result together.

Shapes: B sequences per rank, S positions, H hidden size.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan

from .clock import PhaseClock, synchronize
from .dispatch import AllToAll
from .environment import Setting
from .model import ExpertParallelModel, Step, build_layers
from .monitor import measure_load
from .progress import Progress, open_progress
from .result import PhaseTime, Result
from .verify import Verification, verify
from .weights import SeededWeights, seeded_hidden

_ROUTING_NOTE = "routers have seeded random weights: the load is theirs, not the plan's traffic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run; the same on all ranks."""

    backend: str
    sequences: int  # per rank
    sequence_length: int
    steps: int
    seed: int
    verify: bool
    progress: Path | None = None  # rank 0's file of finished steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTiming:
    """One rank's seconds, by timed step."""

    steps: list[float]
    phases: list[dict[str, float]]


def run_rank(plan: Plan, options: Options, setting: Setting, rank: int) -> Result | None:
    """Run the plan's model on all ranks; a collective.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ValueError: rows arrived that were not sent.
    """
    weights = SeededWeights(
        spec=plan.model, seed=options.seed, device=setting.device, dtype=setting.dtype
    )
    clock = PhaseClock(setting.device)
    layers = build_layers(plan, rank, weights)
    model = ExpertParallelModel(
        plan.model,
        layers,
        AllToAll(rank=rank, world_size=plan.world_size, slots_per_rank=plan.slots_per_rank),
        clock,
    )
    shape = (options.sequences, options.sequence_length, plan.model.hidden_size)
    x_BSH = seeded_hidden(options.seed, rank, shape, device=setting.device, dtype=setting.dtype)
    model.forward(x_BSH, check_rows=True)  # the warm-up step checks every row's way
    progress = open_progress(
        options.progress,
        plan,
        rank,
        seed=options.seed,
        sequences=options.sequences,
        sequence_length=options.sequence_length,
    )
    step, own_timing = _time_steps(model, x_BSH, options.steps, clock, setting.device, progress)
    timings = _gather_timings(own_timing, rank, plan.world_size)
    verification = None
    if options.verify:
        verification = verify(step, plan, layers, weights, rank)
    if timings is None:
        return None
    return _result(plan, options, setting, timings, verification, step, progress.notes())


def _time_steps(
    model: ExpertParallelModel,
    x_BSH: Tensor,
    steps: int,
    clock: PhaseClock,
    device: torch.device,
    progress: Progress,
) -> tuple[Step, RankTiming]:
    """Return the last step, and the time of each."""
    timing = RankTiming(steps=[], phases=[])
    for number in progress.remaining(steps):
        dist.barrier()  # all ranks start together, so that nobody's delay is counted twice
        synchronize(device)
        begin = time.perf_counter()
        step = model.forward(x_BSH)
        synchronize(device)
        timing.steps.append(time.perf_counter() - begin)
        timing.phases.append(clock.seconds())
        progress.finish(number)
    return step, timing


def _gather_timings(own: RankTiming, rank: int, world_size: int) -> list[RankTiming] | None:
    gathered: list[RankTiming] | None = [own] * world_size if rank == 0 else None
    dist.gather_object(own, gathered, dst=0)
    return gathered


def _phase_times(timings: list[RankTiming]) -> dict[str, PhaseTime]:
    """Return mean and maximum over ranks of each phase's median over steps."""
    times = {}
    for phase in timings[0].phases[0]:
        by_rank = [median(step[phase] for step in timing.phases) for timing in timings]
        times[phase] = PhaseTime(mean_s=mean(by_rank), max_s=max(by_rank))
    return times


def _result(
    plan: Plan,
    options: Options,
    setting: Setting,
    timings: list[RankTiming],
    verification: Verification | None,
    step: Step,
    notes: tuple[str, ...],
) -> Result:
    load = measure_load(plan, step.counts_LWWP)
    tokens_per_step = plan.world_size * options.sequences * options.sequence_length
    slowest_rank = [max(steps) for steps in zip(*(rank.steps for rank in timings), strict=True)]
    step_s = median(slowest_rank)
    return Result(
        plan_sha256=plan.sha256(),
        model=plan.model.name,
        ranks=plan.world_size,
        backend=setting.backend,
        backend_reason=setting.backend_reason,
        device=_device_name(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        seed=options.seed,
        sequences=options.sequences,
        sequence_length=options.sequence_length,
        steps=len(timings[0].steps),
        tokens_per_step=tokens_per_step,
        tokens_per_s=tokens_per_step / step_s,
        step_s=step_s,
        phases=_phase_times(timings),
        max_abs_error=verification.max_abs_error if verification else None,
        tolerance=verification.tolerance if verification else None,
        verified=verification.verified if verification else None,
        problems=verification.problems if verification else (),
        routing_ties=verification.num_ties if verification else None,
        expert_load=load.expert_load,
        rank_load=load.rank_load,
        balance=load.balance,
        notes=(*setting.notes, _ROUTING_NOTE, *notes),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
