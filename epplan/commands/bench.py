"""`epplan bench`: time prefill and decode of a plan, of its baseline, or of one of its ranks."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from epplan.errors import InputError
from epplan.launcher.bench_options import BenchOptions, bench_options
from epplan.launcher.worker_options import option_arguments

MODULE = "epplan.runtime.bench"


@click.command()
@click.argument("plan", type=click.Path(path_type=Path), required=False)
@click.option(
    "--calibrate",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Time the GPU at hand, without a plan, and write its profile for `epplan simulate`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@bench_options
@click.pass_context
def bench(
    context: click.Context,
    /,
    plan: Path | None,
    calibrate: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time prefill and decode of PLAN with seeded weights.

    All ranks run on this machine, whatever hosts the plan names: on its GPUs where there are
    enough, else on the CPU. Every result is compared with a matrix product and a copy timed in
    the same run.

    \b
    Examples:
      epplan bench plan.json
      epplan bench plan.json --baseline tp8pp2 --no-overlap
      epplan bench plan.json --one-rank 0 --phase decode --sequences 64 --context 128
      epplan bench --calibrate my-gpu.yaml
    """
    if (plan is None) == (calibrate is None):
        raise InputError("give a PLAN to time, or --calibrate FILE to time the GPU, not both")
    chosen = BenchOptions(**options)
    if chosen.baseline is not None and chosen.one_rank is not None:
        raise InputError("--one-rank times a rank of the plan, not of the baseline")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "running a plan needs torch, which is not installed",
            hints=["pip install 'epplan[runtime]'"],
        )
    if calibrate is not None:
        from epplan.runtime.calibrate import main

        main.main([f"--output={calibrate}"], standalone_mode=False)
        return
    assert plan is not None
    if chosen.one_rank is not None:
        _bench_one_rank(plan, chosen, as_json)
        return
    from epplan.launcher.request import request_from_plan
    from epplan.launcher.targets.local import run_local

    request = request_from_plan(plan, options=option_arguments(options), module=MODULE)
    click.echo(request.title(), err=True)
    run = run_local(request, lambda line, is_error: click.echo(line, err=is_error or as_json))
    if run.interrupted_by is not None:
        click.echo(f"stopped by {run.interrupted_by.name}; no rank is left", err=True)
        context.exit(128 + run.interrupted_by)
    if as_json:
        click.echo(json.dumps(run.result))


def _bench_one_rank(path: Path, options: BenchOptions, as_json: bool) -> None:
    from epplan.planner.plan import read_plan
    from epplan.runtime.timing.bench_result import bench_lines
    from epplan.runtime.timing.bench_run import bench_one_rank

    result = bench_one_rank(read_plan(path), options)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        for line in bench_lines(result):
            click.echo(line)
