"""Published configurations of every family, and what of a configuration is refused."""

from typing import Any

import pytest

from epplan.errors import InputError
from epplan.files import validate
from epplan.planner.huggingface import spec_fields
from epplan.planner.model import ModelSpec

# As on the Hugging Face hub, without what no reader looks at.
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
GLM4: dict[str, Any] = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return validate(ModelSpec, spec_fields({**config, **changes}, "config"), "config")


@pytest.mark.parametrize(
    ("config", "published"),
    [(GPT_OSS, 20.9e9), (QWEN2, 14.3e9), (DEEPSEEK_V2, 236e9), (GLM4, 107e9)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_parameter_counts_are_the_published_ones(config: dict[str, Any], published: float) -> None:
    spec = read(config)
    stored = spec.replicated_bytes + spec.expert_bytes * spec.num_experts * spec.num_moe_layers
    assert stored / spec.weight_bytes == pytest.approx(published, rel=1e-2)


def test_gpt_oss_has_sinks_biases_windows_and_a_clamped_gate() -> None:
    spec = read(GPT_OSS)
    attention = spec.attention
    assert (attention.sinks, attention.qkv_bias, attention.output_bias) == (True, True, True)
    assert (attention.window, attention.window_layers) == (128, tuple(range(0, 24, 2)))
    assert [attention.window_of(layer) for layer in range(3)] == [128, None, 128]
    assert (spec.expert_bias, spec.swiglu_limit, spec.swiglu_alpha) == (True, 7.0, 1.702)
    assert (spec.top_k, spec.router.logit_bias, spec.router.renormalize) == (4, True, True)
    assert spec.weight_bytes == 4.25 / 8
    scaling = attention.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.truncate) == ("yarn", 32, False)
    assert scaling.magnitude == pytest.approx(1.3465735902799727)


def test_qwen2_has_a_gate_for_its_shared_expert_and_no_window_unless_told() -> None:
    spec = read(QWEN2)
    assert (spec.shared_ffn_size, spec.shared_gate) == (5632, True)
    assert (spec.attention.qkv_bias, spec.attention.output_bias) == (True, False)
    assert spec.attention.window is None
    windowed = read(QWEN2, use_sliding_window=True).attention
    assert (windowed.window, windowed.window_layers) == (32768, tuple(range(0, 21, 2)))


def test_deepseek_v2_has_groups_and_a_score_factor() -> None:
    spec = read(DEEPSEEK_V2)
    assert (spec.router.groups, spec.router.topk_groups, spec.router.group_rule) == (8, 3, "max")
    assert (spec.router.scale, spec.router.renormalize) == (16.0, False)
    assert spec.attention.rope_interleaved
    assert spec.attention.score_factor == pytest.approx((0.1 * 0.707 * 3.6888794541139363 + 1) ** 2)
    assert spec.attention.rope_scaling is not None
    assert spec.attention.rope_scaling.magnitude == 1
    greedy = read(DEEPSEEK_V2, topk_method="greedy").router
    assert (greedy.groups, greedy.topk_groups) == (1, 1)


def test_glm4_rotates_half_of_each_head() -> None:
    spec = read(GLM4)
    assert (spec.attention.head_dim, spec.attention.rotary_dim) == (128, 64)
    assert (spec.attention.qkv_bias, spec.attention.output_bias) == (True, False)
    assert spec.router.score == "sigmoid"
    assert spec.moe_layers == tuple(range(1, 46))


def test_what_transformers_5_writes() -> None:
    """One mapping for positions; `num_local_experts` where the hub says `num_experts`."""
    config = {
        key: value for key, value in QWEN2.items() if key not in ("num_experts", "rope_theta")
    }
    positions = {"rope_type": "default", "rope_theta": 1000000.0}
    assert read({**config, "num_local_experts": 60, "rope_parameters": positions}) == read(QWEN2)


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act: 'gelu', not 'silu' or 'swish'"),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid', not 'softmax'"),
        (
            DEEPSEEK_V2,
            {"topk_method": "noaux_tc"},
            "topk_method: 'noaux_tc', not 'greedy' or 'group_limited_greedy'",
        ),
        (
            GLM4,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type: 'dynamic', not default, linear, yarn or llama3",
        ),
        (GLM4, {"rope_scaling": {"type": "linear"}}, "rope scaling of type linear has no factor"),
        (
            GLM4,
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope scaling of type yarn has no original_max_position_embeddings",
        ),
        (
            GLM4,
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters: one position encoding per layer type",
        ),
    ],
)
def test_what_would_change_the_model_is_refused(
    config: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match="config has what epplan does not model") as caught:
        read(config, **changes)
    assert caught.value.problems == (problem,)


def test_all_that_is_not_supported_is_named_at_once() -> None:
    changes = {"hidden_act": "gelu", "scoring_func": "x", "rope_scaling": {"type": "dynamic"}}
    with pytest.raises(InputError) as caught:
        read(DEEPSEEK_V2, **changes)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"rotary_dim": 3}, "position encoding rotates pairs, and 3 elements are odd"),
        ({"rotary_dim": 256}, "attention.rotary_dim 256 exceeds head_dim 128"),
        ({"rope_interleaved": True}, "rope_interleaved is of attention of kind mla only"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "kind yarn needs original_positions"),
        (
            {
                "rope_scaling": {
                    "kind": "llama3",
                    "factor": 2,
                    "original_positions": 8,
                    "low_freq_factor": 4,
                }
            },
            "low_freq_factor 4 must be below high_freq_factor 4",
        ),
    ],
)
def test_specs_that_make_no_sense(attention: dict[str, Any], message: str) -> None:
    fields = spec_fields(GLM4, "config")
    fields["attention"] = {**fields["attention"], **attention}
    with pytest.raises(InputError) as caught:
        validate(ModelSpec, fields, "model")
    assert message in str(caught.value)
