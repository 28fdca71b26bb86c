"""The result of a run: what rank 0 writes and prints."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from epplan.planner.plan import Plan
from epplan.runtime.balancing.monitor import LayerBalance
from epplan.runtime.balancing.waits import Waits

_MAX_RANKS = 16  # rows of the printed table
_MAX_SEQUENCES = 4  # whose new tokens are printed


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """Seconds of one phase in one step, over all layers: mean and slowest rank."""

    mean_s: float
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured run of a plan; rows are token-to-expert assignments of one step."""

    plan_sha256: str
    model: str
    ranks: int
    backend: str
    backend_reason: str
    device: str
    dtype: str
    dispatcher: str
    dispatcher_reason: str
    micro_batches: int
    micro_batches_reason: str
    seed: int
    sequences: int  # per rank
    sequence_length: int
    steps: int
    tokens_per_step: int  # of all ranks
    tokens_per_s: float
    step_s: float  # median over steps of the slowest rank's time
    phases: dict[str, PhaseTime]
    max_abs_error: float | None
    tolerance: float | None
    verified: bool | None  # None: not asked for
    problems: tuple[str, ...]
    routing_ties: int | None
    expert_load: list[list[int]]  # [MoE layers][experts]
    rank_load: list[list[int]]  # [MoE layers][ranks]
    balance: tuple[LayerBalance, ...]
    checkpoint: str | None = None  # None: seeded weights
    generated: list[list[int]] | None = None  # tokens after each of rank 0's sequences
    output_changes: tuple[str, ...] = ()  # balancing that changed outputs; empty: the model's own
    dropped_rows: int = 0  # of all timed steps, beyond the capacity
    rebalances: int = 0  # slot tables put into use while running
    moved_experts: int = 0
    moved_bytes: int = 0
    waits: Waits | None = None  # of the last window of steps
    notes: tuple[str, ...]


def result_text(result: Result) -> str:
    """Return the result as JSON, one top-level key per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(result).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def summary_lines(result: Result, plan: Plan) -> Iterator[str]:
    """Yield the summary for a terminal."""
    yield f"{result.ranks} ranks, {result.backend} ({result.backend_reason})"
    yield f"computed on {result.device} in {result.dtype}"
    yield f"dispatcher {result.dispatcher} ({result.dispatcher_reason})"
    plural = "micro-batch" if result.micro_batches == 1 else "micro-batches"
    yield f"{result.micro_batches} {plural} ({result.micro_batches_reason})"
    yield (
        f"{result.tokens_per_s:,.0f} tokens/s: {result.tokens_per_step:,} tokens a step, "
        f"{result.step_s * 1e3:.1f} ms (median of {result.steps})"
    )
    phases = (f"{name} {time.mean_s * 1e3:.1f}" for name, time in result.phases.items())
    yield f"mean ms by phase: {', '.join(phases)}"
    yield _verdict(result)
    yield from (f"OUTPUTS CHANGED: {change}" for change in result.output_changes)
    yield from _balancing(result)
    if result.checkpoint is not None:
        yield f"weights of {result.checkpoint}"
    if result.generated is not None:
        yield from _generated_lines(result.generated)
    yield from (f"note: {note}" for note in result.notes)
    yield ""
    yield from _layer_table(result)
    yield ""
    yield from _rank_table(result, plan)


def _generated_lines(generated: list[list[int]]) -> Iterator[str]:
    """Yield the new tokens of rank 0's first sequences."""
    for number, tokens in enumerate(generated[:_MAX_SEQUENCES]):
        yield f"sequence {number} of rank 0 goes on: {', '.join(map(str, tokens))}"
    if len(generated) > _MAX_SEQUENCES:
        yield f"  ... and {len(generated) - _MAX_SEQUENCES} more sequences"


def _balancing(result: Result) -> Iterator[str]:
    """Yield what balancing did and who was waited for."""
    if result.dropped_rows:
        yield f"{result.dropped_rows:,} rows dropped beyond the capacity, of all steps"
    if result.moved_experts:
        yield (
            f"{result.moved_experts} experts moved while running ({result.moved_bytes:,} bytes), "
            f"for {result.rebalances} new slot tables"
        )
    if result.waits is not None and result.waits.straggler is not None:
        rank = result.waits.straggler
        yield (
            f"straggler: rank {rank} came last to {result.waits.last_share[rank]:.0%} of the "
            "all-to-alls"
        )


def _verdict(result: Result) -> str:
    if result.verified is None:
        return "not verified against the dense model (--no-verify)"
    difference = "not finite" if result.max_abs_error is None else f"{result.max_abs_error:.2g}"
    return (
        f"{'verified' if result.verified else 'NOT VERIFIED'} against the dense model: largest "
        f"difference {difference}, tolerance {result.tolerance:.2g}, "
        f"{result.routing_ties} routing ties"
    )


def _layer_table(result: Result) -> Iterator[str]:
    """Yield balance and the busiest experts, by layer; at most the 16 least even layers."""
    pairs = sorted(
        zip(result.balance, result.expert_load, strict=True),
        key=lambda pair: pair[0].max_over_mean,
        reverse=True,
    )
    shown = sorted(pairs[:_MAX_RANKS], key=lambda pair: pair[0].layer)
    yield "layer  rank max/mean  Jain   across hosts  idle  busiest experts (rows)"
    for balance, load in shown:
        busiest = sorted(range(len(load)), key=lambda expert: -load[expert])[:3]
        experts = ", ".join(f"{expert} ({load[expert]:,})" for expert in busiest)
        yield (
            f"{balance.layer:>5}  {balance.max_over_mean:>13.2f}  {balance.jain:.3f}  "
            f"{balance.cross_host_share:>12.1%}  {len(balance.idle_experts):>4}  {experts}"
        )
    if len(shown) < len(pairs):
        yield f"  ... and {len(pairs) - len(shown)} more even layers"


def _rank_table(result: Result, plan: Plan) -> Iterator[str]:
    """Yield the rows of each rank over all layers; of many ranks, the busiest."""
    rows = [sum(layers) for layers in zip(*result.rank_load, strict=True)]
    mean = sum(rows) / len(rows)
    shown = sorted(sorted(range(len(rows)), key=lambda rank: -rows[rank])[:_MAX_RANKS])
    width = max(4, *(len(plan.ranks[rank].host) for rank in shown))
    yield f"rank  {'host':<{width}}  rows of a step  of mean"
    for rank in shown:
        host = plan.ranks[rank].host
        yield f"{rank:>4}  {host:<{width}}  {rows[rank]:>14,}  {rows[rank] / mean:>7.2f}"
    if len(shown) < len(rows):
        yield f"  ... and {len(rows) - len(shown)} less busy ranks"
