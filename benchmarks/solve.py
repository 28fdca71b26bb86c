"""How fast a placement is proven good, by cluster size; and what it is worth on a recorded trace.

    python benchmarks/solve.py [--traces counts.npz] [--only plain-64]

One JSON line a case: objective, bound, gap, seconds of one layer (routes and rows included), ratio
to experts in id order. Sources are skewed: lognormal popularity (sigma 1) times lognormal affinity
of every source rank. `mixed` clusters hold half H100 hosts with a NIC a GPU, half H200 hosts with 4
NICs for 8 GPUs, one host of half its NVLinks and NICs of half their speed, and leafs oversubscribed
2:1 and more; in `one-nic` ones the 8 GPUs of a host share one. `choice-1024` chooses 256 of 1,024
GPUs: 8 leafs oversubscribed 4:1, under each 8 H100 hosts with a NIC a GPU, 7 H200 hosts with 4 NICs
and a degraded one; its gap is to any choice of 256 GPUs, and `first_over_choice` what the first 256
in cluster order would take. `replicas-*` put 256 experts into 288 slots, one layer or 58 of them.
The trace is `counts` [iterations,
sources, layers, experts] with `iters`, here 16 sources on 4 hosts of 8 GPUs and 32 experts, one per
GPU; judged by the worst host's rows in or out.
"""

import json
import os
import resource
import time
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from epplan.planner.groups.group import choose_groups
from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.planner.problem import Replication, make_problem
from epplan.planner.solve import Solution, solve_placement
from epplan.planner.traffic import Floats, Traffic, make_traffic
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.graph import Cluster, Gpu

CASES = [
    ("plain", 16, 0.005, 1),
    ("plain", 64, 0.005, 3),
    ("plain", 128, 0.005, 5),
    ("plain", 256, 0.005, 15),
    ("mixed", 16, 0.01, 2),
    ("mixed", 64, 0.01, 6),
    ("mixed", 128, 0.01, 10),
    ("mixed", 256, 0.01, 30),
    ("one-nic", 64, 0.005, 3),
    ("one-nic", 128, 0.005, 5),
    ("one-nic", 256, 0.005, 15),
]
REPLICA_GPUS, REPLICA_SLOTS = (32, 64, 72), 288
REPLICA_LOADS = ("lognormal:1", "zipf:1", "lognormal:1,0.5")
REPLICA_LAYERS, REPLICA_GOAL_S, REPLICA_LAYERS_GOAL_S = 58, 10, 180
CHOICE = ("choice-1024", 256, 0.05, 60)
JUDGED_LATER = (0, 10, 100, 500)  # iterations after the plan
_PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
_HOST_TYPES = {
    "own": {"gpu": "h100-sxm", "gpus": 8, "nic": "connectx-7", "nics": 8},
    "one": {"gpu": "h100-sxm", "gpus": 8, "nic": "connectx-7", "nics": 1},
    "shared": {"gpu": "h200-sxm", "gpus": 8, "nic": "connectx-7", "nics": 4},
    "degraded": {
        **{"gpu": "h100-sxm", "gpus": 8, "nic": "connectx-7", "nics": 8},
        **{"links": 9, "nic_rate": "200Gb/s"},
    },
}


@click.command()
@click.option("--traces", type=click.Path(path_type=Path, exists=True), help="Recorded counts.")
@click.option("--only", help="One case, such as mixed-128.")
@click.option("--skew", default=0.5, show_default=True, help="Sigma of the sources' affinity.")
def main(traces: Path | None, only: str | None, skew: float) -> None:
    """Run the cases and print."""
    for kind, ranks, gap, goal_s in CASES:
        if only in (None, f"{kind}-{ranks}"):
            _print({"case": f"{kind}-{ranks}", **_case(kind, ranks, gap, goal_s, skew)})
    for gpus in REPLICA_GPUS:
        for load in REPLICA_LOADS:
            if only in (None, case := f"replicas-{gpus}-{load}"):
                _print({"case": case, **_replicas(gpus, load, 1, REPLICA_GOAL_S)})
        if only in (None, case := f"replicas-{gpus}-{REPLICA_LAYERS}-layers"):
            goal_s = REPLICA_LAYERS_GOAL_S
            _print({"case": case, **_replicas(gpus, REPLICA_LOADS[-1], REPLICA_LAYERS, goal_s)})
    if only in (None, CHOICE[0]):
        _print({"case": CHOICE[0], **_choice(*CHOICE[1:], skew)})
    if traces is None:
        click.echo("no --traces given: the recorded trace is not run", err=True)
    elif only is None:
        _trace(traces)


def _print(line: dict[str, object]) -> None:
    click.echo(json.dumps({**line, "cores": os.cpu_count()}))


def _case(kind: str, ranks: int, gap: float, goal_s: float, skew: float) -> dict[str, object]:
    model, cluster = _model(ranks, top_k=8), _cluster(kind, ranks // 8)
    traffic = make_traffic(f"lognormal:1,{skew}", model, ranks, 4096, 0)
    began = time.monotonic()
    solution = _solve(cluster, model, traffic, gap, 4 * goal_s)
    return {
        "status": solution.status,
        "objective_s": solution.objective_s,
        "bound_s": solution.bound_s,
        "gap": solution.gap,
        "gap_goal": gap,
        "seconds": time.monotonic() - began,
        "seconds_goal": goal_s,
        "contiguous_over_plan": solution.layers[0].contiguous_s / solution.objective_s,
        "found_by": solution.layers[0].found_by,
    }


def _replicas(gpus: int, load: str, layers: int, goal_s: float) -> dict[str, object]:
    """Solve 256 experts in 288 slots on hosts of 8 with a NIC a GPU; the goal is the limit."""
    model, cluster = _model(256, top_k=8, layers=layers), _cluster("plain", gpus // 8)
    traffic = make_traffic(load, model, gpus, 4096, 0)
    replication = Replication(extra=REPLICA_SLOTS - model.num_experts)
    began = time.monotonic()
    problem = make_problem(
        cluster,
        tuple(cluster.gpus()),
        model,
        traffic,
        -(-REPLICA_SLOTS // gpus),
        replication=replication,
    )
    solution = solve_placement(
        problem, gap=0.01, time_limit_s=goal_s, seed=0, progress=lambda line: None
    )
    return {
        "status": solution.status,
        "objective_s": solution.objective_s,
        "bound_s": solution.bound_s,
        "gap": solution.gap,
        "gap_goal": 0.01,
        "worst_layer_gap": max(
            1 - layer.bound_s / layer.evaluation.seconds for layer in solution.layers
        ),
        "seconds": time.monotonic() - began,
        "seconds_goal": goal_s,
        "found_by": solution.layers[0].found_by,
    }


def _choice(ranks: int, gap: float, goal_s: float, skew: float) -> dict[str, object]:
    model, cluster = _model(ranks, top_k=8), _choice_cluster()
    traffic = make_traffic(f"lognormal:1,{skew}", model, ranks, 4096, 0)
    began = time.monotonic()
    groups = choose_groups(cluster, model, traffic, 1)
    chosen_s = time.monotonic() - began
    solution = _solve_on(cluster, groups.gpus[0], model, traffic, gap / 5, goal_s)
    seconds = time.monotonic() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in _PROCESSES)
    first = _solve_on(cluster, tuple(cluster.gpus()[:ranks]), model, traffic, gap / 5, goal_s)
    assert groups.bound_s is not None
    return {
        "status": solution.status,
        "objective_s": solution.objective_s,
        "bound_s": groups.bound_s,
        "gap": 1 - groups.bound_s / solution.objective_s,
        "gap_goal": gap,
        "gap_on_chosen": solution.gap,
        "seconds": seconds,
        "seconds_choosing": chosen_s,
        "seconds_goal": goal_s,
        "peak_bytes": peak * 1024,  # Linux counts in KiB
        "peak_bytes_goal": 4 * 2**30,
        "first_over_choice": first.objective_s / solution.objective_s,
        "reason": groups.reason,
    }


def _choice_cluster() -> Cluster:
    leafs = range(1, 9)
    hosts = [
        {"names": f"{kind[0]}{leaf}[1-{number}]", "type": kind, "leafs": [f"leaf{leaf}"]}
        for leaf in leafs
        for kind, number in (("shared", 7), ("degraded", 1), ("own", 8))
    ]
    # 8 x 8 + 7 x 4 NICs of 400 Gb/s and 8 of 200 Gb/s under a leaf: 96, over 24 uplinks.
    uplinks = [{"to": "spine", "count": 24, "rate": "400Gb/s"}]
    document = {
        "schema_version": 1,
        "name": "choice",
        "host_types": _HOST_TYPES,
        "hosts": hosts,
        "switches": [{"names": "leaf[1-8]", "uplinks": uplinks}, {"names": "spine"}],
    }
    return read_cluster_file(document, "choice").build("")


def _solve(
    cluster: Cluster, model: ModelSpec, traffic: Traffic, gap: float, limit_s: float
) -> Solution:
    return _solve_on(cluster, tuple(cluster.gpus()), model, traffic, gap, limit_s)


def _solve_on(
    cluster: Cluster,
    gpus: tuple[Gpu, ...],
    model: ModelSpec,
    traffic: Traffic,
    gap: float,
    limit_s: float,
) -> Solution:
    problem = make_problem(cluster, gpus, model, traffic, 1)
    return solve_placement(
        problem, gap=gap, time_limit_s=limit_s, seed=0, progress=lambda line: None
    )


def _model(experts: int, *, top_k: int, layers: int = 1) -> ModelSpec:
    """Return experts of DeepSeek-V3's width: transfers and matrix products are both of weight."""
    return ModelSpec(
        name="benchmark",
        hidden_size=7168,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=min(top_k, experts // 2),
        expert_ffn_size=2048,
        attention=AttentionSpec(num_heads=16, num_kv_heads=16, head_dim=128),
        weight_bytes=1,
    )


def _cluster(kind: str, hosts: int) -> Cluster:
    if kind != "mixed":
        chosen = "own" if kind == "plain" else "one"
        groups = [{"names": f"a[1-{hosts}]", "type": chosen, "leafs": ["leaf1"]}]
        switches: list[dict[str, object]] = [{"names": "leaf1"}]
    else:
        half = hosts // 2
        groups = [{"names": f"a[1-{half}]", "type": "own", "leafs": ["leaf1"]}]
        if hosts > half + 1:
            groups.append(
                {"names": f"b[1-{hosts - half - 1}]", "type": "shared", "leafs": ["leaf2"]}
            )
        groups.append({"names": "c", "type": "degraded", "leafs": ["leaf2"]})
        uplinks = {"leaf1": 4 * half, "leaf2": 2 * half}
        switches = [
            {"names": leaf, "uplinks": [{"to": "spine", "count": count, "rate": "400Gb/s"}]}
            for leaf, count in uplinks.items()
        ]
        switches.append({"names": "spine"})
    document = {
        "schema_version": 1,
        "name": kind,
        "host_types": _HOST_TYPES,
        "hosts": groups,
        "switches": switches,
    }
    return read_cluster_file(document, kind).build("")


def _trace(path: Path) -> None:
    """Plan at iterations 1001 and 3001, judge there and later."""
    with np.load(path) as archive:
        counts, iterations = archive["counts"].astype(np.float64), archive["iters"].tolist()
    layers, experts = counts.shape[2:]
    model, cluster = _model(experts, top_k=2, layers=layers), _cluster("one-nic", 4)
    for planned in (1001, 3001):
        window = counts[iterations.index(planned)]  # [16 sources, layers, experts]
        traffic = Traffic(
            counts=_on_ranks(window)[None],
            source=path.name,
            sha256="",
            windows=1,
            source_ranks=32,
            tokens_per_rank=round(window.sum() / (layers * 32 * 2)),
        )
        began = time.monotonic()
        solution = _solve(cluster, model, traffic, 0.005, 120)
        hosts = np.array(
            [layer.shares.argmax(axis=1) // 8 for layer in solution.layers]
        )  # [layers, experts]
        later = {
            f"worst_host_over_contiguous_+{steps}": _ratio(
                counts[iterations.index(planned + steps)], hosts
            )
            for steps in JUDGED_LATER
        }
        _print(
            {
                "case": f"trace-{planned}",
                "gap": solution.gap,
                "status": solution.status,
                "seconds": time.monotonic() - began,
                **later,
            }
        )


def _on_ranks(window: Floats) -> Floats:
    """Put 16 sources on 32 GPUs, 4 on each of 4 hosts, [layers, 32, experts]."""
    counts = np.zeros((window.shape[1], 32, window.shape[2]))
    ranks = [8 * (source // 4) + source % 4 for source in range(16)]
    counts[:, ranks] = window.transpose(1, 0, 2)
    return counts


def _ratio(window: Floats, hosts: npt.NDArray[np.intp]) -> float:
    """Return the worst host's rows in or out over those of contiguous experts, mean over layers."""
    by_host = window.reshape(4, 4, *window.shape[1:]).sum(axis=1)  # [hosts, layers, experts]
    contiguous = np.arange(window.shape[2]) // 8
    ratios = [
        _worst(by_host[:, layer], hosts[layer]) / _worst(by_host[:, layer], contiguous)
        for layer in range(window.shape[1])
    ]
    return float(np.mean(ratios))


def _worst(sent: Floats, host_of_expert: npt.NDArray[np.intp]) -> float:
    """Return the most rows that enter or leave a host; sent [hosts, experts]."""
    own = np.array([sent[host, host_of_expert == host].sum() for host in range(4)])
    entering = np.array([sent[:, host_of_expert == host].sum() for host in range(4)]) - own
    return float(max(entering.max(), (sent.sum(axis=1) - own).max()))


if __name__ == "__main__":
    main()
