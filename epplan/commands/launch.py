"""`epplan launch`: run a plan, one process per rank."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from epplan.errors import InputError, RankFailedError
from epplan.launcher.worker_options import option_arguments, worker_options


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Choice(["local"]),
    default="local",
    show_default=True,
    help="local: all ranks on this machine, whatever hosts the plan names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Start all ranks again that often when one is killed or crashes.",
)
@worker_options
@click.pass_context
def launch(
    context: click.Context,
    /,
    plan: Path,
    target: str,
    as_json: bool,
    max_restarts: int,
    progress: Path | None,
    **options: Any,
) -> None:
    """Run PLAN: one process per rank, in plan order.

    Every line of a rank has the rank in front. The first rank to fail stops all others and gives
    its exit code; Ctrl-C and SIGTERM stop all. With --max-restarts they go on after the last
    finished step; when a host is gone, `epplan replan` makes a plan for the others, and the same
    --progress file lets it go on there. With --json, stdout holds nothing but the result
    and the ranks' output goes to stderr.
    """
    from epplan.launcher.request import request_from_plan
    from epplan.launcher.restart import progress_file, run_with_restarts
    from epplan.launcher.targets.local import run_local

    request = request_from_plan(plan, options=option_arguments(options))
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "running a plan needs torch, which is not installed",
            hints=["pip install 'epplan[runtime]'"],
        )
    click.echo(request.title(), err=True)
    if len(request.hosts) > 1:
        click.echo(
            f"plan names {len(request.hosts)} hosts; --to {target} runs all "
            f"{request.num_ranks} ranks on this machine",
            err=True,
        )
    try:
        with progress_file(progress, max_restarts) as kept:
            request = replace(
                request, options=(*request.options, *option_arguments({"progress": kept}))
            )
            run = run_with_restarts(
                lambda: run_local(
                    request, lambda line, is_error: click.echo(line, err=is_error or as_json)
                ),
                max_restarts,
                lambda line: click.echo(line, err=True),
            )
    except RankFailedError as error:
        if as_json and error.result is not None:
            click.echo(json.dumps(error.result))
        raise
    if run.interrupted_by is not None:
        click.echo(f"stopped by {run.interrupted_by.name}; no rank is left", err=True)
        context.exit(128 + run.interrupted_by)
    if as_json:
        click.echo(json.dumps(run.result))
