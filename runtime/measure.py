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
from .result import PhaseTime, Result
from .source import Source, open_source
from .verify import Verification, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run; the same on all ranks."""

    backend: str
    sequences: int  # per rank
    sequence_length: int
    steps: int
    seed: int
    verify: bool
    checkpoint: Path | None = None
    prompt_tokens: str | None = None  # ids, separated by commas

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of every sequence; empty: they are seeded."""
        return tuple(map(int, self.prompt_tokens.split(","))) if self.prompt_tokens else ()

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return len(self.prompt) or self.sequence_length


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
        InputError: the checkpoint or the prompt does not fit the plan's model.
        ValueError: rows arrived that were not sent.
    """
    source = open_source(
        plan.model,
        setting,
        checkpoint=options.checkpoint,
        prompt=options.prompt,
        seed=options.seed,
        sequences=options.sequences,
        positions=options.positions,
        rank=rank,
    )
    clock = PhaseClock(setting.device)
    layers = build_layers(plan, rank, source.weights)
    model = ExpertParallelModel(
        plan.model,
        layers,
        AllToAll(rank=rank, world_size=plan.world_size, slots_per_rank=plan.slots_per_rank),
        clock,
    )
    x_BSH = source.hidden(rank)
    model.forward(x_BSH, check_rows=True)  # the warm-up step checks every row's way
    step, own_timing = _time_steps(model, x_BSH, options.steps, clock, setting.device)
    timings = _gather_timings(own_timing, rank, plan.world_size)
    verification = None
    if options.verify:
        verification = verify(step, plan, layers, source, rank)
    if timings is None:
        return None
    return _result(plan, options, setting, source, timings, verification, step)


def _time_steps(
    model: ExpertParallelModel, x_BSH: Tensor, steps: int, clock: PhaseClock, device: torch.device
) -> tuple[Step, RankTiming]:
    """Return the last step, and the time of each."""
    timing = RankTiming(steps=[], phases=[])
    for _ in range(steps):
        dist.barrier()  # all ranks start together, so that nobody's delay is counted twice
        synchronize(device)
        begin = time.perf_counter()
        step = model.forward(x_BSH)
        synchronize(device)
        timing.steps.append(time.perf_counter() - begin)
        timing.phases.append(clock.seconds())
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
    source: Source,
    timings: list[RankTiming],
    verification: Verification | None,
    step: Step,
) -> Result:
    load = measure_load(plan, step.counts_LWWP)
    tokens_per_step = plan.world_size * options.sequences * options.positions
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
        sequence_length=options.positions,
        steps=options.steps,
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
        checkpoint=None if options.checkpoint is None else str(options.checkpoint),
        next_tokens=source.next_tokens(step.hidden_BSH),
        notes=(*setting.notes, *source.notes),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
