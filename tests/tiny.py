"""Tiny clusters, models and problems whose optimum can be found by trying everything."""

from itertools import product

import numpy as np

from epplan.planner.assemble import assemble_plan
from epplan.planner.cost import Placement, evaluate_layer, one_copy
from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.planner.objective import Objective
from epplan.planner.plan import Plan
from epplan.planner.problem import Problem, Replication, make_problem
from epplan.planner.solve import solve_placement
from epplan.planner.traffic import Floats, Traffic
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.graph import Cluster


def tiny_cluster(
    gpus: tuple[int, ...] = (2, 2),
    *,
    models: tuple[str, ...] = ("h100-sxm",),
    nics: int = 1,
    nic_rate: str = "400Gb/s",
    leafs: int = 1,
    uplinks: int = 1,
    links: int | None = None,
) -> Cluster:
    """Return hosts of `gpus[i]` GPUs each; host i hangs on leaf i mod leafs under one spine."""
    document = {
        "schema_version": 1,
        "name": "tiny",
        "host_types": {
            f"t{index}": {
                "gpu": models[index % len(models)],
                "gpus": count,
                "nic": "connectx-7",
                "nics": nics,
                "nic_rate": nic_rate,
                **({} if links is None else {"links": links}),
            }
            for index, count in enumerate(gpus)
        },
        "hosts": [
            {"names": f"h{index}", "type": f"t{index}", "leafs": [f"leaf{index % leafs}"]}
            for index in range(len(gpus))
        ],
        "switches": [
            *(
                {
                    "names": f"leaf{leaf}",
                    "uplinks": [{"to": "spine", "count": uplinks, "rate": "400Gb/s"}],
                }
                for leaf in range(leafs)
            ),
            {"names": "spine"},
        ],
    }
    return read_cluster_file(document, "tiny").build("0" * 64)


def tiny_model(experts: int = 4, *, layers: int = 1, top_k: int = 1, ffn: int = 64) -> ModelSpec:
    """Return a model small enough that transfers, not matrix products, set its time."""
    return ModelSpec(
        name="tiny",
        hidden_size=1024,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=ffn,
        attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8),
        weight_bytes=2,
    )


def tiny_problem(
    counts: Floats,
    *,
    cluster: Cluster | None = None,
    experts_per_gpu: int = 1,
    ffn: int = 64,
    objective: Objective | None = None,
    replication: Replication | None = None,
) -> Problem:
    """Return the problem for `counts` [windows, layers, ranks, experts] on all of a cluster.

    Without the first axis, one window.
    """
    cluster = cluster or tiny_cluster()
    layers, _, experts = counts.shape[-3:]
    model = tiny_model(experts, layers=layers, ffn=ffn)
    gpus = tuple(cluster.gpus())
    return make_problem(
        cluster, gpus, model, tiny_traffic(counts), experts_per_gpu, objective, replication
    )


def tiny_traffic(counts: Floats) -> Traffic:
    """Return traffic with `counts` [windows, layers, ranks, experts]; without windows, one."""
    layers, ranks, experts = counts.shape[-3:]
    counts = counts.reshape(-1, layers, ranks, experts)
    return Traffic(
        counts=counts,
        source="test",
        sha256="0" * 64,
        windows=len(counts),
        source_ranks=ranks,
        tokens_per_rank=max(1, round(counts[0].sum() / (layers * ranks))),
    )


def tiny_plan() -> Plan:
    """Return a solved plan: 2 layers of 4 experts on 2 hosts of 2 GPUs."""
    cluster, counts = tiny_cluster(), random_counts(0, 2, 4, 4)
    problem = tiny_problem(counts, cluster=cluster)
    return assemble_plan(
        cluster=cluster,
        problem=problem,
        traffic=tiny_traffic(counts),
        solution=solve_placement(
            problem, gap=0, time_limit_s=60, seed=0, progress=lambda line: None
        ),
        topology_source="tiny",
        model_source="tiny",
        seed=0,
        command="epplan solve",
        reasons=["tiny"],
    )


def random_counts(seed: int, layers: int, ranks: int, experts: int, skew: float = 1.0) -> Floats:
    """Return lognormal counts with a different mix on every rank."""
    random = np.random.default_rng(seed)
    return np.ceil(random.lognormal(8.0, skew, (layers, ranks, experts)))


def all_placements(problem: Problem) -> list[Placement]:
    """Return every placement of one layer that keeps `experts_per_gpu`."""
    experts, ranks = problem.model.num_experts, problem.num_ranks
    return [
        np.array(choice, dtype=np.intp)
        for choice in product(range(ranks), repeat=experts)
        if max(choice.count(rank) for rank in range(ranks)) <= problem.experts_per_gpu
    ]


def price(problem: Problem, placement: Placement, layer: int = 0) -> float:
    """Return what the evaluator says of one copy of each expert."""
    return evaluate_layer(problem, layer, one_copy(placement, problem.num_ranks)).seconds


def brute_force(problem: Problem, layer: int = 0) -> float:
    """Return the smallest cost of any placement of one layer, by trying all."""
    return min(price(problem, placement, layer) for placement in all_placements(problem))
