"""Outcomes as tables for people and as plain data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epplan.topologies.units import format_bytes, format_time

from .scene import Scene
from .simulate import Limit, Outcome


def cost_per_million(outcome: Outcome, price_per_gpu_hour: float) -> float:
    """Return the price of a million tokens."""
    return price_per_gpu_hour * outcome.num_gpus / 3600 / outcome.tps * 1e6


def result(outcome: Outcome, price: float | None) -> dict[str, Any]:
    """Return one outcome as plain data."""
    fullest = outcome.fullest
    return {
        "phase": outcome.usage.phase,
        "layout": str(outcome.layout),
        "gpus": outcome.num_gpus,
        "batch": outcome.usage.batch,
        "context": outcome.usage.context,
        "transfer": outcome.usage.transfer.name,
        "micro_batches": outcome.usage.micro_batches,
        "overlap": outcome.usage.overlap and outcome.usage.micro_batches > 1,
        "step_s": outcome.step_s,
        "step_s_mean_of_windows": outcome.mean_step_s,
        "windows": outcome.num_windows,
        "tpot_s": outcome.tpot_s,
        "tps": outcome.tps,
        "bottleneck": outcome.bottleneck.name,
        "bottleneck_s": outcome.bottleneck.seconds,
        "compute_s": outcome.compute_s,
        "transfer_s": outcome.transfer_s,
        "floor_s": outcome.floor_s,
        "limits": [_limit(limit) for limit in outcome.limits],
        "memory_bytes_per_gpu_max": fullest.total,
        "memory_capacity_bytes": fullest.capacity,
        "memory_largest": fullest.largest,
        "fits": outcome.fits,
        "cost_per_million_tokens": None if price is None else cost_per_million(outcome, price),
    }


def _limit(limit: Limit) -> dict[str, Any]:
    return {
        "name": limit.name,
        "seconds": limit.seconds,
        "bytes": limit.bytes,
        "floor_s": limit.floor_s,
    }


def tables(
    scene: Scene, outcomes: Sequence[Outcome], price: float | None, remarks: Sequence[str]
) -> RenderableType:
    """Return everything about some outcomes: times, limits, memory, assumptions."""
    parts: list[RenderableType] = []
    for outcome in outcomes:
        parts += [_times(outcome, price), "", _limits(outcome), "", _memory(outcome), ""]
    notes = [*remarks, *assumptions(scene, outcomes)]
    parts.append(Text("\n".join(["assumed:", *(f"  - {note}" for note in notes)])))
    return Group(*parts)


def _times(outcome: Outcome, price: float | None) -> Table:
    usage = outcome.usage
    what = "one token of every sequence" if usage.phase == "decode" else "all prompts"
    table = _table(
        f"{usage.phase}: {outcome.layout} on {outcome.num_gpus} GPUs, {usage.batch} sequences of "
        f"{usage.context} tokens"
    )
    overlapped = usage.overlap and usage.micro_batches > 1
    rows = {
        f"step ({what})": format_time(outcome.step_s),
        "time per output token": format_time(outcome.tpot_s) if outcome.tpot_s else "-",
        "tokens per second": f"{outcome.tps:,.0f}",
        "bottleneck": f"{outcome.bottleneck.name}, {format_time(outcome.bottleneck.seconds)}",
        "computing, transfers": f"{format_time(outcome.compute_s)}, "
        f"{format_time(outcome.transfer_s)}, {'overlapped' if overlapped else 'added'}",
        "micro-batches": str(usage.micro_batches),
        "transfers by": usage.transfer.title if outcome.layout.is_expert_parallel else "NCCL",
        "physical floor": f"{format_time(outcome.floor_s)} by rated figures",
    }
    if outcome.num_windows > 1:
        rows["mean of windows"] = (
            f"{format_time(outcome.mean_step_s)}; above is the slowest of {outcome.num_windows}"
        )
    if price is not None:
        rows["price of a million tokens"] = f"{cost_per_million(outcome, price):.4g}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(headings))
    for number, heading in enumerate(headings or ("what", "value")):
        table.add_column(heading, justify="right" if headings and number else "left")
    return table


def _limits(outcome: Outcome) -> Table:
    table = _table("what takes time, per step", "resource", "time", "of step", "bytes", "floor")
    for limit in one_of_each_kind(outcome.limits):
        table.add_row(
            limit.name,
            format_time(limit.seconds),
            f"{limit.seconds / outcome.step_s:.0%}",
            format_bytes(limit.bytes) if limit.bytes else "-",
            format_time(limit.floor_s) if limit.floor_s else "-",
        )
    return table


def one_of_each_kind(limits: Sequence[Limit]) -> list[Limit]:
    """Return the longest link of each kind with the number of links as busy, and all else."""
    shown: dict[object, Limit] = {}
    alike: dict[object, int] = {}
    for limit in limits:
        kind = limit.name.split()[0] if " -> " in limit.name else limit.name
        first = shown.setdefault(kind, limit)
        if limit is not first and limit.seconds > 0.999 * first.seconds:
            alike[kind] = alike.get(kind, 0) + 1
    return [
        replace(limit, name=f"{limit.name} (and {alike[kind]} more)") if kind in alike else limit
        for kind, limit in shown.items()
    ]


def _memory(outcome: Outcome) -> Table:
    use = outcome.fullest
    state = "fits" if use.fits else "DOES NOT FIT"
    table = _table(f"memory of the fullest GPU (rank {use.rank}): {state}")
    rows = {
        "experts": use.experts,
        "attention and other weights": use.replicated,
        "KV cache": use.kv_cache,
        "buffers": use.buffers,
        "total": use.total,
        "may be used": use.capacity,
    }
    for name, value in rows.items():
        mark = "  (largest)" if name == use.largest else ""
        table.add_row(name, f"{format_bytes(value)}{mark}")
    return table


def assumptions(scene: Scene, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the figures rest on, in words."""
    notes = [
        f"{device.gpu.name} ({device.provenance}): {device.source}" for device, _ in scene.kinds
    ]
    for outcome in outcomes:
        if outcome.layout.is_expert_parallel:
            profile = outcome.usage.transfer
            notes.append(f"{profile.name}: {' '.join(profile.source.split())}")
    notes.append(
        "transfers are priced by the planner's evaluator: the worst resource sets the time; "
        "sequences are spread evenly over ranks; kernels of a library that computes and moves at "
        "the same time are not slowed by each other"
    )
    return list(dict.fromkeys(notes))


def sweep_table(
    names: Sequence[str], rows: Sequence[tuple[Sequence[str], Outcome]], price: float | None
) -> Table:
    """Return one line per outcome of a sweep.

    Args:
        names: what is swept.
        rows: its values, and the outcome.
        price: of a GPU and hour.
    """
    headings = ["phase", *names, "step", "tokens/s", "floor", "bottleneck", "memory", "fits"]
    table = _table("sweep", *headings, *(["price/M"] if price is not None else []))
    for values, outcome in rows:
        use = outcome.fullest
        cells = [
            outcome.usage.phase,
            *values,
            format_time(outcome.step_s),
            f"{outcome.tps:,.0f}",
            format_time(outcome.floor_s),
            outcome.bottleneck.name,
            f"{format_bytes(use.total)} of {format_bytes(use.capacity)}",
            "yes" if use.fits else "NO",
        ]
        if price is not None:
            cells.append(f"{cost_per_million(outcome, price):.4g}")
        table.add_row(*cells)
    return table
