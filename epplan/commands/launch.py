"""`epplan launch`: run a plan, one process per rank."""

import importlib.util
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from epplan.errors import InputError, RankFailedError
from epplan.launcher.targets.registry import LOCAL, TARGETS
from epplan.launcher.worker_options import option_arguments, worker_options

if TYPE_CHECKING:
    from epplan.launcher.build import Settings
    from epplan.launcher.request import LaunchRequest


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Choice(TARGETS),
    default=LOCAL,
    show_default=True,
    help="local: all ranks on this machine, whatever hosts the plan names.",
)
@click.option("--dry-run", is_flag=True, help="Write and print what would run; start nothing.")
@click.option("--show-env", is_flag=True, help="Print the ranks' variables, each with its reason.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the job's files, shared by all hosts. [default: PLAN-TARGET]",
)
@click.option(
    "--topology", metavar="SOURCE", help="Choose NICs and write NCCL topology files from it."
)
@click.option("--master-address", help="Where rank 0 listens. [default: the name of its host]")
@click.option("--master-port", type=click.IntRange(1, 65535), default=29500, show_default=True)
@click.option("--python", help="The interpreter on the hosts. [default: this one]")
@click.option("--env", "given", multiple=True, metavar="NAME=VALUE", help="For all ranks.")
@click.option("--name", help="Of the job. [default: the plan's]")
@click.option("--image", help="Container image with epplan and torch, for Kubernetes.")
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
    dry_run: bool,
    show_env: bool,
    output_dir: Path | None,
    topology: str | None,
    master_address: str | None,
    master_port: int,
    python: str | None,
    given: tuple[str, ...],
    name: str | None,
    image: str | None,
    as_json: bool,
    max_restarts: int,
    host_map: Path | None,
    **options: Any,
) -> None:
    """Run PLAN: one process per rank, in plan order.

    With local every line of a rank has the rank in front. The first rank to fail stops all others
    and gives its exit code; Ctrl-C and SIGTERM stop all. With --json, stdout holds nothing but the
    result and the ranks' output goes to stderr. With --max-restarts they go on after the last
    finished step; when a host is gone, `epplan replan` makes a plan for the others, and the same
    --progress file lets it go on there.

    Other targets get files, plain to read, and a command that epplan becomes: docs/launch.md.

    \b
    Examples:
      epplan launch plan.json
      epplan launch plan.json --to slurm --output-dir job --dry-run
      epplan launch plan.json --to slurm --output-dir job
    """
    from epplan.launcher.quoting import parse_variable
    from epplan.launcher.request import request_from_plan

    progress = options.pop("progress")  # kept where ranks are restarted, also if nobody asked
    if target == LOCAL:  # jobs take a copy of the map along
        options["host_map"] = host_map
    request = request_from_plan(
        plan,
        options=option_arguments(options),
        environment=tuple(map(parse_variable, given)),
    )
    if target == LOCAL:
        if options["identity"] is None:
            request = _any_machine(request, host_map)
        if dry_run or show_env:
            _show_local(request, show_env, as_json)
        else:
            _run_local(context, request, as_json, max_restarts, progress)
        return
    from epplan.launcher.build import Settings

    settings = Settings(
        output=output_dir or Path(f"{plan.stem}-{target}"),
        host_map=host_map,
        master_address=master_address,
        master_port=master_port,
        python=python,
        name=name,
        image=image,
        max_restarts=max_restarts,
        progress=progress,
    )
    _launch_job(request, target, settings, topology, dry_run, show_env, as_json)


def _any_machine(request: "LaunchRequest", host_map: Path | None) -> "LaunchRequest":
    """Return the request without the identity check, unless this is the host it is planned for."""
    from epplan.launcher.host_map import read_host_map, same_host

    names = read_host_map(host_map, request.hosts)
    if all(same_host(name, socket.gethostname()) for name in names.values()):
        return request
    return replace(request, options=(*request.options, "--no-identity"))


def _run_local(
    context: click.Context,
    request: "LaunchRequest",
    as_json: bool,
    max_restarts: int,
    progress: Path | None,
) -> None:
    from epplan.launcher.restart import progress_file, run_with_restarts
    from epplan.launcher.targets.local import run_local

    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "running a plan needs torch, which is not installed",
            hints=["pip install 'epplan[runtime]'"],
        )
    click.echo(request.title(), err=True)
    if len(request.hosts) > 1:
        click.echo(
            f"plan names {len(request.hosts)} hosts; --to local runs all "
            f"{request.num_ranks} ranks on this machine",
            err=True,
        )
    try:
        with progress_file(progress, max_restarts) as kept:
            kept_options = option_arguments({"progress": kept})
            request = replace(request, options=(*request.options, *kept_options))
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


def _show_local(request: "LaunchRequest", show_env: bool, as_json: bool) -> None:
    from epplan.launcher.ranks import local_variables
    from epplan.launcher.show_env import environment_json, environment_table
    from epplan.output import print_json, print_tables
    from epplan.quoting import shell

    rows = [("all ranks", x) for x in local_variables(request, len(os.sched_getaffinity(0)))]
    arguments = ["-m", request.module, *request.worker_arguments()]
    if as_json:
        print_json({"environment": environment_json(rows), "worker": arguments})
    elif show_env:
        print_tables(environment_table(rows))
    else:
        click.echo(f"run here, {request.num_ranks} times: {shell(sys.executable, *arguments)}")


def _launch_job(
    request: "LaunchRequest",
    target: str,
    settings: "Settings",
    topology: str | None,
    dry_run: bool,
    show_env: bool,
    as_json: bool,
) -> None:
    from epplan.launcher.build import build_job
    from epplan.launcher.show_env import cpu_rows, environment_json, environment_table, job_rows
    from epplan.launcher.submit import become, command_here, job_json, job_text, write_job
    from epplan.launcher.targets.registry import render
    from epplan.output import print_json, print_tables, talk
    from epplan.quoting import made_by

    job = build_job(
        request, target, settings, topology=topology, made_by=made_by(), this_python=sys.executable
    )
    for note in job.notes:
        talk(f"note: {note}")
    rows = job_rows(job)
    if show_env:
        if as_json:
            print_json({"environment": environment_json(rows)})
        else:
            print_tables(environment_table([*rows, *cpu_rows(job)]))
        return
    rendering = render(job, target)
    command = None if dry_run else command_here(rendering, socket.gethostname())
    write_job(job, rendering)
    talk(request.title())
    talk(f"wrote {', '.join(file.name for file in rendering.files)} in {job.output}")
    if as_json:
        print_json({**job_json(job, rendering), "environment": environment_json(rows)})
    elif dry_run:
        click.echo(job_text(job, rendering))
    if command is not None:
        become(command, stdout_to_stderr=as_json)
