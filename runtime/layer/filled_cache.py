"""A cache of random keys and values, for timing decode without the prefill before it."""

import torch

from epplan.planner.model import AttentionSpec

from .kv_cache import KvCache


def filled_cache(
    spec: AttentionSpec,
    *,
    num_layers: int,
    sequences: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
) -> KvCache:
    """Return a cache that holds `context` positions and has room for one more."""
    heads, key_width, value_width = (
        (spec.num_kv_heads, spec.head_dim, spec.head_dim)
        if spec.kind == "gqa"
        else (1, spec.kv_lora_rank + spec.qk_rope_head_dim, 0)  # latents, which are both
    )
    cache = KvCache(num_layers, capacity=context + 1)
    for layer in range(num_layers):
        shape = (sequences, heads, context)
        key_BGSD = torch.randn(*shape, key_width, device=device).to(dtype)
        value_BGSV = torch.randn(*shape, value_width, device=device).to(dtype)
        cache.update(layer, key_BGSD, value_BGSV)
    return cache
