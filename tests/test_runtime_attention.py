"""Attention against loops over heads and positions, with rotation as complex multiplication."""

import math

import pytest
import torch
from torch import Tensor

from epplan.planner.model import AttentionSpec
from epplan.runtime.attention import attention, attention_shapes

HIDDEN = 20
GQA = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)
MLA = AttentionSpec(
    kind="mla",
    num_heads=3,
    num_kv_heads=3,
    head_dim=5,
    kv_lora_rank=7,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
)


def make_weights(spec: AttentionSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[1])
        for name, shape in attention_shapes(spec, HIDDEN).items()
    }


def norm(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt()


def rotate(vector: Tensor, position: int, theta: float | None) -> Tensor:
    if theta is None:
        return vector
    half = len(vector) // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)])
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(
        torch.ones(half, dtype=torch.float64), angles.double()
    )
    return torch.cat([turned.real, turned.imag])


def attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return one head's output, [positions, value width]; queries see no later position."""
    out = []
    for position, query in enumerate(queries):
        past = torch.stack([query @ key for key in keys[: position + 1]])
        weights = (past / math.sqrt(len(query))).softmax(0)
        out.append(sum(w * value for w, value in zip(weights, values, strict=False)))
    return torch.stack([torch.as_tensor(row) for row in out])


def naive_gqa(x: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    def head(name: str, number: int, normalise: bool, rotated: bool) -> list[Tensor]:
        rows = weights[name][number * spec.head_dim : (number + 1) * spec.head_dim]
        vectors = [rows @ token for token in x]
        if normalise:
            vectors = [norm(vector) for vector in vectors]
        theta = spec.rope_theta if rotated else None
        return [rotate(vector, position, theta) for position, vector in enumerate(vectors)]

    heads = []
    for query_head in range(spec.num_heads):
        kv_head = query_head // (spec.num_heads // spec.num_kv_heads)
        heads.append(
            attend(
                head("query", query_head, spec.qk_norm, True),
                head("key", kv_head, spec.qk_norm, True),
                head("value", kv_head, False, False),
            )
        )
    return torch.cat(heads, dim=-1) @ weights["output"].T


def naive_mla(x: Tensor, weights: dict[str, Tensor], spec: AttentionSpec) -> Tensor:
    nope, rank = spec.qk_nope_head_dim, spec.kv_lora_rank
    heads = []
    for number in range(spec.num_heads):
        queries, keys, values = [], [], []
        for position, token in enumerate(x):
            down = norm(weights["query_down"] @ token) if spec.q_lora_rank else token
            query = (weights["query"] @ down).view(spec.num_heads, -1)[number]
            latent = weights["latent"] @ token
            expanded = (weights["expand"] @ norm(latent[:rank])).view(spec.num_heads, -1)[number]
            key_rope = rotate(latent[rank:], position, spec.rope_theta)
            query_rope = rotate(query[nope:], position, spec.rope_theta)
            queries.append(torch.cat([query[:nope], query_rope]))
            keys.append(torch.cat([expanded[:nope], key_rope]))
            values.append(expanded[nope:])
        heads.append(attend(queries, keys, values))
    return torch.cat(heads, dim=-1) @ weights["output"].T


@pytest.mark.parametrize(
    "spec",
    [
        GQA,
        GQA.model_copy(update={"num_kv_heads": 4}),
        GQA.model_copy(update={"rope_theta": 100.0, "qk_norm": True}),
        MLA,
        MLA.model_copy(update={"rope_theta": 100.0, "q_lora_rank": 8}),
    ],
)
def test_attention_equals_loops(spec: AttentionSpec) -> None:
    weights = make_weights(spec)
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    naive = naive_gqa if spec.kind == "gqa" else naive_mla
    expected = torch.stack([naive(sequence, weights, spec) for sequence in x])
    # Rotation is float32 inside.
    torch.testing.assert_close(attention(x, weights, spec), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [GQA, MLA, MLA.model_copy(update={"q_lora_rank": 8})])
def test_projections_hold_the_parameters_the_planner_counts(spec: AttentionSpec) -> None:
    shapes = attention_shapes(spec, HIDDEN).values()
    assert sum(rows * columns for rows, columns in shapes) == spec.parameters(HIDDEN)
