"""Causal attention: grouped-query, and DeepSeek's multi-head latent form; with or without a cache.

Shapes: B sequences, S positions of this step, T positions with those in the cache, H hidden size,
Q query heads, G key and value heads (G divides Q), D width of a head, V width of a value head, N
and R width of the unrotated and rotated part of a latent query or key head (D = N + R), C rank of
the key and value latent, E = C + R.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epplan.planner.model import AttentionSpec, ModelSpec

from .adjacent import adjacent
from .attend import attend, attend_cached
from .kv_cache import KvCache
from .linear import linear
from .norm import LATENT_EPSILON, rms_norm
from .rope import Rotation, make_rotation, normalise_and_rotate, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """What the attention of all layers of one step shares."""

    rotation: Rotation | None
    cache: KvCache | None  # None: the sequences end with this step
    epsilon: float  # of the norms of query and key heads


def attention_step(spec: ModelSpec, x_BSH: Tensor, cache: KvCache | None = None) -> AttentionStep:
    """Return the step that runs `x_BSH`, whose positions follow those in the cache."""
    first = 0 if cache is None else cache.length
    rotation = None
    if spec.attention.rope_theta is not None:
        position_S = torch.arange(first, first + x_BSH.shape[1], device=x_BSH.device)
        rotation = make_rotation(spec.attention, position_S)
    return AttentionStep(rotation=rotation, cache=cache, epsilon=spec.norm_epsilon)


def attention_shapes(spec: AttentionSpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer: projections [out, in], their biases, gains, sinks."""
    shapes = _grouped_shapes if spec.kind == "gqa" else _latent_shapes
    sinks: dict[str, tuple[int, ...]] = {"sinks": (spec.num_heads,)} if spec.sinks else {}
    return {**shapes(spec, hidden_size), **sinks}


def attention(
    x_BSH: Tensor,
    weights: Mapping[str, Tensor],
    spec: AttentionSpec,
    step: AttentionStep,
    layer: int,
) -> Tensor:
    """Return the attention output, [B, S, H].

    Args:
        x_BSH: normalised hidden states.
        weights: named and shaped as `attention_shapes` says; gains may be missing, and are 1.
        spec: the model's attention.
        step: from `attention_step`.
        layer: absolute number; its keys and values are added to the cache.
    """
    heads = _grouped_query if spec.kind == "gqa" else _latent
    out_BSO = heads(x_BSH, weights, spec, step, layer).transpose(1, 2).flatten(2)
    return _project(out_BSO, weights, "output")


def _grouped_query(
    x_BSH: Tensor,
    weights: Mapping[str, Tensor],
    spec: AttentionSpec,
    step: AttentionStep,
    layer: int,
) -> Tensor:
    """Return the heads' outputs, [B, Q, S, D]."""
    query_BSO, key_BSO, value_BSO = _project_together(x_BSH, weights, ("query", "key", "value"))
    epsilon = step.epsilon if spec.qk_norm else None
    query_BQSD = _heads(query_BSO, spec.num_heads)
    key_BGSD = _heads(key_BSO, spec.num_kv_heads)
    return attend_cached(
        normalise_and_rotate(query_BQSD, weights.get("query_norm"), epsilon, step.rotation),
        normalise_and_rotate(key_BGSD, weights.get("key_norm"), epsilon, step.rotation),
        _heads(value_BSO, spec.num_kv_heads),
        step.cache,
        layer,
        scale=_scale(spec, spec.head_dim),
        window=spec.window_of(layer),
        sinks_Q=weights.get("sinks"),
    )


def _latent(
    x_BSH: Tensor,
    weights: Mapping[str, Tensor],
    spec: AttentionSpec,
    step: AttentionStep,
    layer: int,
) -> Tensor:
    """Return the heads' outputs, [B, Q, S, V].

    The cache holds the latents, C + R elements a position, not the heads made from them. For many
    queries the heads of all T positions are made. A single query is brought into the latent space
    instead, where all heads share one key: that takes 1 / C of the multiplications.
    """
    query_BQSN, query_BQSR = _latent_query(x_BSH, weights, spec, step)
    latent_BSC, key_rope_BSR = torch.split(
        _project(x_BSH, weights, "latent"), [spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1
    )
    latent_BSC = rms_norm(latent_BSC, weights.get("latent_norm"), LATENT_EPSILON)
    entry_BSE = torch.cat([latent_BSC, rotate(key_rope_BSR, step.rotation)], dim=-1)
    entry_B1TE = entry_BSE.unsqueeze(1)
    if step.cache is not None:
        no_value = entry_B1TE[..., :0]  # the value is part of the key
        entry_B1TE, _ = step.cache.update(layer, entry_B1TE, no_value)
    expand_QOC = torch.unflatten(weights["expand"], 0, (spec.num_heads, -1))
    through = _attend_latents if x_BSH.shape[1] == 1 else _attend_heads
    return through(query_BQSN, query_BQSR, entry_B1TE, expand_QOC, spec, layer)


def _latent_query(
    x_BSH: Tensor, weights: Mapping[str, Tensor], spec: AttentionSpec, step: AttentionStep
) -> tuple[Tensor, Tensor]:
    down_BSX = x_BSH
    if spec.q_lora_rank:
        down_BSX = _project(x_BSH, weights, "query_down")
        down_BSX = rms_norm(down_BSX, weights.get("query_down_norm"), LATENT_EPSILON)
    query_BQSD = _heads(_project(down_BSX, weights, "query"), spec.num_heads)
    query_BQSN, query_BQSR = torch.split(
        query_BQSD, [spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1
    )
    return query_BQSN, rotate(query_BQSR, step.rotation)


def _attend_latents(
    query_BQSN: Tensor,
    query_BQSR: Tensor,
    entry_B1TE: Tensor,
    expand_QOC: Tensor,
    spec: AttentionSpec,
    layer: int,
) -> Tensor:
    expand_QNC, expand_QVC = torch.split(expand_QOC, [spec.qk_nope_head_dim, spec.head_dim], dim=1)
    out_BQSC = attend(
        torch.cat([query_BQSN @ expand_QNC, query_BQSR], dim=-1),
        entry_B1TE,
        entry_B1TE[..., : spec.kv_lora_rank],
        scale=_scale(spec, spec.qk_nope_head_dim + spec.qk_rope_head_dim),
        window=spec.window_of(layer),
    )
    return out_BQSC @ expand_QVC.transpose(1, 2)


def _attend_heads(
    query_BQSN: Tensor,
    query_BQSR: Tensor,
    entry_B1TE: Tensor,
    expand_QOC: Tensor,
    spec: AttentionSpec,
    layer: int,
) -> Tensor:
    latent_B1TC, key_B1TR = torch.split(
        entry_B1TE, [spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1
    )
    expanded_BQTO = _heads(
        F.linear(latent_B1TC.squeeze(1), expand_QOC.flatten(0, 1)), spec.num_heads
    )
    key_BQTN, value_BQTV = torch.split(
        expanded_BQTO, [spec.qk_nope_head_dim, spec.head_dim], dim=-1
    )
    # One rotated key part is shared by all heads.
    key_BQTD = torch.cat([key_BQTN, key_B1TR.expand(-1, spec.num_heads, -1, -1)], dim=-1)
    return attend(
        torch.cat([query_BQSN, query_BQSR], dim=-1),
        key_BQTD,
        value_BQTV,
        scale=_scale(spec, key_BQTD.shape[-1]),
        window=spec.window_of(layer),
    )


def _scale(spec: AttentionSpec, width: int) -> float:
    return spec.score_factor / math.sqrt(width)


def _project(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return linear(x, weights[name], weights.get(f"{name}.bias"))


def _project_together(
    x: Tensor, weights: Mapping[str, Tensor], names: Sequence[str]
) -> Sequence[Tensor]:
    """Return several projections; in one product where `join_projections` made that possible."""
    has_bias = any(f"{name}.bias" in weights for name in names)
    joined = None if has_bias else adjacent([weights[name] for name in names])
    if joined is None:
        return [_project(x, weights, name) for name in names]
    return torch.split(linear(x, joined), [weights[name].shape[0] for name in names], dim=-1)


def join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors with query, key and value one after the other in memory."""
    names = ("query", "key", "value")
    if not all(name in weights for name in names):
        return weights
    joined = torch.cat([weights[name] for name in names])
    parts = torch.split(joined, [weights[name].shape[0] for name in names])
    return {**weights, **dict(zip(names, parts, strict=True))}


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, S, heads x D] as [B, heads, S, D]."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def _grouped_shapes(spec: AttentionSpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query": (query_size, hidden_size),
        "key": (kv_size, hidden_size),
        "value": (kv_size, hidden_size),
        "output": (hidden_size, query_size),
    }
    if spec.qkv_bias:
        shapes |= {f"{name}.bias": shapes[name][:1] for name in ("query", "key", "value")}
    if spec.output_bias:
        shapes["output.bias"] = (hidden_size,)
    if spec.qk_norm:
        shapes |= {"query_norm": (spec.head_dim,), "key_norm": (spec.head_dim,)}
    return shapes


def _latent_shapes(spec: AttentionSpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    query_size = spec.num_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
    expanded_size = spec.num_heads * (spec.qk_nope_head_dim + spec.head_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (query_size, spec.q_lora_rank or hidden_size),
        "latent": (spec.kv_lora_rank + spec.qk_rope_head_dim, hidden_size),
        "latent_norm": (spec.kv_lora_rank,),
        "expand": (expanded_size, spec.kv_lora_rank),
        "output": (hidden_size, spec.num_heads * spec.head_dim),
    }
    if spec.q_lora_rank:
        shapes["query_down"] = (spec.q_lora_rank, hidden_size)
        shapes["query_down_norm"] = (spec.q_lora_rank,)
    if spec.qkv_bias:
        reducing = ("query_down", "latent") if spec.q_lora_rank else ("latent",)
        shapes |= {f"{name}.bias": shapes[name][:1] for name in reducing}
    if spec.output_bias:
        shapes["output.bias"] = (hidden_size,)
    return shapes
