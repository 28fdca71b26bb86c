"""Causal softmax attention: the one place where scores are computed.

Shapes: B sequences, Q query heads, G key and value heads (G divides Q), S query positions, T key
positions (T >= S), D width of a query or key head, V width of a value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    gqa = key_BGTD.shape[1] != query_BQSD.shape[1]
    if sinks_Q is not None:
        key_BGTD, value_BGTV = F.pad(key_BGTD, (0, 0, 0, 1)), F.pad(value_BGTV, (0, 0, 0, 1))
    mask = None
    is_causal = num_queries == num_keys and sinks_Q is None and not (window and window < num_keys)
    if not is_causal:
        mask = _mask(num_queries, num_keys, window, query_BQSD.device)
    if mask is not None and sinks_Q is not None:
        mask = _with_sinks(mask, sinks_Q.to(query_BQSD.dtype))
    return F.scaled_dot_product_attention(
        query_BQSD,
        key_BGTD,
        value_BGTV,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=gqa,
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
