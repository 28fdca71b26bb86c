"""Times prefill and decode on all ranks together, or on one alone."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from epplan.errors import InputError
from epplan.launcher.bench_options import BenchOptions
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime.clock import synchronize
from epplan.runtime.environment import Setting, choose_setting
from epplan.runtime.layer.layers import build_layers
from epplan.runtime.weights import SeededWeights

from .bench_jobs import BaselineBench, Job, PlanBench, one_rank_job
from .bench_result import BenchResult, Phase, PhaseResult, RankRun, phase_result
from .ceilings import Ceilings, device_seconds, measure_ceilings
from .workload import step_flops

_SEEDED_NOTE = "weights are seeded: routing, and so the load of experts, is theirs"
_ALONE_NOTE = (
    "one rank alone: transfers are excluded, and its experts compute as many rows as it sends, "
    "which is its share when load is even"
)


def bench_rank(
    plan: Plan, options: BenchOptions, setting: Setting, rank: int
) -> BenchResult | None:
    """Time the plan or its baseline on all ranks; a collective.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        InputError: the baseline's shards and stages do not fit the model.
    """
    weights = _weights(plan.model, options, setting)
    ceilings = measure_ceilings(setting.device, setting.dtype)
    bench = (
        PlanBench(plan, options, weights, rank)
        if options.baseline is None
        else BaselineBench(plan, options, weights, rank)
    )
    phases: list[PhaseResult] = []
    how: list[str] = []
    for phase in _phases(options):
        job = bench.job(phase)
        own = _time(job, options, ceilings, setting.device, dist.barrier)
        runs: list[RankRun] | None = [own] * plan.world_size if rank == 0 else None
        dist.gather_object(own, runs, dst=0)
        how.append(f"{phase} {job.how}")
        if runs is not None:
            phases.append(_phase(phase, runs, plan.model, options, plan.world_size, job.graph))
    if rank != 0:
        return None
    return _result(plan, options, setting, phases, how, (*setting.notes, _SEEDED_NOTE))


def bench_one_rank(plan: Plan, options: BenchOptions) -> BenchResult:
    """Time one rank's work in this process, without transfers.

    Raises:
        InputError: the plan has no such rank.
    """
    rank = options.one_rank
    assert rank is not None
    if rank >= plan.world_size:
        raise InputError(f"--one-rank is {rank}, the plan has ranks 0 to {plan.world_size - 1}")
    setting = choose_setting(options.backend, plan.model, 0, 1)
    weights = _weights(plan.model, options, setting)
    ceilings = measure_ceilings(setting.device, setting.dtype)
    layers = build_layers(plan, rank, weights)
    phases = []
    for phase in _phases(options):
        job = one_rank_job(layers, options, weights, phase)
        run = _time(job, options, ceilings, setting.device, lambda: None)
        phases.append(_phase(phase, [run], plan.model, options, 1, job.graph))
    notes = (*setting.notes, _SEEDED_NOTE, _ALONE_NOTE)
    return _result(plan, options, setting, phases, ["no transfers"], notes)


def _time(
    job: Job,
    options: BenchOptions,
    ceilings: Ceilings,
    device: torch.device,
    barrier: Callable[[], object],
) -> RankRun:
    """Warm up and time; all ranks begin every measurement together."""

    def steps() -> None:
        for _ in range(job.steps_at_once):
            job.step()

    times: list[float] = []
    parts: list[dict[str, float]] = []
    transfers: list[list[tuple[str, float]]] = []
    for _ in range(options.warm_up):
        job.step()
    for _ in range(options.steps):
        barrier()
        synchronize(device)
        times.append(device_seconds(steps, device) / job.steps_at_once)
        if job.clock is not None:
            parts.append(job.clock.seconds())
            transfers.append(job.clock.transfers())
    return RankRun(
        steps_s=times,
        parts_s=parts,
        transfers_s=transfers,
        bytes_read=job.bytes_read,
        flop_per_s=ceilings.flop_per_s,
        bytes_per_s=ceilings.bytes_per_s,
    )


def _phase(
    phase: Phase,
    runs: list[RankRun],
    spec: ModelSpec,
    options: BenchOptions,
    num_ranks: int,
    graph: bool,
) -> PhaseResult:
    sequences = options.sequences * num_ranks
    positions, context = options.positions(phase), options.before(phase)
    return phase_result(
        phase,
        runs,
        sequences=sequences,
        positions=positions,
        context=context,
        flops=step_flops(spec, sequences, positions, context),
        graph=graph,
    )


def _result(
    plan: Plan,
    options: BenchOptions,
    setting: Setting,
    phases: list[PhaseResult],
    how: list[str],
    notes: tuple[str, ...],
) -> BenchResult:
    layout = options.baseline or f"ep{plan.world_size}"
    if options.one_rank is not None:
        layout = f"rank {options.one_rank} of {layout}"
    cuda = setting.device.type == "cuda"
    return BenchResult(
        plan_sha256=plan.sha256(),
        model=plan.model.name,
        layout=layout,
        how="; ".join(how),
        ranks=1 if options.one_rank is not None else plan.world_size,
        backend="none" if options.one_rank is not None else setting.backend,
        backend_reason=(
            "one rank alone" if options.one_rank is not None else setting.backend_reason
        ),
        device=torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        dtype=str(setting.dtype).removeprefix("torch."),
        seed=options.seed,
        phases=tuple(phases),
        notes=notes,
    )


def _phases(options: BenchOptions) -> tuple[Phase, ...]:
    return tuple(phase for phase in ("prefill", "decode") if phase in options.phases)


def _weights(spec: ModelSpec, options: BenchOptions, setting: Setting) -> SeededWeights:
    return SeededWeights(
        spec=spec,
        seed=options.seed,
        device=setting.device,
        dtype=setting.dtype,
        router_skew=options.router_skew,
    )
