"""`epplan solve`: from a cluster, a model and traffic to a plan with its certificate."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .solver_options import solver_options

if TYPE_CHECKING:
    from epplan.planner.plan import Plan, TransferMode

LIMIT_WITH_PLAN = 4
INTERRUPTED = 130
_STATUSES = ["optimal", "feasible", "limit"]  # best to worst


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
    help="Traffic: counts or recorded routing (.npz, .jsonl), or uniform, zipf[:s], "
    "lognormal[:sigma[,skew]].",
)
@click.option("--tokens", type=click.IntRange(1), help="Tokens a rank routes per step.")
@click.option("--ep", type=click.IntRange(1), help="Ranks of an EP group.")
@click.option(
    "--groups",
    "num_groups",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Equal EP groups side by side, a plan file each: plan.0.json, ...",
)
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
    "--transfer",
    type=click.Choice(["per-choice", "direct", "node-dedup"]),
    default="per-choice",
    show_default=True,
    help="Rows sent: one per (token, expert), per (token, rank), or per (token, host) over the "
    "network and forwarded inside.",
)
@click.option(
    "--keep-groups",
    is_flag=True,
    help="Keep all experts of a routing group on one host (group-limited routers).",
)
@solver_options
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
      epplan solve --topology oversubscribed-leaf-4 --model reference --ep 16 --groups 2
    """
    from epplan.errors import InfeasibleError, InputError
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.explain import explain, explain_groups
    from epplan.planner.plan import write_plan

    if not output.absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written: folder {output.parent} does not exist")
    try:
        plans, interrupted = _solve(**options)
    except InfeasibleError as error:
        if as_json:
            print_json(_infeasible(error))
        raise
    files = _files(output, len(plans))
    for file, plan in zip(files, plans, strict=True):
        write_plan(file, plan)
    if as_json:
        print_json(_results(plans, files))
    else:
        names = [str(file) for file in files]
        print_tables(explain(plans[0]) if len(plans) == 1 else explain_groups(plans, names))
        for file, plan in zip(files, plans, strict=True):
            talk(f"wrote {file} (sha256 {plan.sha256()[:12]})")
    if interrupted:
        talk("interrupted: the plan is the best found by then, with its true gap")
        return INTERRUPTED
    limit = any(plan.certificate.status == "limit" for plan in plans)
    return LIMIT_WITH_PLAN if limit else 0


def _files(output: Path, number: int) -> list[Path]:
    """Return the plan file of every group: `plan.json`, or `plan.0.json`, `plan.1.json`, ..."""
    if number == 1:
        return [output]
    return [output.with_suffix(f".{group}{output.suffix}") for group in range(number)]


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
    num_groups: int,
    experts_per_gpu: int,
    replicas: int,
    equal_shares: bool,
    survive: str | None,
    transfer: "TransferMode",
    keep_groups: bool,
    overlap: bool,
    worst_windows: float,
    gpu_model: str | None,
    gap: float,
    time_limit: float,
    seed: int,
) -> "tuple[list[Plan], bool]":
    """Return every group's plan, and whether Ctrl-C ended the search for a better one."""
    from epplan.commands.remedies import with_remedies
    from epplan.errors import InfeasibleError
    from epplan.output import talk
    from epplan.planner.assemble import assemble_plan
    from epplan.planner.groups.group import choose_groups, group_size
    from epplan.planner.groups.sharing import share_links, sharing_in_words, solve_groups
    from epplan.planner.model import load_model
    from epplan.planner.objective import Objective
    from epplan.planner.problem import Replication, make_problem, needs_sets
    from epplan.planner.remedies import Ask
    from epplan.planner.traffic import make_traffic, usual_tokens, with_sets
    from epplan.quoting import command_line
    from epplan.topologies.sources import load_cluster

    cluster = load_cluster(topology, gpu_model)
    spec = load_model(model).with_overrides(experts=experts, layers=layers, scale=scale)
    together = needs_sets(transfer, experts_per_gpu)
    objective = Objective(overlap=overlap, worst=worst_windows)
    replication = Replication(
        extra=replicas, equal_shares=equal_shares, survive_hosts=1 if survive else 0
    )
    try:
        size = group_size(cluster, spec, ep, experts_per_gpu, num_groups, replicas)
        traffic = make_traffic(load, spec, size, tokens, seed)
        if together:
            traffic = with_sets(traffic, spec, seed)
        groups = choose_groups(
            cluster,
            spec,
            traffic,
            experts_per_gpu,
            num_groups=num_groups,
            bounded=not (overlap or replicas or together),
        )
        alone = [
            make_problem(
                cluster,
                gpus,
                spec,
                traffic,
                experts_per_gpu,
                objective,
                replication,
                transfer=transfer,
                keep_groups=keep_groups,
            )
            for gpus in groups.gpus
        ]
    except InfeasibleError as error:
        most = len(cluster.gpus()) // num_groups
        size = ep or max(1, min(most, spec.num_experts + replicas))
        ask = Ask(
            ep=size,
            groups=num_groups,
            experts_per_gpu=experts_per_gpu,
            replicas=replicas,
            survive=survive is not None,
            tokens=tokens or usual_tokens(load, spec, size),
            layers=spec.num_layers,
            experts=spec.num_experts,
            scale=scale or 1.0,
        )
        raise with_remedies(
            error, ask, ep=ep, cluster=cluster, model=load_model(model), load=load, seed=seed
        ) from None
    problems = share_links(alone)
    guessed = together and size * num_groups < len(cluster.gpus())
    solutions = solve_groups(
        problems,
        gap=gap,
        time_limit_s=time_limit,
        seed=seed,
        progress=talk if sys.stderr.isatty() else lambda line: None,
    )
    plans = [
        assemble_plan(
            cluster=cluster,
            problem=problem,
            traffic=traffic,
            solution=solution,
            topology_source=topology,
            model_source=model,
            seed=seed,
            command=command_line(),
            reasons=[
                groups.reason,
                *(["GPUs were chosen as if every choice travelled by itself"] if guessed else []),
                *(["stopped by Ctrl-C"] if solution.interrupted else []),
            ],
            choice_bound_s=groups.bound_s,
            assumptions=sharing_in_words(alone),
        )
        for problem, solution in zip(problems, solutions, strict=True)
    ]
    return plans, any(solution.interrupted for solution in solutions)


def _results(plans: "list[Plan]", files: list[Path]) -> dict[str, Any]:
    """Return one plan's result, or all groups' with the slowest group's on top."""
    results = [_result(plan, file) for plan, file in zip(plans, files, strict=True)]
    if len(results) == 1:
        return results[0]
    slowest = max(range(len(results)), key=lambda group: results[group]["objective_s"])
    worst = max((result["status"] for result in results), key=_STATUSES.index)
    return {
        "status": worst,
        **{name: results[slowest][name] for name in ("objective_s", "bound_s", "gap")},
        "slowest": slowest,
        "groups": [
            {"hosts": list(dict.fromkeys(rank.host for rank in plan.ranks)), **result}
            for plan, result in zip(plans, results, strict=True)
        ],
    }


def _result(plan: "Plan", output: Path) -> dict[str, Any]:
    certificate = plan.certificate
    return {
        "status": certificate.status,
        "objective_s": certificate.objective_s,
        "bound_s": certificate.bound_s,
        "gap": certificate.gap,
        "choice_bound_s": certificate.choice_bound_s,
        "choice_gap": certificate.choice_gap,
        "seconds": certificate.seconds,
        "binding": certificate.binding,
        "contiguous_s": certificate.contiguous_s,
        "transfer": plan.workload.transfer,
        "ep": plan.world_size,
        "experts_per_gpu_max": plan.slots_per_rank,
        "plan": str(output),
        "sha256": plan.sha256(),
    }


def _infeasible(error: Exception) -> dict[str, Any]:
    empty = ("objective_s", "bound_s", "gap", "seconds", "binding", "ep", "experts_per_gpu_max")
    return {"status": "infeasible", **dict.fromkeys(empty), "plan": None, "reason": str(error)}
