"""What it is worth to know which experts tokens choose together, and how much of it is proven.

    python benchmarks/together.py [--routing trace.jsonl] [--only trace-4]

One JSON line a case: transfer, objective, bound, gap, seconds of all layers, ratio to experts in id
order. `trace-H` plans a recorded trace (simllm JSON lines, 32 experts or any other number, one a
GPU) on H hosts with node-dedup: every other token is planned for, the rest judges.
`hosts_per_token` are the different hosts of a token's experts, `worst_host` the tokens that reach
the busiest host over the mean host's, both first of experts in id order, then of the plan, means
over layers. `drawn-R` plans
256 experts on R GPUs for token sets drawn from skewed counts, and judges by other draws of the same
counts: what the plan gains only on its own draw is chance.

`copies-R` and `copies-R-groups` (whole routing groups) plan 32 replicas of 256 experts on R GPUs
for node-dedup, `trace-copies` 16 of the recorded trace's on 4 hosts of 4 GPUs. Beside the plan are
the one without replicas and the replicas planned as if every choice travelled by itself, priced
with the same token sets: `without_over_plan`, `by_choice_over_plan`, and judged as above.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from epplan.planner.cost import Placement, Shares, evaluate_layer, one_copy
from epplan.planner.model import AttentionSpec, ModelSpec, RouterSpec
from epplan.planner.placement.search import contiguous
from epplan.planner.plan import TransferMode
from epplan.planner.problem import Problem, Replication, make_problem
from epplan.planner.routing_trace import from_topk, read_json_lines
from epplan.planner.solve import solve_placement
from epplan.planner.token_sets import Ints
from epplan.planner.traffic import Traffic, make_traffic, with_sets
from epplan.topologies.graph import Cluster
from epplan.topologies.sources import load_cluster

HOSTS = (4, 8, 16)
DRAWN: list[tuple[int, TransferMode]] = [
    (16, "direct"),
    (16, "node-dedup"),
    (64, "direct"),
    (64, "node-dedup"),
]
COPIES = [(32, 9, "lognormal:1", False), (64, 5, "lognormal:1,0.5", False)]
COPIES += [(*case[:3], True) for case in COPIES]
_REPLICAS = 32
_TRACE_REPLICAS, _TRACE_HOSTS, _TRACE_GPUS = 16, 4, 4
_LIMIT_S = 120.0
_COPIES_LIMIT_S = 60.0
_TOKENS = 4096  # a rank
_DRAWS = 3


@click.command()
@click.option("--routing", type=click.Path(path_type=Path, exists=True), help="Recorded tokens.")
@click.option("--only", help="One case, such as trace-4 or drawn-64-direct.")
def main(routing: Path | None, only: str | None) -> None:
    """Run the cases and print."""
    if routing is None:
        click.echo("no --routing given: the recorded trace is not run", err=True)
    else:
        for hosts in HOSTS:
            if only in (None, f"trace-{hosts}"):
                _print({"case": f"trace-{hosts}", **_trace(routing, hosts)})
        if only in (None, "trace-copies"):
            _print({"case": "trace-copies", **_trace_copies(routing)})
    for ranks, transfer in DRAWN:
        if only in (None, f"drawn-{ranks}-{transfer}"):
            _print({"case": f"drawn-{ranks}-{transfer}", **_drawn(ranks, transfer)})
    for ranks, per_gpu, load, whole in COPIES:
        case = f"copies-{ranks}{'-groups' * whole}"
        if only in (None, case):
            _print({"case": case, **_drawn_copies(ranks, per_gpu, load, whole=whole)})


def _print(line: dict[str, object]) -> None:
    click.echo(json.dumps({**line, "cores": os.cpu_count()}))


def _trace(path: Path, hosts: int) -> dict[str, object]:
    topk = _tokens(path)
    layers, _, top_k = topk.shape
    experts = int(topk.max()) + 1
    model = _model(experts, top_k, layers)
    gpus = experts // hosts
    cluster = load_cluster(f"{hosts}x{gpus}:h100,nic={gpus}x400Gb/s")
    planned, judged = (
        _problem(cluster, model, _traffic(topk[:, half::2], experts, experts), 1, "node-dedup")
        for half in range(2)
    )
    found, placements = _solved(planned)
    in_order = contiguous(experts, np.ones(experts, dtype=np.int64))
    return {
        **found,
        "layers": layers,
        "tokens": topk.shape[1],
        "different_sets": _different(topk),
        "contiguous_over_plan": _seconds(planned, [in_order] * layers)
        / _seconds(planned, placements),
        "contiguous_over_plan_judged": _seconds(judged, [in_order] * layers)
        / _seconds(judged, placements),
        "hosts_per_token": _reached(planned, [in_order] * layers, placements, gpus)[0],
        "hosts_per_token_judged": _reached(judged, [in_order] * layers, placements, gpus)[0],
        "worst_host": _reached(planned, [in_order] * layers, placements, gpus)[1],
        "worst_host_judged": _reached(judged, [in_order] * layers, placements, gpus)[1],
    }


def _tokens(path: Path) -> Ints:
    """Return the recorded choices, [layers, tokens, k]."""
    read_json_lines(path)  # refuses what is no trace
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = [[layer["expert_ids"] for layer in row["routing"]] for row in rows if "routing" in row]
    return np.array(tokens, dtype=np.intp).transpose(1, 0, 2)


def _traffic(topk: Ints, experts: int, ranks: int) -> Traffic:
    """Return traffic of [layers, tokens, k], the same mix on all ranks."""
    trace = from_topk(topk[None, :, None], "trace")
    factor = _TOKENS * ranks / topk.shape[1]
    sets = tuple(tuple(layer.scaled(factor) for layer in window) for window in trace.sets)
    counts = np.array([[layer.counts(experts) for layer in window] for window in sets])
    return Traffic(
        counts=np.repeat(counts / ranks, ranks, axis=2),
        source="trace",
        sha256="",
        windows=1,
        source_ranks=1,
        tokens_per_rank=_TOKENS,
        sets=sets,
    )


def _different(topk: Ints) -> int:
    return sum(len(np.unique(np.sort(layer, axis=1), axis=0)) for layer in topk)


def _problem(
    cluster: Cluster, model: ModelSpec, traffic: Traffic, per_gpu: int, transfer: TransferMode
) -> Problem:
    gpus = tuple(cluster.gpus())
    return make_problem(cluster, gpus, model, traffic, per_gpu, transfer=transfer)


def _solved(problem: Problem) -> tuple[dict[str, object], list[Placement]]:
    found, layers = _solved_shares(problem)
    return found, [shares.argmax(axis=1) for shares in layers]


def _solved_shares(
    problem: Problem, limit_s: float = _LIMIT_S
) -> tuple[dict[str, object], list[Shares]]:
    began = time.monotonic()
    solution = solve_placement(
        problem, gap=0.01, time_limit_s=limit_s, seed=0, progress=lambda line: None
    )
    found: dict[str, object] = {
        "transfer": problem.transfer,
        "status": solution.status,
        "objective_s": solution.objective_s,
        "bound_s": solution.bound_s,
        "gap": solution.gap,
        "seconds": time.monotonic() - began,
    }
    return found, [layer.shares for layer in solution.layers]


def _seconds(problem: Problem, placements: list[Placement]) -> float:
    return _price(problem, [one_copy(placement, problem.num_ranks) for placement in placements])


def _reached(
    problem: Problem, in_order: list[Placement], planned: list[Placement], gpus: int
) -> tuple[list[float], list[float]]:
    """Return hosts of a token and the worst host over the mean, id order and plan."""
    assert problem.sets is not None
    per_token, worst = [], []
    for placements in (in_order, planned):
        hosts = [
            sets.reached(placement // gpus, problem.num_ranks // gpus).sum(axis=0)
            for sets, placement in zip(problem.sets[0], placements, strict=True)
        ]
        tokens = [sets.num_tokens for sets in problem.sets[0]]
        per_token.append(float(np.mean([h.sum() / t for h, t in zip(hosts, tokens, strict=True)])))
        worst.append(float(np.mean([h.max() / h.mean() for h in hosts])))
    return per_token, worst


def _drawn(ranks: int, transfer: TransferMode) -> dict[str, object]:
    model = _model(256, 8, 1)
    cluster = load_cluster(f"{ranks // 8}x8:h100,nic=8x400Gb/s")
    counts = make_traffic("lognormal:1,0.5", model, ranks, _TOKENS, 0)
    per_gpu = 256 // ranks
    problem = _problem(cluster, model, with_sets(counts, model, 0), per_gpu, transfer)
    found, placements = _solved(problem)
    in_order = contiguous(256, np.full(ranks, per_gpu))
    judged = []
    for seed in range(1, 1 + _DRAWS):
        other = replace(problem, sets=with_sets(counts, model, seed).sets)
        judged.append(_seconds(other, [in_order]) / _seconds(other, placements))
    each = replace(problem, sets=None, transfer="per-choice")
    return {
        **found,
        "contiguous_over_plan": _seconds(problem, [in_order]) / _seconds(problem, placements),
        "contiguous_over_plan_judged": float(np.mean(judged)),
        "per_choice_over_plan": _seconds(each, placements) / _seconds(problem, placements),
    }


def _trace_copies(path: Path) -> dict[str, object]:
    topk = _tokens(path)
    ranks, experts = _TRACE_HOSTS * _TRACE_GPUS, int(topk.max()) + 1
    model = _model(experts, topk.shape[2], topk.shape[0])
    cluster = load_cluster(f"{_TRACE_HOSTS}x{_TRACE_GPUS}:h100,nic={_TRACE_GPUS}x400Gb/s")
    per_gpu = (experts + _TRACE_REPLICAS) // ranks
    planned, judged = (
        _problem(cluster, model, _traffic(topk[:, half::2], experts, ranks), per_gpu, "node-dedup")
        for half in range(2)
    )
    return _with_copies(planned, [judged], _TRACE_REPLICAS)


def _drawn_copies(ranks: int, per_gpu: int, load: str, *, whole: bool) -> dict[str, object]:
    model = _model(256, 8, 1).model_copy(update={"router": RouterSpec(groups=8, topk_groups=4)})
    cluster = load_cluster(f"{ranks // 8}x8:h100,nic=8x400Gb/s")
    counts = make_traffic(load, model, ranks, _TOKENS, 0)
    problem = _problem(cluster, model, with_sets(counts, model, 0), per_gpu, "node-dedup")
    problem = replace(problem, keep_groups=whole)
    others = [replace(problem, sets=with_sets(counts, model, 1 + n).sets) for n in range(_DRAWS)]
    return _with_copies(problem, others, _REPLICAS)


def _with_copies(problem: Problem, judges: list[Problem], extra: int) -> dict[str, object]:
    """Plan with replicas, without, and with those for choices that travel by themselves."""
    both = replace(problem, replication=Replication(extra=extra))
    by_choice = replace(both, sets=None, transfer="per-choice", keep_groups=False)
    found, plan = _solved_shares(both, _COPIES_LIMIT_S)
    others = {
        "without": _solved_shares(problem, _COPIES_LIMIT_S)[1],
        "by_choice": _solved_shares(by_choice, _COPIES_LIMIT_S)[1],
    }
    ratios = {
        f"{name}_over_plan{said}": float(
            np.mean([_price(judge, shares) / _price(judge, plan) for judge in with_tokens])
        )
        for name, shares in others.items()
        for said, with_tokens in (("", [problem]), ("_judged", judges))
    }
    copies = [np.count_nonzero(layer) - len(layer) for layer in plan]
    return {**found, "replicas_used": float(np.mean(copies)), **ratios}


def _price(problem: Problem, shares: list[Shares]) -> float:
    return sum(evaluate_layer(problem, n, layer).seconds for n, layer in enumerate(shares))


def _model(experts: int, top_k: int, layers: int) -> ModelSpec:
    """Return experts of DeepSeek-V3's width."""
    return ModelSpec(
        name="benchmark",
        hidden_size=7168,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=2048,
        attention=AttentionSpec(num_heads=16, num_kv_heads=16, head_dim=128),
        weight_bytes=1,
    )


if __name__ == "__main__":
    main()
