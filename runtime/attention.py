"""Causal attention over whole sequences: grouped-query, and DeepSeek's multi-head latent form.

Shapes: B sequences, S positions, H hidden size, Q query heads, G key and value heads (G divides
Q), D width of a head, V width of a value head, N and R width of the unrotated and rotated part of
a latent query or key head (D = N + R), C rank of the key and value latent.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from epplan.planner.model import AttentionSpec

_NORM_EPSILON = 1e-6


def attention_shapes(spec: AttentionSpec, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return the projections of one layer: name to [out, in]."""
    if spec.kind == "gqa":
        return {
            "query": (spec.num_heads * spec.head_dim, hidden_size),
            "key": (spec.num_kv_heads * spec.head_dim, hidden_size),
            "value": (spec.num_kv_heads * spec.head_dim, hidden_size),
            "output": (hidden_size, spec.num_heads * spec.head_dim),
        }
    query_size = spec.num_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
    expanded_size = spec.num_heads * (spec.qk_nope_head_dim + spec.head_dim)
    query: dict[str, tuple[int, int]] = {"query": (query_size, hidden_size)}
    if spec.q_lora_rank:
        query = {
            "query_down": (spec.q_lora_rank, hidden_size),
            "query": (query_size, spec.q_lora_rank),
        }
    return {
        **query,
        "latent": (spec.kv_lora_rank + spec.qk_rope_head_dim, hidden_size),
        "expand": (expanded_size, spec.kv_lora_rank),
        "output": (hidden_size, spec.num_heads * spec.head_dim),
    }


def attention(x_BSH: Tensor, weights: Mapping[str, Tensor], spec: AttentionSpec) -> Tensor:
    """Return the attention output, [B, S, H].

    Args:
        x_BSH: normalised hidden states.
        weights: projections, named and shaped as `attention_shapes` says.
    """
    projections = _grouped_query if spec.kind == "gqa" else _latent
    query_BQSD, key_BGSD, value_BGSV = projections(x_BSH, weights, spec)
    out_BQSV = F.scaled_dot_product_attention(
        query_BQSD,
        key_BGSD,
        value_BGSV,
        is_causal=True,
        enable_gqa=key_BGSD.shape[1] != query_BQSD.shape[1],
    )
    return F.linear(out_BQSV.transpose(1, 2).flatten(2), weights["output"])


def rms_norm(x: Tensor) -> Tensor:
    """Return x scaled to unit RMS over its last dimension (gains are 1 in seeded weights)."""
    return F.rms_norm(x, x.shape[-1:], eps=_NORM_EPSILON)


def _grouped_query(
    x_BSH: Tensor, weights: Mapping[str, Tensor], spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    query_BQSD = _heads(F.linear(x_BSH, weights["query"]), spec.num_heads)
    key_BGSD = _heads(F.linear(x_BSH, weights["key"]), spec.num_kv_heads)
    value_BGSD = _heads(F.linear(x_BSH, weights["value"]), spec.num_kv_heads)
    if spec.qk_norm:
        query_BQSD, key_BGSD = rms_norm(query_BQSD), rms_norm(key_BGSD)
    if spec.rope_theta is not None:
        query_BQSD = _rotate(query_BQSD, spec.rope_theta)
        key_BGSD = _rotate(key_BGSD, spec.rope_theta)
    return query_BQSD, key_BGSD, value_BGSD


def _latent(
    x_BSH: Tensor, weights: Mapping[str, Tensor], spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    down_BSH = x_BSH
    if "query_down" in weights:
        down_BSH = rms_norm(F.linear(x_BSH, weights["query_down"]))
    query_BQSD = _heads(F.linear(down_BSH, weights["query"]), spec.num_heads)
    latent_BSC, key_rope_BSR = torch.split(
        F.linear(x_BSH, weights["latent"]), [spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1
    )
    expanded_BQS = _heads(F.linear(rms_norm(latent_BSC), weights["expand"]), spec.num_heads)
    key_BQSN, value_BQSV = torch.split(expanded_BQS, [spec.qk_nope_head_dim, spec.head_dim], dim=-1)
    query_BQSN, query_BQSR = torch.split(
        query_BQSD, [spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1
    )
    key_B1SR = key_rope_BSR.unsqueeze(1)
    if spec.rope_theta is not None:
        query_BQSR = _rotate(query_BQSR, spec.rope_theta)
        key_B1SR = _rotate(key_B1SR, spec.rope_theta)
    # One rotated key part is shared by all heads.
    key_BQSR = key_B1SR.expand(-1, spec.num_heads, -1, -1)
    query_BQSD = torch.cat([query_BQSN, query_BQSR], dim=-1)
    return query_BQSD, torch.cat([key_BQSN, key_BQSR], dim=-1), value_BQSV


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, S, heads x D] as [B, heads, S, D]."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Return heads [..., S, D] with rotary position encoding.

    Element i is paired with i + D / 2; pairing neighbours instead is the same model with the rows
    of its projections in another order. Angles are float32: half precision cannot count positions.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    position = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angle = torch.outer(position, theta**-exponent)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)
