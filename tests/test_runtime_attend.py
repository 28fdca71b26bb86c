"""Scores against loops over heads and positions; the cache against whole sequences."""

import math

import pytest
import torch
from torch import Tensor

from epplan.runtime.layer.attend import attend
from epplan.runtime.layer.kv_cache import KvCache


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    out = torch.zeros(batch, heads, queries, value.shape[3], dtype=query.dtype)
    factor = 1 / math.sqrt(width) if scale is None else scale
    for b in range(batch):
        for head in range(heads):
            kv_head = head * key.shape[1] // heads
            for s in range(queries):
                position = keys - queries + s
                first = 0 if window is None else max(0, position - window + 1)
                seen = range(first, position + 1)
                scores = [float(query[b, head, s] @ key[b, kv_head, t]) * factor for t in seen]
                powers = [math.exp(score) for score in scores]
                total = sum(powers) + (0 if sinks is None else math.exp(float(sinks[head])))
                for power, t in zip(powers, seen, strict=True):
                    out[b, head, s] += power / total * value[b, kv_head, t]
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize(("heads", "scale"), [(2, None), (4, 0.3)])
def test_attend_equals_loops(
    heads: int, scale: float | None, queries: int, keys: int, window: int | None, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = random(2, heads, queries, 6), random(2, 2, keys, 6)
    value, sinks_Q = random(2, 2, keys, 5), random(heads) if sinks else None
    actual = attend(query, key, value, scale=scale, window=window, sinks_Q=sinks_Q)
    torch.testing.assert_close(actual, naive(query, key, value, scale, window, sinks_Q))


def test_the_cache_returns_all_positions_and_counts_those_of_whole_steps() -> None:
    cache = KvCache(2)
    keys, values = torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 5)
    assert cache.length == 0
    for first, last in [(0, 6), (6, 7), (7, 9)]:
        step = slice(first, last)
        for layer in range(2):
            assert cache.length == first  # the same for all layers of a step
            got = cache.update(layer, keys[:, :, step] + layer, values[:, :, step])
            assert torch.equal(got[0], keys[:, :, :last] + layer)
            assert torch.equal(got[1], values[:, :, :last])
    assert cache.length == 9


def test_the_cache_forgets_and_keeps_its_buffers() -> None:
    cache = KvCache(1, capacity=8)
    keys, values = torch.randn(2, 1, 8, 4), torch.randn(2, 1, 8, 0)
    first = cache.update(0, keys[:, :, :6], values[:, :, :6])[0]
    cache.truncate(5)
    assert cache.length == 5
    again = cache.update(0, keys[:, :, 5:], values[:, :, 5:])[0]
    assert torch.equal(again, keys)
    assert again.data_ptr() == first.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "queries", "keys"),
    [
        (1, 4, 4, 512, 512),
        (2, 4, 2, 333, 333),
        (1, 4, 4, 100, 777),  # a chunk of a prompt, its last tile not seen by all of a block
        (2, 2, 2, 65, 129),
        (2, 2, 1, 1, 300),  # decode
        (1, 2, 2, 2, 64),
    ],
)
def test_wide_heads_on_a_gpu(
    sequences: int, heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    query, cache = random(sequences, heads, queries, 512), KvCache(1, capacity=1000)
    key_BGTD, value_BGTV = cache.update(
        0, random(sequences, kv_heads, keys, 512), random(sequences, kv_heads, keys, 512)
    )
    with torch.inference_mode():
        actual = attend(query, key_BGTD, value_BGTV, scale=None).double().cpu()
    on_cpu = [tensor.double().cpu() for tensor in (query, key_BGTD, value_BGTV)]
    expected = attend(*on_cpu, scale=None)
    error = (actual - expected).norm() / expected.norm()
    assert error < (1e-3 if dtype == torch.float16 else 6e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "positions"),
    [(1, 4, 4, 512), (2, 4, 2, 333), (3, 1, 1, 65), (1, 16, 16, 100)],
)
def test_wide_heads_side_by_side_on_a_gpu(
    sequences: int, heads: int, kv_heads: int, positions: int
) -> None:
    """As one product for all three leaves them: nothing is copied, and the bits are the same."""
    shape = (sequences, positions, (heads + 2 * kv_heads) * 512)
    joined_BSO = torch.randn(*shape, device="cuda", dtype=torch.float16)
    parts = torch.split(joined_BSO, [heads * 512, kv_heads * 512, kv_heads * 512], dim=-1)
    query, key, value = (torch.unflatten(part, -1, (-1, 512)).transpose(1, 2) for part in parts)
    with torch.inference_mode():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        actual = attend(query, key, value, scale=None)
        copied = torch.cuda.max_memory_allocated() - before - actual.nbytes
        expected = attend(query.contiguous(), key.contiguous(), value.contiguous(), scale=None)
    assert copied < 1024
    assert torch.equal(actual, expected)
    assert actual.transpose(1, 2).is_contiguous()
