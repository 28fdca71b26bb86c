"""Run one rank's part of the model: warm up, time, verify, and put the result together.

Shapes: B sequences per rank, S positions, H hidden size, L MoE layers, E experts, W ranks.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.files import write_atomically
from epplan.planner.plan import Plan
from epplan.planner.traffic import MAX_WINDOWS, write_counts
from epplan.runtime.balancing.monitor import expert_counts, measure_load
from epplan.runtime.balancing.upkeep import Upkeep, Upkept
from epplan.runtime.checks.verify import Verification, verify
from epplan.runtime.checks.verify_gradients import verify_gradients

from .build import build_model
from .clock import PhaseClock, synchronize
from .environment import Setting
from .generate import generate
from .model import ExpertParallelModel, Step
from .options import Options
from .progress import Progress, open_progress
from .result import PhaseTime, Result
from .schedule import Choice, choose
from .source import CheckpointSource, Source, open_source
from .trace import trace_text
from .training import Trainer
from .watchdog import At, Watchdog, say_nothing

Gathered = TypeVar("Gathered")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTiming:
    """One rank's seconds, by timed step."""

    steps: list[float]
    phases: list[dict[str, float]]
    reran: int  # steps


def run_rank(
    plan: Plan, options: Options, setting: Setting, rank: int, watchdog: Watchdog | None = None
) -> Result | None:
    """Run the plan's model on all ranks; a collective.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        InputError: the checkpoint, the prompt or the options do not fit the plan.
        ValueError: rows arrived that were not sent.
    """
    source = open_source(
        plan.model,
        setting,
        checkpoint=options.checkpoint,
        prompt=options.prompt,
        seed=options.seed,
        router_skew=options.router_skew,
        sequences=options.sequences,
        positions=options.positions,
        rank=rank,
    )
    choice = choose(plan, options, setting.device)
    model = build_model(plan, options, choice, source.weights, rank)
    x_BSH = source.hidden(rank)
    at: At = say_nothing if watchdog is None else watchdog.at
    trainer = Trainer(plan, options, model, rank) if options.train else None
    run = partial(model.forward if trainer is None else trainer.step, x_BSH)
    with Upkeep(plan, options, model, source.weights, at) as upkeep:
        at("the warm-up step")
        warm_up = model.forward(x_BSH, check_rows=True)  # checks every row's way
        upkeep.check()
        progress = open_progress(
            options.progress,
            plan,
            rank,
            seed=options.seed,
            sequences=options.sequences,
            sequence_length=options.positions,
        )
        steps = progress.remaining(options.steps)
        with upkeep.balancing():
            timed = _time_steps(run, model.clock, steps, setting.device, upkeep, progress)
        upkept = upkeep.finish()
        timings = _gather(timed.timing, rank, plan.world_size)
        if options.counts is not None and rank == 0:
            counts_LWE = [expert_counts(*of_step) for of_step in timed.counts]
            write_counts(options.counts, torch.stack(counts_LWE).numpy())
        if options.trace is not None:
            spans = _gather(model.clock.spans(), rank, plan.world_size)
            if spans is not None:
                write_atomically(options.trace, trace_text(plan, spans))
        verification = None
        if options.verify:
            verification = _verify(timed.step, options, model, source, upkeep, at)
            if trainer is not None:
                verification = verify_gradients(
                    verification, trainer, timed.step, plan, source, rank
                )
        generated = None
        if isinstance(source, CheckpointSource):
            at("the generation of new tokens", limited=False)
            tokens = source.tokens(rank)
            generated = generate(model, source.head, tokens, options.new_tokens).tolist()
    if timings is None:
        return None
    reran = warm_up.reran + timings[0].reran
    notes = (
        *setting.notes,
        *source.notes,
        *_notes(options, choice, reran),
        *upkept.notes,
        *progress.notes(),
    )
    return _result(
        plan, options, setting, choice, timings, verification, timed, upkept, generated, notes
    )


def _verify(
    step: Step,
    options: Options,
    model: ExpertParallelModel,
    source: Source,
    upkeep: Upkeep,
    at: At,
) -> Verification | None:
    """Compare a step with the dense model; a plain one where balancing has changed outputs."""
    if upkeep.changes_outputs:
        at("a step without balancing, to compare with the dense model")
        with upkeep.plain():
            step = model.forward(source.hidden(model.dispatcher.channel.rank))
    at("the comparison with the dense model", limited=False)
    rank = model.dispatcher.channel.rank
    return verify(step, upkeep.plan, model.layers, source, rank, float8=options.fp8_dispatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """The last step, the plan it used, and the time of each."""

    step: Step
    counts: list[tuple[Plan, Tensor]]  # of the last steps, with the plan each used
    plan: Plan
    timing: RankTiming


def _time_steps(
    run: Callable[[], Step],
    clock: PhaseClock,
    steps: range,
    device: torch.device,
    upkeep: Upkeep,
    progress: Progress,
) -> _Timed:
    times: list[float] = []
    phases: list[dict[str, float]] = []
    counts: deque[tuple[Plan, Tensor]] = deque(maxlen=MAX_WINDOWS)
    reran = 0
    for number in steps:
        upkeep.before_step()
        dist.barrier()  # all ranks start together, so that nobody's delay is counted twice
        synchronize(device)
        plan = upkeep.plan
        begin = time.perf_counter()
        step = run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
        phases.append(clock.seconds())
        reran += step.reran
        upkeep.after_step(step, times[-1])
        counts.append((plan, step.counts_LWWP))
        progress.finish(number)
    timing = RankTiming(steps=times, phases=phases, reran=reran)
    return _Timed(step=step, counts=list(counts), plan=plan, timing=timing)


def _gather(own: Gathered, rank: int, world_size: int) -> list[Gathered] | None:
    """Return all ranks' values on rank 0, None on the others."""
    gathered: list[Gathered] | None = [own] * world_size if rank == 0 else None
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
    choice: Choice,
    timings: list[RankTiming],
    verification: Verification | None,
    timed: _Timed,
    upkept: Upkept,
    generated: list[list[int]] | None,
    notes: tuple[str, ...],
) -> Result:
    load = measure_load(timed.plan, timed.step.counts_LWWP)
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
        dispatcher=choice.dispatcher,
        dispatcher_reason=choice.dispatcher_reason,
        micro_batches=choice.schedule.micro_batches,
        micro_batches_reason=choice.schedule.reason,
        seed=options.seed,
        sequences=options.sequences,
        sequence_length=options.positions,
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
        checkpoint=None if options.checkpoint is None else str(options.checkpoint),
        generated=generated,
        output_changes=upkept.output_changes,
        dropped_rows=upkept.progress.dropped_rows,
        rebalances=upkept.progress.rebalances,
        moved_experts=upkept.progress.moved_experts,
        moved_bytes=upkept.progress.moved_bytes,
        waits=upkept.waits,
        notes=notes,
    )


def _notes(options: Options, choice: Choice, reran: int) -> Iterator[str]:
    if options.fp8_dispatch and choice.dispatcher != "local":
        yield (
            "rows went to the experts as 8-bit numbers (--fp8-dispatch): outputs are rounded, and "
            "compared with a wider tolerance"
        )
    unused = [
        option
        for option, given in (
            ("--fp8-dispatch", options.fp8_dispatch),
            ("--transfer", options.transfer not in (None, "per-choice")),
        )
        if given and choice.dispatcher == "local"
    ]
    for option in unused:
        yield f"{option} has no effect: no rows travel"
    if choice.transfer_note is not None:
        yield choice.transfer_note
    if options.train:
        yield (
            "training steps: forward, backward, gradients added up over ranks; weights stay as "
            "they are"
        )
    if reran:
        yield (
            f"{reran} of {options.steps + 1} steps (with the warm-up) had more rows than the "
            "padded dispatcher has room for and were run again with uneven splits; the room grows "
            "each time, or give a larger --capacity-factor"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
