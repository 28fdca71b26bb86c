"""Attention against loops over heads and positions, with rotation as complex multiplication."""

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from epplan.planner.model import AttentionSpec, RopeScaling
from epplan.runtime.layer.attention import (
    attention,
    attention_shapes,
    attention_step,
)
from epplan.runtime.layer.kv_cache import KvCache
from tests.runtime_cases import REFERENCE

HIDDEN = 20
EPSILON = 0.01  # large, so that a norm with another one is noticed
LAYER = 1
GQA = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)
QWEN = {"rope_theta": 100.0, "qk_norm": True, "qkv_bias": True}
GPT_OSS = {
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling(kind="linear", factor=3, magnitude=1.3),
    "rotary_dim": 4,
    "qkv_bias": True,
    "output_bias": True,
    "sinks": True,
    "window": 3,
    "window_layers": (0, LAYER),
}
MLA = AttentionSpec(
    kind="mla",
    num_heads=3,
    num_kv_heads=3,
    head_dim=5,
    kv_lora_rank=7,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    score_factor=1.7,
)
DEEPSEEK = {"rope_theta": 100.0, "q_lora_rank": 8, "qkv_bias": True, "output_bias": True}
SPECS = [
    GQA,
    GQA.model_copy(update={"num_kv_heads": 4}),
    AttentionSpec(num_heads=16, num_kv_heads=16, head_dim=512),  # the reference model's
    GQA.model_copy(update={"window": 3, "window_layers": (LAYER + 1,)}),
    GQA.model_copy(update=QWEN),
    GQA.model_copy(update=GPT_OSS),
    MLA,
    MLA.model_copy(update=DEEPSEEK),
]


def make_weights(spec: AttentionSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
        + (1 if name.endswith("norm") else 0)
        for name, shape in attention_shapes(spec, HIDDEN).items()
    }


def make_input(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, length, HIDDEN, generator=generator, dtype=torch.float64)


def run(
    spec: AttentionSpec, weights: dict[str, Tensor], x: Tensor, cache: KvCache | None = None
) -> Tensor:
    model = REFERENCE.model_copy(update={"attention": spec, "norm_epsilon": EPSILON})
    return attention(x, weights, spec, attention_step(model, x, cache), LAYER)


def norm(vector: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return vector / (vector.square().mean() + epsilon).sqrt() * gain


def rotate(vector: Tensor, position: int, spec: AttentionSpec) -> Tensor:
    if spec.rope_theta is None:
        return vector
    width = spec.rotated_dim
    factor, magnitude = 1.0, 1.0
    if spec.rope_scaling is not None:
        factor, magnitude = spec.rope_scaling.factor, spec.rope_scaling.magnitude
    turned = vector.clone()
    for i in range(width // 2):
        angle = position * spec.rope_theta ** (-2 * i / width) / factor
        pair = complex(vector[i], vector[i + width // 2]) * cmath.rect(magnitude, angle)
        turned[i], turned[i + width // 2] = pair.real, pair.imag
    return turned


def attend(
    spec: AttentionSpec,
    queries: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    sink: Tensor | None,
) -> Tensor:
    """Return one head's output, [positions, value width]."""
    out = []
    window = spec.window if LAYER in spec.window_layers else None
    for position, query in enumerate(queries):
        first = 0 if window is None else max(0, position - window + 1)
        seen = torch.stack([query @ key for key in keys[first : position + 1]])
        powers = (seen * spec.score_factor / math.sqrt(len(query))).exp()
        total = powers.sum() + (0 if sink is None else sink.exp())
        out.append((powers / total) @ torch.stack(values[first : position + 1]))
    return torch.stack(out)


def naive_gqa(x: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    def head(name: str, number: int) -> list[Tensor]:
        rows = slice(number * spec.head_dim, (number + 1) * spec.head_dim)
        vectors = [weights[name][rows] @ token for token in x]
        if spec.qkv_bias:
            vectors = [vector + weights[f"{name}.bias"][rows] for vector in vectors]
        if name == "value":
            return vectors
        if spec.qk_norm:
            vectors = [norm(vector, weights[f"{name}_norm"], EPSILON) for vector in vectors]
        return [rotate(vector, position, spec) for position, vector in enumerate(vectors)]

    heads = []
    for number in range(spec.num_heads):
        kv_head = number // (spec.num_heads // spec.num_kv_heads)
        sink = weights["sinks"][number] if spec.sinks else None
        heads.append(
            attend(spec, head("query", number), head("key", kv_head), head("value", kv_head), sink)
        )
    return torch.cat(heads, dim=-1) @ weights["output"].T + weights.get("output.bias", 0)


def naive_mla(x: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    nope, rank = spec.qk_nope_head_dim, spec.kv_lora_rank
    heads = []
    for number in range(spec.num_heads):
        queries, keys, values = [], [], []
        for position, token in enumerate(x):
            down = token
            if spec.q_lora_rank:
                down = weights["query_down"] @ token + weights.get("query_down.bias", 0)
                down = norm(down, weights["query_down_norm"], 1e-6)
            query = (weights["query"] @ down).view(spec.num_heads, -1)[number]
            latent = weights["latent"] @ token + weights.get("latent.bias", 0)
            normed = norm(latent[:rank], weights["latent_norm"], 1e-6)
            expanded = (weights["expand"] @ normed).view(spec.num_heads, -1)[number]
            key_rope = rotate(latent[rank:], position, spec)
            queries.append(torch.cat([query[:nope], rotate(query[nope:], position, spec)]))
            keys.append(torch.cat([expanded[:nope], key_rope]))
            values.append(expanded[nope:])
        heads.append(attend(spec, queries, keys, values, None))
    return torch.cat(heads, dim=-1) @ weights["output"].T + weights.get("output.bias", 0)


def naive(x: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    sequence = naive_gqa if spec.kind == "gqa" else naive_mla
    return torch.stack([sequence(tokens, weights, spec) for tokens in x])


# Rotation is float32 inside.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("spec", SPECS)
def test_attention_equals_loops(spec: AttentionSpec) -> None:
    weights, x = make_weights(spec), make_input(9)
    torch.testing.assert_close(run(spec, weights, x), naive(x, weights, spec), **CLOSE)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lengths", [[1] * 9, [6, 1, 1, 1], [4, 5], [2, 7]])
def test_steps_with_a_cache_equal_the_whole_sequence(
    spec: AttentionSpec, lengths: list[int]
) -> None:
    weights, x = make_weights(spec), make_input(9)
    cache = KvCache(LAYER + 1)
    outputs = []
    for step in torch.split(x, lengths, dim=1):
        cache.update(0, step[:, None], step[:, None])  # another layer, before this one
        outputs.append(run(spec, weights, step, cache))
    torch.testing.assert_close(torch.cat(outputs, 1), run(spec, weights, x), **CLOSE)


def test_the_cache_of_latent_attention_holds_what_the_planner_counts() -> None:
    cache = KvCache(LAYER + 1)
    run(MLA, make_weights(MLA), make_input(9), cache)
    keys, values = cache.update(LAYER, torch.empty(2, 1, 0, 11), torch.empty(2, 1, 0, 0))
    assert (keys.numel() + values.numel()) / (2 * 9) == MLA.kv_elements_per_token()


@pytest.mark.parametrize("spec", [GQA, MLA, MLA.model_copy(update={"q_lora_rank": 8})])
def test_projections_hold_the_parameters_the_planner_counts(spec: AttentionSpec) -> None:
    shapes = [shape for shape in attention_shapes(spec, HIDDEN).values() if len(shape) == 2]
    assert sum(math.prod(shape) for shape in shapes) == spec.parameters(HIDDEN)
