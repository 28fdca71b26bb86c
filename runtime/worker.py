"""One rank: read the plan, build this rank's part of the model, run it, time it, check it.

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... \\
        python -m epplan.runtime.worker PLAN --sequences 2 --sequence-length 64

Importing this module does no work and starts no threads, so that a launcher may import it once
and fork the ranks.
"""

import os
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from epplan.errors import EpplanError, InputError
from epplan.files import write_atomically
from epplan.launcher.restart import final_error, note_final_error
from epplan.launcher.worker_options import worker_options
from epplan.planner.plan import Plan, read_plan

from .environment import (
    bind_cpus,
    choose_setting,
    num_local_ranks,
    num_threads,
    read_environment,
)
from .identity import check_identity, this_host
from .measure import run_rank
from .options import Options
from .process_group import meet, process_group
from .result import Result, result_text, summary_lines

_PROGRAM = "python -m epplan.runtime.worker"


def main(args: list[str] | None = None) -> None:
    """Run one rank; ends in SystemExit."""
    command.main(args=args, prog_name=_PROGRAM)


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@worker_options
@click.option(
    "--result", type=click.Path(path_type=Path), help="File for rank 0's result, as JSON."
)
def command(
    plan: Path,
    result: Path | None,
    identity: bool | None,
    host_map: Path | None,
    **options: Any,
) -> None:
    """Run one rank of PLAN, with torchrun's variables in the environment."""
    try:
        _run(plan, Options(**options), result, identity is not False, host_map)
    except EpplanError as error:
        click.echo(f"error: {error}", err=True)
        note_final_error(error.exit_code)
        raise SystemExit(error.exit_code) from None


def _run(
    path: Path,
    options: Options,
    result_path: Path | None,
    must_be_planned: bool,
    host_map: Path | None,
) -> None:
    environment = read_environment(os.environ)
    _check_restart()
    plan = read_plan(path)
    if plan.world_size != environment.world_size:
        raise InputError(
            f"plan {path} is for {plan.world_size} ranks, WORLD_SIZE is {environment.world_size}",
            hints=[
                f"start {plan.world_size} ranks, or make a plan for {environment.world_size} "
                "with `epplan solve`"
            ],
        )
    local_ranks = num_local_ranks(environment, plan)
    setting = choose_setting(options.backend, plan.model, environment.local_rank, local_ranks)
    if setting.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(local_ranks))
    store, host = meet(environment, options.timeout), this_host(os.environ)
    if must_be_planned:
        check_identity(store, plan, environment.rank, setting.device, host, host_map)
        bind_cpus(plan.ranks[environment.rank].numa)
    with process_group(environment, setting, store, options.timeout) as watchdog:
        _check_agreement(plan, options)
        result = run_rank(plan, options, setting, environment.rank, watchdog)
    if result is not None:
        _report(result, plan, result_path)


def _check_restart() -> None:
    """End at once where torchrun starts this rank again after an error that would come again."""
    if (code := final_error()) is not None:
        click.echo("not started again: the error of before would come again", err=True)
        raise SystemExit(code)


def _check_agreement(plan: Plan, options: Options) -> None:
    """Compare plan and options of all ranks: with different ones they would hang or be wrong.

    Raises:
        InputError: names the ranks that differ from rank 0.
    """
    everyone: list[str] = [""] * plan.world_size
    dist.all_gather_object(everyone, f"plan {plan.sha256()[:12]}, {options}")
    problems = [f"rank {rank}: {own}" for rank, own in enumerate(everyone) if own != everyone[0]]
    if problems:
        raise InputError(
            "ranks were started with different plans or options",
            problems=[f"rank 0: {everyone[0]}", *problems],
        )


def _report(result: Result, plan: Plan, path: Path | None) -> None:
    """Write and print the result.

    Raises:
        EpplanError: the run was wrong.
    """
    if path is not None:
        write_atomically(path, result_text(result))
    for line in summary_lines(result, plan):
        click.echo(line)
    if result.verified is False:
        note_final_error(EpplanError.exit_code, is_final=True)
        raise EpplanError(
            "the distributed run differs from the dense model", problems=result.problems[:5]
        )


if __name__ == "__main__":
    main()
