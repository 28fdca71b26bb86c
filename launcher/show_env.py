"""The variables of a job with their reasons, for people and scripts."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from .environment import Variable
from .job import Job

Rows = Sequence[tuple[str, Variable]]  # whom it is for, and the variable


def job_rows(job: Job) -> list[tuple[str, Variable]]:
    """Return all variables of a job, those of single hosts last."""
    rows = [("all ranks", variable) for variable in job.variables]
    rows += [(f"host {host.name}", variable) for host in job.hosts for variable in host.variables]
    return rows


def cpu_rows(job: Job) -> list[tuple[str, Variable]]:
    """Return the NUMA node every rank keeps to, host by host, where the plan knows it."""
    rows = []
    for host in job.hosts:
        nodes = ["-" if rank.numa is None else str(rank.numa) for rank in host.ranks]
        if set(nodes) != {"-"}:
            variable = Variable(
                name="(CPUs)",
                value=f"NUMA node {' '.join(nodes)}",
                reason="each rank keeps to the node of its GPU, in rank order; no variable",
            )
            rows.append((f"host {host.name}", variable))
    return rows


def environment_table(rows: Rows) -> RenderableType:
    """Return the table of `epplan launch --show-env`."""
    table = Table(caption="a variable that is set already wins, unless this says replaced")
    for heading in ("for", "variable", "value", "if set", "reason"):
        table.add_column(heading, overflow="fold")
    for whom, variable in rows:
        kept = "replaced" if variable.is_fixed else "kept"
        table.add_row(whom, variable.name, variable.value, kept, variable.reason)
    return table


def environment_json(rows: Rows) -> list[dict[str, Any]]:
    """Return the same as JSON values."""
    return [
        {
            "for": whom,
            "name": variable.name,
            "value": variable.value,
            "replaces": variable.is_fixed,
            "reason": variable.reason,
        }
        for whom, variable in rows
    ]
