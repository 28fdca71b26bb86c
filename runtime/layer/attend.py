"""Causal softmax attention: the one place where scores are computed.

Shapes: B sequences, Q query heads, G key and value heads (G divides Q), S query positions, T key
positions (T >= S), D width of a query or key head, V width of a value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .kv_cache import KvCache
from .own_kernels import can_run_kernels, can_run_short_step_kernels

# torch's own kernels end at heads of 256; for 512 only its oldest remains, with a quarter of the
# speed of ours (docs/log.md).
_WIDE_HEAD = 512


def attend_cached(
    query_BQSD: Tensor,
    key_BGSD: Tensor,
    value_BGSV: Tensor,
    cache: KvCache | None,
    layer: int,
    *,
    scale: float | None,
    window: int | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """Add new positions to a layer's cache and return what they read from all, [B, Q, S, V].

    Args:
        query_BQSD: of the new positions, as are keys and values.
        key_BGSD: keys.
        value_BGSV: values.
        cache: None: the sequences begin and end with these positions.
        layer: absolute number.
        scale: as for `attend`, as are the others.
        window: likewise.
        sinks_Q: likewise.
    """
    if cache is None:
        return attend(query_BQSD, key_BGSD, value_BGSV, scale=scale, window=window, sinks_Q=sinks_Q)
    if window is None and sinks_Q is None and can_run_short_step_kernels(query_BQSD):
        from epplan.runtime.kernels.decode_attention import decode_attention, serves

        if serves(query_BQSD, key_BGSD, value_BGSV):
            keys, values, length = cache.extend(layer, key_BGSD, value_BGSV)
            scale = query_BQSD.shape[3] ** -0.5 if scale is None else scale
            return decode_attention(query_BQSD, key_BGSD, value_BGSV, keys, values, length, scale)
    key_BGTD, value_BGTV = cache.update(layer, key_BGSD, value_BGSV)
    return attend(query_BQSD, key_BGTD, value_BGTV, scale=scale, window=window, sinks_Q=sinks_Q)


def attend(
    query_BQSD: Tensor,
    key_BGTD: Tensor,
    value_BGTV: Tensor,
    *,
    scale: float | None,
    window: int | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """Return what each query reads from the values before it and its own, [B, Q, S, V].

    Args:
        query_BQSD: queries of the last S of the T positions.
        key_BGTD: keys; query head q reads head q * G // Q.
        value_BGTV: values.
        scale: multiplies the scores; None is 1 / sqrt(D).
        window: positions a query sees, its own included; None is all before it.
        sinks_Q: score of a position beyond all others that holds a value of zeros: it takes its
            part of the softmax and gives nothing (gpt-oss).
    """
    num_queries, num_keys = query_BQSD.shape[2], key_BGTD.shape[2]
    if window is not None and window >= num_keys:
        window = None
    if sinks_Q is not None or window is not None:
        return _attend_masked(query_BQSD, key_BGTD, value_BGTV, scale, window, sinks_Q)
    scale = query_BQSD.shape[3] ** -0.5 if scale is None else scale
    is_wide = _is_wide(query_BQSD, key_BGTD, value_BGTV)
    if is_wide and num_queries > 1 and can_run_kernels(query_BQSD):
        from epplan.runtime.kernels.wide_attention import wide_attention

        return wide_attention(query_BQSD, key_BGTD, value_BGTV, scale)
    mask = None
    if 1 < num_queries < num_keys:
        mask = causal_lower_right(num_queries, num_keys)  # a kind of mask that kernels know
    if num_queries == 1:
        # Heads that share a key stand in for queries: repeating the keys would cost their memory.
        num_sequences, kv_heads, _, width = key_BGTD.shape
        num_sharing = query_BQSD.shape[1] // kv_heads
        shared_BGnD = query_BQSD.reshape(num_sequences, kv_heads, num_sharing, width)
        out_BGnV = F.scaled_dot_product_attention(shared_BGnD, key_BGTD, value_BGTV, scale=scale)
        return out_BGnV.reshape(*query_BQSD.shape[:3], value_BGTV.shape[3])
    return F.scaled_dot_product_attention(
        query_BQSD,
        key_BGTD,
        value_BGTV,
        attn_mask=mask,
        is_causal=1 < num_queries == num_keys,
        scale=scale,
        enable_gqa=key_BGTD.shape[1] != query_BQSD.shape[1],
    )


def _is_wide(*heads: Tensor) -> bool:
    return all(tensor.shape[3] == _WIDE_HEAD for tensor in heads)


def _attend_masked(
    query_BQSD: Tensor,
    key_BGTD: Tensor,
    value_BGTV: Tensor,
    scale: float | None,
    window: int | None,
    sinks_Q: Tensor | None,
) -> Tensor:
    """Attend with a mask in memory, [S, T]."""
    mask = _mask(query_BQSD.shape[2], key_BGTD.shape[2], window, query_BQSD.device)
    if sinks_Q is not None:
        key_BGTD, value_BGTV = F.pad(key_BGTD, (0, 0, 0, 1)), F.pad(value_BGTV, (0, 0, 0, 1))
        mask = _with_sinks(mask, sinks_Q.to(query_BQSD.dtype))
    return F.scaled_dot_product_attention(
        query_BQSD,
        key_BGTD,
        value_BGTV,
        attn_mask=mask,
        scale=scale,
        enable_gqa=key_BGTD.shape[1] != query_BQSD.shape[1],
    )


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return [S, T], true where a query sees a key."""
    key_T = torch.arange(num_keys, device=device)
    query_S1 = key_T[num_keys - num_queries :, None]
    seen_ST = key_T <= query_S1
    return seen_ST if window is None else seen_ST & (key_T > query_S1 - window)


def _with_sinks(seen_ST: Tensor, sinks_Q: Tensor) -> Tensor:
    """Return what is added to the scores, [Q, S, T + 1]: the last key is zeros, its score 0."""
    seen_QST = seen_ST.expand(len(sinks_Q), -1, -1)
    bias_QST = torch.zeros_like(seen_QST, dtype=sinks_Q.dtype).masked_fill(~seen_QST, -torch.inf)
    sinks_QS1 = sinks_Q[:, None, None].expand(-1, seen_ST.shape[0], 1)
    return torch.cat([bias_QST, sinks_QS1], dim=-1)
