"""Rotary frequencies against transformers' own, for every kind of scaling."""

from typing import Any

import pytest
import torch

from epplan.planner.huggingface_rope import rope_fields, score_factor
from epplan.planner.model import AttentionSpec
from epplan.runtime.layer.rope import half_split_order, make_rotation, rotate

transformers = pytest.importorskip("transformers", reason="compares with transformers")

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.25,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


def spec_of(config: dict[str, Any], head_dim: int) -> AttentionSpec:
    fields = rope_fields(config, 1e4)
    return AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=head_dim, **fields)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("published", [True, False])
def test_angles_are_those_of_transformers(
    scaling: dict[str, Any], head_dim: int, published: bool
) -> None:
    config: dict[str, Any] = {"max_position_embeddings": 131072}
    if published:  # as on the hub before transformers 5
        own = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        config |= {"rope_theta": 5e5, "rope_scaling": own}
    else:
        config["rope_parameters"] = {**scaling, "rope_theta": 5e5}
    reference = transformers.MixtralConfig(
        hidden_size=head_dim,
        head_dim=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 5e5},
    )
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    positions = torch.tensor([0, 1, 7, 1000, 99_999])
    cos, sin = MixtralRotaryEmbedding(reference)(torch.empty(1), positions[None])
    rotation = make_rotation(spec_of(config, head_dim), positions)
    assert rotation is not None
    half = head_dim // 2
    torch.testing.assert_close(rotation.cos_SP, cos[0, :, :half], rtol=0, atol=2e-3)
    torch.testing.assert_close(rotation.cos_SP[:4], cos[0, :4, :half], rtol=0, atol=2e-5)
    torch.testing.assert_close(rotation.sin_SP[:4], sin[0, :4, :half], rtol=0, atol=2e-5)


def test_scores_of_deepseek_grow_with_the_stretch() -> None:
    config = {"rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 1.0}}
    assert score_factor(config) == pytest.approx((0.1 * 3.688879454113936 + 1) ** 2)
    assert score_factor({"rope_scaling": {"type": "yarn", "factor": 40}}) == 1
    assert score_factor({}) == 1


def test_elements_beyond_the_rotated_ones_pass() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8, rope_theta=1e4, rotary_dim=4)
    x = torch.randn(1, 1, 3, 8)
    turned = rotate(x, make_rotation(spec, torch.arange(3)))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.equal(turned[:, :, 1, :4], x[:, :, 1, :4])
    assert rotate(x, None) is x


def test_interleaved_pairs_in_half_split_order_turn_alike() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8, rope_theta=1e4)
    x, order = torch.randn(1, 1, 5, 8), half_split_order(8)
    turned = rotate(x[..., order], make_rotation(spec, torch.arange(5)))
    pairs = torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)).contiguous())
    angles = torch.outer(torch.arange(5.0), 1e4 ** (-torch.arange(0, 8, 2) / 8))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(5, 4), angles)).flatten(-2)
    torch.testing.assert_close(turned, expected[..., order])
