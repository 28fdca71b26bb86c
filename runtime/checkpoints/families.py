"""Names of tensors in checkpoints, by model family, as published on the Hugging Face hub."""

from dataclasses import dataclass

from epplan.planner.model import AttentionSpec

from .expert_layouts import ExpertLayout, Fused, GptOss, GptOssMxfp4, PerExpert

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT_HEAD = "lm_head.weight"
LAYERS = "model.layers"
INPUT_NORM = "input_layernorm.weight"
POST_ATTENTION_NORM = "post_attention_layernorm.weight"
ATTENTION = "self_attn"
DENSE_MLP = "mlp"
MLP = ("gate_proj", "up_proj", "down_proj")  # of dense layers and shared experts


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeNames:
    """Names within an MoE layer, below `model.layers.N`."""

    experts: ExpertLayout
    block: str = "mlp"
    router: str = "gate"
    shared: str = "shared_experts"


_USUAL = PerExpert("gate_proj", "up_proj", "down_proj")
_QWEN = (
    MoeNames(experts=_USUAL, shared="shared_expert"),
    MoeNames(experts=Fused(), shared="shared_expert"),
)
_DEEPSEEK = (MoeNames(experts=_USUAL), MoeNames(experts=Fused()))

# The first is what the hub has; the others are what transformers 5 may write.
FAMILIES: dict[str, tuple[MoeNames, ...]] = {
    "mixtral": (
        MoeNames(experts=PerExpert("w1", "w3", "w2"), block="block_sparse_moe"),
        MoeNames(experts=Fused()),
    ),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": (
        MoeNames(experts=GptOssMxfp4(), router="router"),
        MoeNames(experts=GptOss(), router="router"),
    ),
}

_GROUPED = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
}
_LATENT = {
    "query_down": "q_a_proj",
    "query_down_norm": "q_a_layernorm",
    "latent": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "expand": "kv_b_proj",
    "output": "o_proj",
}


def attention_name(name: str, spec: AttentionSpec) -> str:
    """Return the checkpoint's name of a tensor of `attention_shapes`, below `self_attn`."""
    if name == "sinks":
        return name
    part, _, kind = name.partition(".")
    if spec.kind == "gqa":
        stored = _GROUPED[part]
    else:
        query = "q_b_proj" if spec.q_lora_rank else "q_proj"
        stored = query if part == "query" else _LATENT[part]
    return f"{stored}.{kind or 'weight'}"
