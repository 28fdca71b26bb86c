"""One rank of a benchmark: the program that `epplan bench` starts for every rank.

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... \\
        python -m epplan.runtime.bench PLAN --sequences 2 --result bench.json

The same contract as the worker's; importing it does no work and starts no threads.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from epplan.errors import EpplanError, InputError
from epplan.files import write_atomically
from epplan.launcher.bench_options import BenchOptions, bench_options
from epplan.planner.plan import read_plan
from epplan.runtime.baseline.pipeline_parallel import check_grid
from epplan.runtime.timing.bench_jobs import parse_grid
from epplan.runtime.timing.bench_result import bench_lines, bench_text
from epplan.runtime.timing.bench_run import bench_rank

from .environment import choose_setting, num_local_ranks, num_threads, read_environment

_TIMEOUT = timedelta(minutes=10)


def main(args: list[str] | None = None) -> None:
    """Run one rank; ends in SystemExit."""
    command.main(args=args, prog_name="python -m epplan.runtime.bench")


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@bench_options
@click.option(
    "--result", type=click.Path(path_type=Path), help="File for rank 0's result, as JSON."
)
def command(plan: Path, result: Path | None, **options: Any) -> None:
    """Time one rank of PLAN, with torchrun's variables in the environment."""
    try:
        _run(plan, BenchOptions(**options), result)
    except EpplanError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _run(path: Path, options: BenchOptions, result_path: Path | None) -> None:
    environment = read_environment(os.environ)
    plan = read_plan(path)
    if plan.world_size != environment.world_size:
        raise InputError(
            f"plan {path} is for {plan.world_size} ranks, WORLD_SIZE is {environment.world_size}"
        )
    if options.baseline is not None:
        check_grid(parse_grid(options.baseline), plan.model, plan.world_size)
    local_ranks = num_local_ranks(environment, plan)
    setting = choose_setting(options.backend, plan.model, environment.local_rank, local_ranks)
    device = setting.device if setting.device.type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(local_ranks))
    dist.init_process_group(
        setting.backend,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=_TIMEOUT,
        device_id=device,
    )
    result = bench_rank(plan, options, setting, environment.rank)
    dist.destroy_process_group()
    if result is None:
        return
    if result_path is not None:
        write_atomically(result_path, bench_text(result))
    for line in bench_lines(result):
        click.echo(line)


if __name__ == "__main__":
    main()
