"""Plans made by hand, without a solver: valid, with costs of nothing."""

from collections.abc import Sequence

from epplan.planner.model import ModelSpec
from epplan.planner.plan import (
    Certificate,
    Inputs,
    LayerCost,
    Plan,
    Rank,
    RankMemory,
    Source,
    Workload,
    plan_problems,
)


def bare_plan(
    model: ModelSpec,
    gpus: Sequence[tuple[str, int]],
    expert_of_slot: Sequence[Sequence[int | None]],
    share_of_slot: Sequence[Sequence[float]] | None = None,
    *,
    hosts_an_island: int = 1,
) -> Plan:
    """Return a plan for these GPUs.

    Args:
        model: the model.
        gpus: host and GPU of each rank.
        expert_of_slot: by MoE layer and slot.
        share_of_slot: the same, for plans with replicas.
        hosts_an_island: joined by NVLink.
    """
    hosts = list(dict.fromkeys(host for host, _ in gpus))
    source = Source(source="test", sha256="0" * 64)
    plan = Plan(
        epplan_version="0.1.0",
        command="epplan solve",
        inputs=Inputs(topology=source, model=source, traffic=source, seed=0),
        model=model,
        workload=Workload(tokens_per_rank=1, source_ranks=1, windows=1),
        ranks=tuple(
            Rank(
                rank=rank,
                host=host,
                island=hosts.index(host) // hosts_an_island,
                gpu_index=gpu,
                gpu_model="none",
                memory_bytes=1,
            )
            for rank, (host, gpu) in enumerate(gpus)
        ),
        slots_per_rank=len(expert_of_slot[0]) // len(gpus),
        expert_of_slot=tuple(map(tuple, expert_of_slot)),
        share_of_slot=None if share_of_slot is None else tuple(map(tuple, share_of_slot)),
        cost=tuple(
            LayerCost(
                layer=layer,
                dispatch_s=0,
                compute_s=0,
                combine_s=0,
                total_s=0,
                bound_s=0,
                binding="",
                verdict="",
            )
            for layer in model.moe_layers
        ),
        memory=tuple(
            RankMemory(rank=rank, experts=0, replicated=0, kv_cache=0, buffers=0, capacity=1)
            for rank in range(len(gpus))
        ),
        certificate=Certificate(
            status="feasible",
            objective_s=0,
            bound_s=0,
            gap=0,
            seconds=0,
            binding="",
            contiguous_s=0,
            solver="none",
            scope="none",
        ),
    )
    assert not plan_problems(plan)
    return plan
