"""Small valid plans, for tests that start ranks."""

from pathlib import Path

from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.planner.plan import Plan, write_plan
from tests.plans import bare_plan


def make_plan(hosts: dict[str, list[int]]) -> Plan:
    """Return a plan with one expert per rank.

    Args:
        hosts: the GPUs used on each host, in rank order.
    """
    places = [(host, gpu) for host, gpus in hosts.items() for gpu in gpus]
    return bare_plan(_model(len(places)), places, [list(reversed(range(len(places))))])


def uneven_plan() -> Plan:
    """Return a plan over hosts of different sizes, in an order that sorting would lose."""
    plan = make_plan({"node10": [1, 0, 2], "node2": [3]})
    ranks = [
        rank.model_copy(
            update={
                "gpu_model": "h100-sxm",
                "gpu_uuid": f"GPU-0000000{rank.rank}-aaaa-bbbb-cccc-000000000000",
                "numa": rank.gpu_index // 2,
            }
        )
        for rank in plan.ranks
    ]
    return plan.model_copy(update={"ranks": tuple(ranks)})


def even_plan() -> Plan:
    """Return a plan over two equal hosts, without UUIDs."""
    plan = make_plan({"b": [1, 0], "a": [0, 1]})
    ranks = [rank.model_copy(update={"numa": rank.gpu_index}) for rank in plan.ranks]
    return plan.model_copy(update={"ranks": tuple(ranks)})


def write_ranks_plan(path: Path, num_ranks: int) -> Path:
    """Write the plan of `num_ranks` ranks on one host to `path`, and return the path."""
    write_plan(path, make_plan({"a": list(range(num_ranks))}))
    return path


def _model(num_experts: int) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        hidden_size=16,
        num_layers=1,
        moe_layers=(0,),
        num_experts=num_experts,
        top_k=1,
        expert_ffn_size=32,
        attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8),
        dtype="float32",
        weight_bytes=4,
    )
