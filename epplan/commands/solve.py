"""`epplan solve`: from a cluster, a model and traffic to a plan with its certificate."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from epplan.planner.plan import Plan

LIMIT_WITH_PLAN = 4
INTERRUPTED = 130


@click.command()
@click.option("--topology", required=True, metavar="SOURCE", help="Bundled name, YAML or NCCL XML.")
@click.option("--model", required=True, metavar="MODEL", help="Bundled name, config.json or YAML.")
@click.option("--experts", type=click.IntRange(1), help="Override the model's experts per layer.")
@click.option("--layers", type=click.IntRange(1), help="Keep only the model's first N layers.")
@click.option(
    "--scale", type=click.FloatRange(0, min_open=True), help="Multiply all widths of the model."
)
@click.option(
    "--load",
    default="uniform",
    show_default=True,
    help="Traffic: a counts file (.npz) or uniform, zipf[:s], lognormal[:sigma[,skew]].",
)
@click.option("--tokens", type=click.IntRange(1), help="Tokens a rank routes per step.")
@click.option("--ep", type=click.IntRange(1), help="Ranks of the EP group.")
@click.option(
    "--experts-per-gpu",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Most experts of one layer on a GPU.",
)
@click.option(
    "--replicas",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Copies of experts in each layer on top of one of each.",
)
@click.option(
    "--equal-shares",
    is_flag=True,
    help="Copies of an expert take equal shares of its tokens, for engines that know no other.",
)
@click.option(
    "--survive",
    type=click.Choice(["1-host"]),
    help="Keep a copy of every expert when a host is lost; needs a replica of every expert.",
)
@click.option(
    "--overlap",
    is_flag=True,
    help="Minimise max(transfers, experts) of a layer, not their sum: micro-batches overlap.",
)
@click.option(
    "--worst-windows",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Minimise the mean over this share of the traffic's windows, the worst ones (CVaR).",
)
@click.option(
    "--gpu", "gpu_model", metavar="MODEL", help="GPU model where SOURCE does not tell it."
)
@click.option(
    "--gap",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Stop when this relative gap is proven.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds for the solver.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of traffic and solver.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("plan.json"),
    show_default=True,
    help="The plan file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def solve(output: Path, as_json: bool, **options: Any) -> int:
    """Solve the placement of a model's experts on a cluster and write the plan.

    \b
    Examples:
      epplan solve --topology dgx-h100-2 --model reference -o plan.json
      epplan solve --topology mixed-h100-h200 --model mixtral-8x7b --load zipf:0.8
      epplan solve --topology hgx-h200-2 --model deepseek-v3 --experts-per-gpu 16
    """
    from epplan.errors import InfeasibleError, InputError
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.explain import explain
    from epplan.planner.plan import write_plan

    if not output.absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written: folder {output.parent} does not exist")
    try:
        plan, interrupted = _solve(**options)
    except InfeasibleError as error:
        if as_json:
            print_json(_infeasible(error))
        raise
    write_plan(output, plan)
    if as_json:
        print_json(_result(plan, output))
    else:
        print_tables(explain(plan))
        talk(f"wrote {output} (sha256 {plan.sha256()[:12]})")
    if interrupted:
        talk("interrupted: the plan is the best found by then, with its true gap")
        return INTERRUPTED
    return LIMIT_WITH_PLAN if plan.certificate.status == "limit" else 0


def _solve(
    *,
    topology: str,
    model: str,
    experts: int | None,
    layers: int | None,
    scale: float | None,
    load: str,
    tokens: int | None,
    ep: int | None,
    experts_per_gpu: int,
    replicas: int,
    equal_shares: bool,
    survive: str | None,
    overlap: bool,
    worst_windows: float,
    gpu_model: str | None,
    gap: float,
    time_limit: float,
    seed: int,
) -> "tuple[Plan, bool]":
    """Return the plan, and whether Ctrl-C ended the search for a better one."""
    from epplan.output import talk
    from epplan.planner.assemble import assemble_plan
    from epplan.planner.model import load_model
    from epplan.planner.objective import Objective
    from epplan.planner.problem import Replication, choose_group, make_problem
    from epplan.planner.solve import solve_placement
    from epplan.planner.traffic import make_traffic
    from epplan.topologies.sources import load_cluster

    cluster = load_cluster(topology, gpu_model)
    spec = load_model(model).with_overrides(experts=experts, layers=layers, scale=scale)
    group, reason = choose_group(cluster, spec, ep, experts_per_gpu, replicas)
    traffic = make_traffic(load, spec, len(group), tokens, seed)
    objective = Objective(overlap=overlap, worst=worst_windows)
    replication = Replication(
        extra=replicas, equal_shares=equal_shares, survive_hosts=1 if survive else 0
    )
    problem = make_problem(cluster, group, spec, traffic, experts_per_gpu, objective, replication)
    solution = solve_placement(
        problem,
        gap=gap,
        time_limit_s=time_limit,
        seed=seed,
        progress=talk if sys.stderr.isatty() else lambda line: None,
    )
    reasons = [reason, *(["stopped by Ctrl-C"] if solution.interrupted else [])]
    plan = assemble_plan(
        cluster=cluster,
        problem=problem,
        traffic=traffic,
        solution=solution,
        topology_source=topology,
        model_source=model,
        seed=seed,
        command=shlex.join(["epplan", *sys.argv[1:]]),
        reasons=reasons,
    )
    return plan, solution.interrupted


def _result(plan: "Plan", output: Path) -> dict[str, Any]:
    certificate = plan.certificate
    return {
        "status": certificate.status,
        "objective_s": certificate.objective_s,
        "bound_s": certificate.bound_s,
        "gap": certificate.gap,
        "seconds": certificate.seconds,
        "binding": certificate.binding,
        "contiguous_s": certificate.contiguous_s,
        "ep": plan.world_size,
        "experts_per_gpu_max": plan.slots_per_rank,
        "plan": str(output),
        "sha256": plan.sha256(),
    }


def _infeasible(error: Exception) -> dict[str, Any]:
    empty = ("objective_s", "bound_s", "gap", "seconds", "binding", "ep", "experts_per_gpu_max")
    return {"status": "infeasible", **dict.fromkeys(empty), "plan": None, "reason": str(error)}
