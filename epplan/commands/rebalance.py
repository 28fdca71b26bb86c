"""`epplan rebalance`: the next slot table of a running plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from epplan.planner.moves.next_plan import Replan
    from epplan.planner.moves.slot_transfers import Transfer
    from epplan.planner.plan import Plan

_FILE = click.Path(path_type=Path, dir_okay=False)
_MAX_TRANSFERS = 40  # rows of the printed table


@click.command()
@click.argument("plan", type=_FILE)
@click.option(
    "--counts", type=_FILE, required=True, help="Rows by layer, source rank and expert (.npz)."
)
@click.option("-o", "--output", type=_FILE, required=True, help="The new plan file.")
@click.option(
    "--min-gain",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Leave a layer alone unless its busiest rank's rows fall by this part.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rebalance(plan: Path, counts: Path, output: Path, min_gain: float, as_json: bool) -> None:
    """Write the plan that evens out PLAN's ranks for newly counted traffic with the fewest moves.

    Experts that need not move keep their slots; outputs of the model do not change. Only rows of
    GPUs are evened out: links and hosts are what `epplan solve` optimises.

    \b
    Example:
      epplan rebalance plan.json --counts counts.npz -o next.json
    """
    from epplan.errors import InputError
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.moves.next_plan import replan
    from epplan.planner.plan import read_plan, write_plan
    from epplan.planner.traffic import make_traffic
    from epplan.quoting import command_line

    if not output.absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written: folder {output.parent} does not exist")
    present = read_plan(plan)
    traffic = make_traffic(str(counts), present.model, present.world_size, None, 0)
    done = replan(present, traffic, min_gain=min_gain, command=command_line())
    write_plan(output, done.plan)
    if as_json:
        print_json(_result(done, output))
        return
    print_tables(_layers(done))
    if done.transfers:
        print_tables(_transfers(done))
    for note in done.notes:
        talk(note)
    talk(f"wrote {output} (sha256 {done.plan.sha256()[:12]})")


def _result(done: "Replan", output: Path) -> dict[str, Any]:
    return {
        "plan": str(output),
        "sha256": done.plan.sha256(),
        "experts_moved": len(done.transfers),
        "bytes_moved": done.bytes_moved,
        "max_over_mean_before": list(done.before),
        "max_over_mean_after": list(done.after),
        "notes": list(done.notes),
        "transfers": [_row(done.plan, transfer) for transfer in done.transfers],
    }


def _row(plan: "Plan", transfer: "Transfer") -> dict[str, Any]:
    """Return a transfer in the user's numbers: absolute layer, ranks and hosts."""
    source, target = (
        slot // plan.slots_per_rank for slot in (transfer.source_slot, transfer.target_slot)
    )
    return {
        "layer": plan.model.moe_layers[transfer.layer],
        "expert": transfer.expert,
        "from_rank": source,
        "from_host": plan.ranks[source].host,
        "to_rank": target,
        "to_host": plan.ranks[target].host,
        "to_slot": transfer.target_slot % plan.slots_per_rank,
        "bytes": plan.model.expert_bytes,
    }


def _layers(done: "Replan") -> "Table":
    from rich.table import Table

    table = Table("layer", "busiest rank / mean", "with the new table", "experts to move")
    for ordinal, layer in enumerate(done.plan.model.moe_layers):
        moves = sum(transfer.layer == ordinal for transfer in done.transfers)
        table.add_row(
            str(layer), f"{done.before[ordinal]:.3f}", f"{done.after[ordinal]:.3f}", str(moves)
        )
    return table


def _transfers(done: "Replan") -> "Table":
    from rich.table import Table

    from epplan.topologies.units import format_bytes

    title = f"{len(done.transfers)} experts, {format_bytes(done.bytes_moved)}"
    table = Table("layer", "expert", "from rank", "to rank", "slot", title=title)
    for transfer in done.transfers[:_MAX_TRANSFERS]:
        row = _row(done.plan, transfer)
        table.add_row(
            str(row["layer"]),
            str(row["expert"]),
            f"{row['from_rank']} ({row['from_host']})",
            f"{row['to_rank']} ({row['to_host']})",
            str(row["to_slot"]),
        )
    if len(done.transfers) > _MAX_TRANSFERS:
        table.caption = f"and {len(done.transfers) - _MAX_TRANSFERS} more: --json lists them all"
    return table
