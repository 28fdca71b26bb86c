"""Causal softmax attention: the one place where scores are computed.

Shapes: B sequences, Q query heads, G key and value heads (G divides Q), S query positions, T key
positions (T >= S), D width of a query or key head, V width of a value head.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# torch's own kernels end at heads of 256; for 512 only its oldest remains, with a quarter of the
# speed of ours (docs/log.md).
_WIDE_HEAD = 512


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
    if num_queries > 1 and _has_wide_kernel(query_BQSD, key_BGTD, value_BGTV):
        from .kernels.wide_attention import wide_attention

        scale = query_BQSD.shape[3] ** -0.5 if scale is None else scale
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


def _has_wide_kernel(query_BQSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor) -> bool:
    """Return whether `kernels.wide_attention` can run here."""
    return (
        query_BQSD.is_cuda
        and query_BQSD.shape[3] == key_BGTD.shape[3] == value_BGTV.shape[3] == _WIDE_HEAD
        and query_BQSD.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()  # it has no backward pass
        and _is_hopper_with_gluon(query_BQSD.device)
    )


@cache
def _is_hopper_with_gluon(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from .kernels import wide_attention  # noqa: F401
    except (ImportError, AttributeError):  # no Triton, or one older than 3.6
        return False
    return True


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
