"""`epplan doctor`: what would go wrong in a launch."""

from pathlib import Path

import click

from epplan.launcher.targets.registry import TARGETS

FINDINGS = 6


@click.command()
@click.argument("plan", type=click.Path(path_type=Path), required=False)
@click.option("--to", "target", type=click.Choice(TARGETS), help="How it is to be launched.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(plan: Path | None, target: str | None, as_json: bool) -> int:
    """Check this machine before a launch, of PLAN if it is given.

    Solver, packages, driver, NCCL, peer access, NIC distance, clocks, schedulers, shared memory,
    limits. Every line is pass, warn or fail with the remedy; a fail ends in exit code 6.

    \b
    Examples:
      epplan doctor
      srun --ntasks-per-node=1 epplan doctor plan.json --to slurm
    """
    from epplan.launcher.doctor import examine
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.plan import read_plan
    from epplan.topologies.check_table import report_table

    report = examine(read_plan(plan) if plan else None, target)
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(report_table(report))
        talk(", ".join(f"{count} {level}" for level, count in report.counts().items()))
    return FINDINGS if report.counts()["fail"] else 0
