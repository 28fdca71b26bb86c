"""`epplan launch`: run a plan, one process per rank."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from epplan.errors import InputError, RankFailedError


# The options after --json are the worker's: same names, same defaults, passed to every rank.
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
    "--backend",
    type=click.Choice(["auto", "gloo", "nccl"]),
    default="auto",
    show_default=True,
    help="nccl computes on GPUs, gloo on the CPU; auto: nccl where every rank has a GPU.",
)
@click.option("--sequences", type=click.IntRange(1), default=2, show_default=True, help="Per rank.")
@click.option(
    "--sequence-length", type=click.IntRange(1), default=64, show_default=True, help="In tokens."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Timed steps, after one to warm up.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and inputs.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare with the dense model, on rank 0.",
)
@click.pass_context
def launch(
    context: click.Context, /, plan: Path, target: str, as_json: bool, **options: Any
) -> None:
    """Run PLAN: one process per rank, in plan order.

    Every line of a rank has the rank in front. The first rank to fail stops all others and gives
    its exit code; Ctrl-C and SIGTERM stop all. With --json, stdout holds nothing but the result
    and the ranks' output goes to stderr.
    """
    from epplan.launcher.request import request_from_plan
    from epplan.launcher.targets.local import run_local

    request = request_from_plan(plan, options=worker_options(options))
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
        run = run_local(request, lambda line, is_error: click.echo(line, err=is_error or as_json))
    except RankFailedError as error:
        if as_json and error.result is not None:
            click.echo(json.dumps(error.result))
        raise
    if run.interrupted_by is not None:
        click.echo(f"stopped by {run.interrupted_by.name}; no rank is left", err=True)
        context.exit(128 + run.interrupted_by)
    if as_json:
        click.echo(json.dumps(run.result))


def worker_options(options: dict[str, Any]) -> tuple[str, ...]:
    """Return the worker's options as it reads them from its command line."""
    flags = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            flags.append(f"--{option}={value}")
    return tuple(flags)
