"""A plan as tables for people: where every expert sits, what it costs, how good it provably is."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epplan.topologies.hostlist import fold
from epplan.topologies.units import format_bytes, format_time

from .plan import Certificate, Plan

_MAX_LAYERS = 8  # columns of the placement table
_MAX_RANKS = 64


def explain(plan: Plan, *, every_layer: bool = False) -> RenderableType:
    """Return placement, cost, certificate and remarks.

    Args:
        plan: the plan.
        every_layer: show all layers, however wide.
    """
    shown = plan.model.num_moe_layers if every_layer else _MAX_LAYERS
    parts: list[RenderableType] = [
        _placement(plan, shown),
        _cost(plan, shown),
        _certificate(plan),
        *_list("reasons", plan.reasons),
        *_list("assumed", plan.assumptions),
    ]
    return Group(*(item for part in parts for item in (part, "")))


def explain_groups(plans: Sequence[Plan], files: Sequence[str]) -> RenderableType:
    """Return a table of EP groups that work side by side, and what holds for all of them.

    Args:
        plans: the groups' plans.
        files: where each was written.
    """
    first = plans[0]
    seconds = [plan.certificate.objective_s for plan in plans]
    slowest = seconds.index(max(seconds))
    table = Table(
        title=f"{first.model.name}: {len(plans)} groups, EP={first.world_size}; "
        f"the slowest is group {slowest}, {format_time(seconds[slowest])} for all MoE layers",
        title_justify="left",
    )
    for heading in ("group", "hosts", "objective", "bound", "gap", "status", "binding", "plan"):
        right = heading in ("group", "objective", "bound", "gap")
        table.add_column(heading, justify="right" if right else "left")
    for number, (plan, file) in enumerate(zip(plans, files, strict=True)):
        certificate = plan.certificate
        table.add_row(
            str(number),
            _hosts(plan),
            format_time(certificate.objective_s),
            format_time(certificate.bound_s),
            f"{certificate.gap:.3%}",
            certificate.status,
            certificate.binding,
            file,
        )
    choice = _choice(plans[slowest].certificate)
    lines = [Text(f"slowest group: {name}: {value}") for name, value in choice.items()]
    parts: list[RenderableType] = [
        table,
        *lines,
        *_list("reasons", first.reasons),
        *_list("assumed", first.assumptions),
    ]
    return Group(*(item for part in parts for item in (part, "")))


def _hosts(plan: Plan) -> str:
    """Return hosts with their number of GPUs: `a[1-4] (8 each), b1 (4)`."""
    by_count: dict[int, list[str]] = {}
    for host, count in Counter(rank.host for rank in plan.ranks).items():
        by_count.setdefault(count, []).append(host)
    return ", ".join(
        f"{fold(hosts)} ({count}{' each' if len(hosts) > 1 else ''})"
        for count, hosts in by_count.items()
    )


def _placement(plan: Plan, layers: int) -> Table:
    model = plan.model
    table = Table(
        title=f"{model.name}: experts of each layer, EP={plan.world_size}",
        title_justify="left",
    )
    for heading in ("rank", "host", "GPU", "model", "NICs"):
        table.add_column(heading, justify="right" if heading in ("rank", "GPU") else "left")
    for layer in model.moe_layers[:layers]:
        table.add_column(f"layer {layer}", justify="right")
    if model.num_moe_layers > layers:
        table.add_column(f"... {model.num_moe_layers - layers} more")
    table.add_column("memory", justify="right")
    for rank, memory in list(zip(plan.ranks, plan.memory, strict=True))[:_MAX_RANKS]:
        used = memory.experts + memory.replicated + memory.kv_cache + memory.buffers
        cells = [str(rank.rank), rank.host, str(rank.gpu_index), rank.gpu_model]
        cells.append(", ".join(rank.nics) or "-")
        cells += [
            _ranges(plan.experts_of_rank(layer, rank.rank)) or "-"
            for layer in range(min(layers, model.num_moe_layers))
        ]
        if model.num_moe_layers > layers:
            cells.append("")
        cells.append(f"{format_bytes(used)} of {format_bytes(memory.capacity)}")
        table.add_row(*cells)
    if plan.world_size > _MAX_RANKS:
        table.caption = f"{plan.world_size - _MAX_RANKS} more ranks in the plan file"
    return table


def _ranges(experts: list[int]) -> str:
    """Return expert ids with runs of three or more shortened: `0-15 18 20`."""
    runs: list[list[int]] = []
    for expert in sorted(experts):
        if runs and runs[-1][-1] == expert - 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return " ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def _cost(plan: Plan, layers: int) -> Table:
    table = Table(
        title=f"predicted time of one step of {plan.workload.tokens_per_rank} tokens a rank",
        title_justify="left",
    )
    for heading in ("layer", "dispatch ms", "experts ms", "combine ms", "total ms", "bound ms"):
        table.add_column(heading, justify="right")
    table.add_column("set by")
    table.add_column("verdict")
    for cost in plan.cost[:layers]:
        times = (cost.dispatch_s, cost.compute_s, cost.combine_s, cost.total_s, cost.bound_s)
        table.add_row(
            str(cost.layer), *(f"{time * 1e3:.3f}" for time in times), cost.binding, cost.verdict
        )
    if len(plan.cost) > layers:
        table.caption = f"{len(plan.cost) - layers} more layers: --all-layers"
    return table


def _certificate(plan: Plan) -> Table:
    certificate = plan.certificate
    meaning = {
        "optimal": "optimal: proven, no placement is faster",
        "feasible": "feasible: the gap asked for is proven",
        "limit": "limit: the gap asked for was not reached; the gap below is proven",
    }
    table = Table(title="certificate", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value")
    # A rebalanced plan whose topology was not at hand has no price.
    gain = certificate.contiguous_s / (certificate.objective_s or 1.0)
    rows = {
        "status": meaning[certificate.status],
        "objective": f"{format_time(certificate.objective_s)} for all MoE layers",
        "bound": f"{format_time(certificate.bound_s)}, gap {certificate.gap:.3%}",
        "valid for": certificate.scope,
        **_choice(certificate),
        "binding": certificate.binding,
        "experts in id order": f"{format_time(certificate.contiguous_s)} ({gain:.2f}x this plan)",
        "found in": f"{certificate.seconds:.2f} s by {certificate.solver}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _choice(certificate: Certificate) -> dict[str, str]:
    """Return the line on other GPUs, if there were some to choose."""
    bound_s, gap = certificate.choice_bound_s, certificate.choice_gap
    if bound_s is None or gap is None:
        return {}
    return {
        "bound, any GPUs": f"{format_time(bound_s)}, gap {gap:.3%}: as many GPUs of the cluster"
    }


def _list(heading: str, entries: tuple[str, ...]) -> Iterator[Text]:
    if entries:
        yield Text("\n".join([f"{heading}:", *(f"  - {entry}" for entry in entries)]))
