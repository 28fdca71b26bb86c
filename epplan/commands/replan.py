"""`epplan replan`: a plan for the hosts that are left, and what has to be loaded for it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .solver_options import solver_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from epplan.planner.moves.replan import Replanned
    from epplan.planner.plan import Plan
    from epplan.topologies.graph import Cluster

ANY = "any"
LIMIT_WITH_PLAN = 4


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--without",
    "hosts",
    required=True,
    multiple=True,
    metavar="HOST",
    help="A host that is gone; may be given several times.",
)
@click.option("--topology", metavar="SOURCE", help="By default what the plan was made for.")
@click.option("--load", help="Traffic of the survivors; by default theirs of the plan's traffic.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens a rank; by default as in the plan.")
@click.option(
    "--experts-per-gpu",
    type=click.IntRange(1),
    help="Most experts of one layer on a GPU; by default as in the plan.",
)
@click.option(
    "--extra",
    default="0B",
    show_default=True,
    metavar="SIZE",
    help="Bytes that may be moved beyond the least, such as 20GiB, to be faster; any: no limit.",
)
@solver_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("replan.json"),
    show_default=True,
    help="The new plan.",
)
@click.option(
    "--transfers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The list of experts to load; by default OUTPUT with .transfers.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replan(plan: Path, output: Path, transfers: Path | None, as_json: bool, **options: Any) -> int:
    """Make a plan for the ranks of PLAN that are left when hosts are gone.

    Survivors keep their experts; those of which no copy is left are loaded where they cost least.
    That moves as few bytes as can be; --extra trades more of them for speed, replicas that were
    lost among them. Ranks are numbered anew.

    \b
    Examples:
      epplan replan plan.json --without node07 -o plan2.json
      epplan replan plan.json --without node07 --experts-per-gpu 2 --extra 20GiB
    """
    from epplan.errors import InputError
    from epplan.files import write_atomically
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.moves.transfers import transfers_json, transfers_text
    from epplan.planner.plan import read_plan, write_plan

    transfers = transfers or output.with_suffix(".transfers.json")
    for path in (output, transfers):
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path} cannot be written: folder {path.parent} does not exist")
    before = read_plan(plan)
    found = _replan(before, talk if sys.stderr.isatty() else lambda line: None, **options)
    document = transfers_json(found.transfers, found.plan, before)
    write_atomically(transfers, transfers_text(document))
    write_plan(output, found.plan)
    if as_json:
        print_json(_result(found, output, document))
    else:
        print_tables(_tables(found))
        talk(f"wrote {output} (sha256 {found.plan.sha256()[:12]}) and {transfers}")
    return LIMIT_WITH_PLAN if found.limit_reached else 0


def _replan(
    before: "Plan",
    progress: Callable[[str], None],
    *,
    hosts: tuple[str, ...],
    topology: str | None,
    gpu_model: str | None,
    load: str | None,
    tokens: int | None,
    experts_per_gpu: int | None,
    extra: str,
    overlap: bool,
    worst_windows: float,
    gap: float,
    time_limit: float,
) -> "Replanned":
    from epplan.planner.moves.replan import Effort, replan
    from epplan.planner.moves.survivors import surviving_ranks, surviving_traffic
    from epplan.planner.objective import Objective
    from epplan.quoting import command_line

    budget = _extra_loads(extra, before)
    cluster = _load_cluster(before, topology, gpu_model)
    survivors = surviving_ranks(before, hosts, cluster)
    return replan(
        before,
        cluster,
        topology or before.inputs.topology.source,
        surviving_traffic(before, survivors, load, tokens),
        survivors,
        experts_per_gpu=experts_per_gpu or before.slots_per_rank,
        extra_loads=budget,
        objective=Objective(overlap=overlap, worst=worst_windows),
        effort=Effort(gap=gap, time_limit_s=time_limit, progress=progress),
        command=command_line(),
    )


def _extra_loads(extra: str, plan: "Plan") -> int | None:
    """Return the budget in experts; None is no limit."""
    from epplan.errors import InputError
    from epplan.topologies.units import parse_memory

    if extra == ANY:
        return None
    try:
        return parse_memory(extra) // plan.model.expert_bytes
    except ValueError as error:
        raise InputError(f"--extra: {error}; or {ANY}") from None


def _load_cluster(plan: "Plan", topology: str | None, gpu_model: str | None) -> "Cluster":
    """Return the cluster, which without --topology must be the one the plan was made for."""
    from epplan.errors import InputError
    from epplan.topologies.sources import load_cluster

    if topology is not None:
        return load_cluster(topology, gpu_model)
    source = plan.inputs.topology
    remedy = ["give the cluster as it is now with --topology SOURCE"]
    try:
        cluster = load_cluster(source.source, gpu_model)
    except InputError as error:
        raise InputError(
            f"the topology the plan was made for cannot be read: {error.message}",
            problems=error.problems,
            hints=remedy,
        ) from None
    if cluster.sha256 != source.sha256:
        raise InputError(
            f"topology {source.source} was changed since the plan was made for it: its sha256 was "
            f"{source.sha256[:12]}, it is {cluster.sha256[:12]}",
            hints=remedy,
        )
    return cluster


def _result(found: "Replanned", output: Path, transfers: dict[str, Any]) -> dict[str, Any]:
    certificate, size = found.plan.certificate, found.plan.model.expert_bytes
    return {
        "status": certificate.status,
        "objective_s": certificate.objective_s,
        "bound_s": certificate.bound_s,
        "gap": certificate.gap,
        "ep": found.plan.world_size,
        "experts_per_gpu_max": found.plan.slots_per_rank,
        "moved_bytes": transfers["total_bytes"],
        "options": [
            {
                "name": option.name,
                "moved_bytes": option.loads * size,
                "seconds": option.seconds,
                "chosen": option is found.chosen,
            }
            for option in found.options
        ],
        "transfers": transfers["transfers"],
        "plan": str(output),
        "sha256": found.plan.sha256(),
    }


def _tables(found: "Replanned") -> "RenderableType":
    """Return the choices, what each rank loads, and the plan."""
    from rich.console import Group
    from rich.table import Table

    from epplan.planner.explain import explain
    from epplan.topologies.units import format_bytes, format_time

    plan, size = found.plan, found.plan.model.expert_bytes
    choices = Table(title="what moving more would gain", title_justify="left")
    for heading in ("", "option", "experts to load", "bytes", "predicted", "above the bound"):
        choices.add_column(heading, justify="left" if heading in ("", "option") else "right")
    for option in found.options:
        above = option.seconds / plan.certificate.bound_s - 1
        choices.add_row(
            "*" if option is found.chosen else "",
            option.name,
            str(option.loads),
            format_bytes(option.loads * size),
            format_time(option.seconds),
            f"{above:.2%}",
        )
    loads = Table(title="what ranks load before the plan can run", title_justify="left")
    for heading in ("rank", "host", "GPU", "from", "experts by layer", "bytes"):
        loads.add_column(
            heading, justify="right" if heading in ("rank", "GPU", "bytes") else "left"
        )
    for (rank, source), experts in _by_rank(found).items():
        place = plan.ranks[rank]
        listed = ", ".join(f"{layer}: {' '.join(map(str, own))}" for layer, own in experts.items())
        count = sum(map(len, experts.values()))
        loads.add_row(
            str(rank),
            place.host,
            str(place.gpu_index),
            "checkpoint" if source is None else f"rank {source}",
            listed,
            format_bytes(count * size),
        )
    return Group(choices, "", loads, "", explain(plan))


def _by_rank(found: "Replanned") -> dict[tuple[int, int | None], dict[int, list[int]]]:
    """Return the experts of every layer, by who loads them and from where."""
    grouped: dict[tuple[int, int | None], dict[int, list[int]]] = {}
    for transfer in sorted(found.transfers, key=lambda transfer: transfer.rank):
        own = grouped.setdefault((transfer.rank, transfer.source), {})
        own.setdefault(transfer.layer, []).append(transfer.expert)
    return grouped
