"""The result of a benchmark: what rank 0 writes and prints."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Literal

from epplan.runtime.result import PhaseTime

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One rank's part of one phase's timing."""

    steps_s: list[float]
    parts_s: list[dict[str, float]]  # by step; empty where a graph ran, which has no marks
    # By step, in the order that all ranks share: name, and how long it was under way.
    transfers_s: list[list[tuple[str, float]]]
    bytes_read: int  # weights and cache, each once
    flop_per_s: float  # ceilings
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """Prefill or decode, timed."""

    phase: Phase
    sequences: int  # of all ranks
    positions: int  # new ones of each sequence
    context: int  # positions before them
    tokens_per_step: int
    steps: int
    step_s: float  # median over steps of the slowest rank's time
    step_min_s: float
    tokens_per_s: float
    tpot_s: float | None  # time per output token: decode only
    parts: dict[str, PhaseTime]
    transfers: dict[str, float]  # seconds under way, each by the rank that came last
    flops_per_rank: float
    bytes_per_rank: float
    gemm_ceiling_flop_per_s: float  # mean over ranks, measured in this run
    copy_ceiling_bytes_per_s: float
    gemm_share: float  # of the ceiling
    copy_share: float
    graph: bool  # replayed as a CUDA graph


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One measured run of a plan or of its baseline."""

    plan_sha256: str
    model: str
    layout: str  # ep16, tp8pp2, "rank 3 of ep16"
    how: str  # dispatcher or micro-batches, in words
    ranks: int
    backend: str
    backend_reason: str
    device: str
    dtype: str
    seed: int
    phases: tuple[PhaseResult, ...]
    notes: tuple[str, ...]


def phase_result(
    phase: Phase,
    runs: list[RankRun],
    *,
    sequences: int,
    positions: int,
    context: int,
    flops: float,
    graph: bool = False,
) -> PhaseResult:
    """Return all ranks' timings as one result.

    Args:
        phase: what ran.
        runs: by rank.
        sequences: of all ranks.
        positions: new ones of each sequence.
        context: positions before them.
        flops: of one step over all ranks.
        graph: whether a CUDA graph ran.
    """
    slowest = [max(times) for times in zip(*(run.steps_s for run in runs), strict=True)]
    step_s, tokens = median(slowest), sequences * positions
    gemm, copy = mean(run.flop_per_s for run in runs), mean(run.bytes_per_s for run in runs)
    bytes_read = mean(run.bytes_read for run in runs)
    return PhaseResult(
        phase=phase,
        sequences=sequences,
        positions=positions,
        context=context,
        tokens_per_step=tokens,
        steps=len(slowest),
        step_s=step_s,
        step_min_s=min(slowest),
        tokens_per_s=tokens / step_s,
        tpot_s=step_s if phase == "decode" else None,
        parts=_parts(runs),
        transfers=_transfers(runs),
        flops_per_rank=flops / len(runs),
        bytes_per_rank=bytes_read,
        gemm_ceiling_flop_per_s=gemm,
        copy_ceiling_bytes_per_s=copy,
        gemm_share=flops / len(runs) / step_s / gemm,
        copy_share=bytes_read / step_s / copy,
        graph=graph,
    )


def bench_text(result: BenchResult) -> str:
    """Return the result as JSON, one top-level key per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(result).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def bench_lines(result: BenchResult) -> Iterator[str]:
    """Yield the summary for a terminal."""
    yield f"{result.layout} of {result.model}: {result.how}"
    yield f"{result.ranks} ranks, {result.backend} ({result.backend_reason})"
    yield f"computed on {result.device} in {result.dtype}"
    for phase in result.phases:
        yield ""
        yield from _phase_lines(phase)
    yield from (f"note: {note}" for note in result.notes)


def _phase_lines(phase: PhaseResult) -> Iterator[str]:
    after = f" after {phase.context:,} positions" if phase.context else ""
    graph = ", CUDA graph" if phase.graph else ""
    yield (
        f"{phase.phase}: {phase.sequences:,} sequences x {phase.positions:,} positions{after}"
        f"{graph}"
    )
    tpot = "" if phase.tpot_s is None else f", TPOT {phase.tpot_s * 1e3:.3f} ms"
    yield (
        f"  {phase.tokens_per_s:,.0f} tokens/s{tpot}: {phase.step_s * 1e3:.3f} ms a step (median "
        f"of {phase.steps}, best {phase.step_min_s * 1e3:.3f})"
    )
    if phase.parts:
        parts = (f"{name} {time.mean_s * 1e3:.2f}" for name, time in phase.parts.items())
        yield f"  mean ms by part: {', '.join(parts)}"
    if phase.transfers:
        under_way = (f"{name} {seconds * 1e3:.2f}" for name, seconds in phase.transfers.items())
        yield f"  ms under way: {', '.join(under_way)}"
    yield (
        f"  {phase.gemm_share:.1%} of the product ceiling "
        f"({phase.gemm_ceiling_flop_per_s / 1e12:,.3g} TFLOP/s), "
        f"{phase.copy_share:.1%} of the copy ceiling "
        f"({phase.copy_ceiling_bytes_per_s / 1e9:,.4g} GB/s)"
    )


def _transfers(runs: list[RankRun]) -> dict[str, float]:
    """Return each kind's seconds, added up over a step; the median over steps.

    Whoever comes first also waits for the others; the rank that comes last pays the transfer alone.
    """
    steps: list[dict[str, float]] = []
    for of_step in zip(*(run.transfers_s for run in runs), strict=True):  # by rank
        total: dict[str, float] = defaultdict(float)
        for of_transfer in zip(*of_step, strict=True):
            (name, _), *_ = of_transfer
            total[name] += min(seconds for _, seconds in of_transfer)
        steps.append(total)
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: median(step.get(name, 0.0) for step in steps) for name in names}


def _parts(runs: list[RankRun]) -> dict[str, PhaseTime]:
    """Return mean and maximum over ranks of each part's median over steps."""
    names = dict.fromkeys(name for run in runs for step in run.parts_s for name in step)
    times = {}
    for name in names:
        # Stages of a pipeline differ in their parts: the first receives nothing.
        by_rank = [median(step.get(name, 0.0) for step in run.parts_s) for run in runs]
        times[name] = PhaseTime(mean_s=mean(by_rank), max_s=max(by_rank))
    return times
