"""Hugging Face `config.json` to the fields of a model spec, one function per family.

Field names per family: the configuration classes of transformers 5
(`models/{mixtral,qwen3_moe,deepseek_v2,deepseek_v3}/configuration_*.py`).
"""

from collections.abc import Callable
from typing import Any

from epplan.errors import InputError

Config = dict[str, Any]


def is_huggingface_config(document: Config) -> bool:
    """Tell whether the document is a Hugging Face configuration (every one has a model_type)."""
    return "model_type" in document or "text_config" in document


def spec_fields(document: Config, what: str) -> Config:
    """Return the fields of a `ModelSpec` for a Hugging Face configuration.

    Args:
        document: the parsed `config.json`; multimodal ones keep the language model's fields
            under `text_config`.
        what: names the document in errors.

    Raises:
        InputError: unsupported architecture, or all missing fields at once.
    """
    config = document.get("text_config", document)
    family = str(config.get("model_type"))
    reader = _FAMILIES.get(family)
    if reader is None:
        raise InputError(
            f"{what} is of an unknown architecture: model_type {family}",
            hints=[
                f"supported: {', '.join(sorted(_FAMILIES))}",
                "or write the model as a YAML spec (see docs/formats.md)",
            ],
        )
    problems = [
        f"{name}: {'missing' if config.get(name) is None else f'{config[name]!r} is no integer'}"
        for name in _REQUIRED[family]
        if not isinstance(config.get(name), int)
    ]
    if problems:
        raise InputError(f"{what} is no {family} configuration", problems=problems)
    dtype = _dtype(config)
    common = {
        "name": str(document.get("_name_or_path") or family),
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "top_k": config["num_experts_per_tok"],
        "vocab_size": config.get("vocab_size", 0),
        "dtype": dtype,
        "weight_bytes": _weight_bytes(config, dtype),
    }
    return {**common, **reader(config)}


def _mixtral(config: Config) -> Config:
    return {
        "moe_layers": tuple(range(config["num_hidden_layers"])),
        "num_experts": config["num_local_experts"],
        "expert_ffn_size": config["intermediate_size"],
        "attention": _grouped_query_attention(config),
    }


def _qwen3_moe(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    return {
        "moe_layers": tuple(x for x in layers if x not in dense and (x + 1) % step == 0),
        "num_experts": config["num_experts"],
        "expert_ffn_size": config["moe_intermediate_size"],
        "dense_ffn_size": config.get("intermediate_size") or 0,
        "attention": {**_grouped_query_attention(config), "qk_norm": True},
        "router": {"renormalize": config.get("norm_topk_prob", False)},
    }


def _deepseek(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    version_3 = config["model_type"] == "deepseek_v3"
    # V2 limits groups only under group_limited_greedy; V3 always does.
    grouped = version_3 or config.get("topk_method") == "group_limited_greedy"
    ffn_size = config["moe_intermediate_size"]
    return {
        "moe_layers": tuple(x for x in layers if x >= first and x % step == 0),
        "num_experts": config["n_routed_experts"],
        "expert_ffn_size": ffn_size,
        "shared_ffn_size": (config.get("n_shared_experts") or 0) * ffn_size,
        "dense_ffn_size": config.get("intermediate_size") or 0,
        "attention": {
            "kind": "mla",
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_attention_heads"],
            "head_dim": config["v_head_dim"],
            "rope_theta": _rope_theta(config),
            "q_lora_rank": config.get("q_lora_rank"),
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_nope_head_dim": config["qk_nope_head_dim"],
            "qk_rope_head_dim": config["qk_rope_head_dim"],
        },
        "router": {
            "score": "sigmoid" if version_3 else "softmax",
            "renormalize": config.get("norm_topk_prob", version_3),
            "scale": config.get("routed_scaling_factor", 1.0),
            "groups": config.get("n_group") or 1 if grouped else 1,
            "topk_groups": config.get("topk_group") or 1 if grouped else 1,
            "group_rule": "top2" if version_3 else "max",
            "correction_bias": version_3,
        },
    }


def _grouped_query_attention(config: Config) -> Config:
    heads = config["num_attention_heads"]
    return {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": _rope_theta(config),
    }


def _rope_theta(config: Config) -> float:
    """Return RoPE's base; transformers 5 moved it from the top level into rope_parameters."""
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def _dtype(config: Config) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return name.removeprefix("torch.")


def _weight_bytes(config: Config, dtype: str) -> float:
    """Return bytes per stored weight: block-scaled fp8 is 1 and one float32 per 128 x 128 block."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "fp8":
        return 1 + 4 / 128**2
    return 4 if dtype == "float32" else 2


_COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
_DEEPSEEK = (
    *_COMMON,
    "n_routed_experts",
    "moe_intermediate_size",
    "v_head_dim",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
)
_REQUIRED: dict[str, tuple[str, ...]] = {
    "mixtral": (*_COMMON, "num_local_experts", "intermediate_size"),
    "qwen3_moe": (*_COMMON, "num_experts", "moe_intermediate_size"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
_FAMILIES: dict[str, Callable[[Config], Config]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
