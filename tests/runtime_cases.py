"""Tiny models of every supported kind, and plans that place their experts at random."""

import random

from epplan.planner.model import AttentionSpec, ModelSpec, RouterSpec
from epplan.planner.plan import Plan
from tests.plans import bare_plan

REFERENCE = ModelSpec(
    name="reference-tiny",
    hidden_size=32,
    num_layers=4,
    moe_layers=(0, 1, 2, 3),
    num_experts=16,
    top_k=1,
    expert_ffn_size=64,
    gated=False,
    attention=AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=8),
    router=RouterSpec(renormalize=False),
    dtype="float16",
    weight_bytes=2,
)
MIXTRAL = ModelSpec(
    name="mixtral-tiny",
    hidden_size=32,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=8,
    top_k=2,
    expert_ffn_size=48,
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e6),
    weight_bytes=2,
)
QWEN = ModelSpec(
    name="qwen-tiny",
    hidden_size=32,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=16,
    top_k=8,
    expert_ffn_size=24,
    attention=AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, rope_theta=1e6, qk_norm=True),
    weight_bytes=2,
)
DEEPSEEK = ModelSpec(
    name="deepseek-tiny",
    hidden_size=32,
    num_layers=3,
    moe_layers=(1, 2),
    num_experts=32,
    top_k=4,
    expert_ffn_size=24,
    shared_ffn_size=40,
    dense_ffn_size=56,
    attention=AttentionSpec(
        kind="mla",
        num_heads=4,
        num_kv_heads=4,
        head_dim=6,
        rope_theta=1e4,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
    ),
    router=RouterSpec(score="sigmoid", scale=2.5, groups=8, topk_groups=4, correction_bias=True),
    weight_bytes=1,
)


def make_plan(
    model: ModelSpec,
    num_ranks: int,
    *,
    slots_per_rank: int = 1,
    num_hosts: int = 2,
    hosts_an_island: int = 1,
    copies: int = 0,
    seed: int = 0,
) -> Plan:
    """Return a plan with every layer's experts in random slots.

    `copies` more slots of a layer hold second and further copies of random experts, with random
    shares.
    """
    generator = random.Random(seed)
    num_slots = num_ranks * slots_per_rank
    gpus = [(f"node{rank * num_hosts // num_ranks}", rank) for rank in range(num_ranks)]
    layers = []
    for _ in model.moe_layers:
        experts = [*range(model.num_experts), *[None] * (num_slots - model.num_experts)]
        slots = generator.sample(experts, num_slots)
        _add_copies(slots, slots_per_rank, copies, generator)
        layers.append(slots)
    shares = [_random_shares(slots, generator) for slots in layers] if copies else None
    return bare_plan(model, gpus, layers, shares, hosts_an_island=hosts_an_island)


def _add_copies(
    slots: list[int | None], slots_per_rank: int, copies: int, generator: random.Random
) -> None:
    """Fill empty slots with experts their ranks have not."""
    empty = [slot for slot, expert in enumerate(slots) if expert is None]
    for slot in generator.sample(empty, copies):
        first = slot // slots_per_rank * slots_per_rank
        own = slots[first : first + slots_per_rank]
        slots[slot] = generator.choice(sorted({x for x in slots if x is not None} - set(own)))


def _random_shares(slots: list[int | None], generator: random.Random) -> list[float]:
    parts = [0.0 if expert is None else generator.random() for expert in slots]
    totals: dict[int | None, float] = {}
    for expert, part in zip(slots, parts, strict=True):
        totals[expert] = totals.get(expert, 0.0) + part
    return [
        part / totals[expert] if part else 0.0 for expert, part in zip(slots, parts, strict=True)
    ]
