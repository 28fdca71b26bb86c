"""How much a step of the model computes and reads, counted from the model spec.

Multiplications of matrices only: what is left out (norms, softmax, router) is below 1 %.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from epplan.planner.model import ModelSpec


def step_flops(spec: ModelSpec, sequences: int, positions: int, context: int) -> int:
    """Return the floating-point operations of one step over all ranks; a multiply-add is two.

    Args:
        spec: the model.
        sequences: of all ranks.
        positions: new ones of each sequence.
        context: positions before them.
    """
    attention = spec.attention
    query_dim = attention.head_dim
    if attention.kind == "mla":
        query_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    # Each new position sees the context and, of the new ones, half of them and itself.
    pairs = positions * context + positions * (positions + 1) // 2
    scores = 2 * attention.num_heads * (query_dim + attention.head_dim) * pairs
    projections = 2 * attention.parameters(spec.hidden_size) * positions
    shared = 2 * 3 * spec.hidden_size * spec.shared_ffn_size
    moe = spec.top_k * spec.expert_flops_per_row + shared
    dense = 2 * 3 * spec.hidden_size * spec.dense_ffn_size
    dense_layers = spec.num_layers - spec.num_moe_layers
    mlps = (spec.num_moe_layers * moe + dense_layers * dense) * positions
    return sequences * (spec.num_layers * (scores + projections) + mlps)


def cache_bytes(spec: ModelSpec, sequences: int, context: int) -> int:
    """Return the keys and values of `context` positions of `sequences`, over all layers."""
    return sequences * context * spec.kv_bytes_per_token


def tensor_bytes(value: Any) -> int:
    """Return the memory of all tensors in dataclasses, lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
