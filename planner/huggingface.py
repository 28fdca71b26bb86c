"""Hugging Face `config.json` to the fields of a model spec, one function per family.

Field names and defaults per family: the configuration classes of transformers 5
(`models/{mixtral,qwen2_moe,qwen3_moe,deepseek_v2,deepseek_v3,glm4_moe,gpt_oss}/configuration_*.py`)
and the configurations published with the models, which have some older names. What would change
the model and is not modelled is refused, not ignored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from epplan.errors import InputError

from .huggingface_rope import rope_fields, rope_problems, rope_scaling, score_factor

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read one model type."""

    reader: Callable[[Config], Config]
    required: tuple[str, ...]
    norm_epsilon: float = 1e-6  # where the configuration has none
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # fields that may only have these values


def is_huggingface_config(document: Config) -> bool:
    """Tell whether the document is a Hugging Face configuration (every one has a model_type)."""
    return "model_type" in document or "text_config" in document


def language_config(document: Config) -> Config:
    """Return the language model's fields; multimodal documents keep them under `text_config`.

    transformers 5 writes `num_local_experts` where published configurations say `num_experts`.
    """
    config: Config = dict(document.get("text_config", document))
    for one, other in _SYNONYMS:
        if config.get(one) is None and config.get(other) is not None:
            config[one] = config[other]
    return config


def spec_fields(document: Config, what: str) -> Config:
    """Return the fields of a `ModelSpec` for a Hugging Face configuration.

    Args:
        document: the parsed `config.json`.
        what: names the document in errors.

    Raises:
        InputError: unsupported architecture, or all missing and unsupported fields at once.
    """
    config = language_config(document)
    name = str(config.get("model_type"))
    family = _FAMILIES.get(name)
    if family is None:
        raise InputError(
            f"{what} is of an unknown architecture: model_type {name}",
            hints=[
                f"supported: {', '.join(sorted(_FAMILIES))}",
                "or write the model as a YAML spec (see docs/formats.md)",
            ],
        )
    missing = [
        f"{field}: {'missing' if config.get(field) is None else f'{config[field]!r} is no integer'}"
        for field in family.required
        if not isinstance(config.get(field), int)
    ]
    if missing:
        raise InputError(f"{what} is no {name} configuration", problems=missing)
    unsupported = [*_unsupported(config, family), *rope_problems(config)]
    if unsupported:
        raise InputError(f"{what} has what epplan does not model", problems=unsupported)
    dtype = _dtype(config)
    common = {
        "name": str(document.get("_name_or_path") or name),
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "top_k": config["num_experts_per_tok"],
        "vocab_size": config.get("vocab_size", 0),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "norm_epsilon": config.get("rms_norm_eps", family.norm_epsilon),
        "dtype": dtype,
        "weight_bytes": _weight_bytes(config, dtype),
    }
    return {**common, **family.reader(config)}


def _unsupported(config: Config, family: Family) -> Iterator[str]:
    for field, allowed in (("hidden_act", ("silu", "swish")), *family.fixed):
        value = config.get(field)
        if value is not None and value not in allowed:
            yield f"{field}: {value!r}, not {' or '.join(map(repr, allowed))}"


def _mixtral(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    return {
        "moe_layers": tuple(layers),
        "num_experts": config["num_local_experts"],
        "expert_ffn_size": config["intermediate_size"],
        "attention": {
            **_grouped_query_attention(config, 1e6),
            **_window(config, layers),
        },
    }


def _qwen2_moe(config: Config) -> Config:
    most = config.get("max_window_layers", 28)
    windowed = range(0, min(most, config["num_hidden_layers"]), 2)
    return {
        **_qwen_moe(config),
        "shared_ffn_size": config["shared_expert_intermediate_size"],
        "shared_gate": True,
        "attention": {
            **_grouped_query_attention(config, 1e4),
            **_window(config, windowed, opt_in=True),
            "qkv_bias": config.get("qkv_bias", True),
        },
    }


def _qwen3_moe(config: Config) -> Config:
    bias = bool(config.get("attention_bias"))
    return {
        **_qwen_moe(config),
        "attention": {
            **_grouped_query_attention(config, 1e4),
            **_window(config, range(config["num_hidden_layers"]), opt_in=True),
            "qk_norm": True,
            "qkv_bias": bias,
            "output_bias": bias,
        },
    }


def _qwen_moe(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    return {
        "moe_layers": tuple(x for x in layers if x not in dense and (x + 1) % step == 0),
        "num_experts": config["num_experts"],
        "expert_ffn_size": config["moe_intermediate_size"],
        "dense_ffn_size": config.get("intermediate_size") or 0,
        "router": {"renormalize": bool(config.get("norm_topk_prob"))},
    }


def _deepseek_v2(config: Config) -> Config:
    grouped = config.get("topk_method") == "group_limited_greedy"
    return {
        **_deepseek_moe(config),
        "attention": _latent_attention(config, interleaved=True),
        "router": {
            "renormalize": bool(config.get("norm_topk_prob")),
            "scale": config.get("routed_scaling_factor", 1.0),
            "groups": config.get("n_group") or 1 if grouped else 1,
            "topk_groups": config.get("topk_group") or 1 if grouped else 1,
            "group_rule": "max",
        },
    }


def _deepseek_v3(config: Config) -> Config:
    return {
        **_deepseek_moe(config),
        "attention": _latent_attention(config, interleaved=config.get("rope_interleave", True)),
        "router": _biased_sigmoid_router(config),
    }


def _glm4_moe(config: Config) -> Config:
    config = {"partial_rotary_factor": 0.5, **config}
    return {
        **_deepseek_moe(config),
        "attention": {
            **_grouped_query_attention(config, 1e4),
            "qk_norm": bool(config.get("use_qk_norm")),
            "qkv_bias": bool(config.get("attention_bias")),
        },
        "router": _biased_sigmoid_router(config),
    }


def _deepseek_moe(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    ffn_size = config["moe_intermediate_size"]
    return {
        "moe_layers": tuple(x for x in layers if x >= first and x % step == 0),
        "num_experts": config["n_routed_experts"],
        "expert_ffn_size": ffn_size,
        "shared_ffn_size": (config.get("n_shared_experts") or 0) * ffn_size,
        "dense_ffn_size": config.get("intermediate_size") or 0,
    }


def _biased_sigmoid_router(config: Config) -> Config:
    """Return DeepSeek V3's rule: sigmoid scores, a correction bias, the best groups."""
    return {
        "score": "sigmoid",
        "renormalize": config.get("norm_topk_prob", True),
        "scale": config.get("routed_scaling_factor", 1.0),
        "groups": config.get("n_group") or 1,
        "topk_groups": config.get("topk_group") or 1,
        "group_rule": "top2",
        "correction_bias": True,
    }


def _gpt_oss(config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    bias = config.get("attention_bias", True)
    return {
        "moe_layers": tuple(layers),
        "num_experts": config["num_local_experts"],
        "expert_ffn_size": config["intermediate_size"],
        "expert_bias": True,
        "swiglu_limit": config.get("swiglu_limit", 7.0),
        "swiglu_alpha": config.get("swiglu_alpha", 1.702),
        "attention": {
            **_grouped_query_attention(config, 150000.0),
            **_window(config, layers[::2]),
            "qkv_bias": bias,
            "output_bias": bias,
            "sinks": True,
        },
        # A softmax over the chosen logits is one over all of them, renormalised.
        "router": {"renormalize": True, "logit_bias": True},
    }


def _grouped_query_attention(config: Config, default_theta: float) -> Config:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    fields = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        **rope_fields(config, default_theta),
    }
    share = config.get("partial_rotary_factor") or rope_scaling(config).get("partial_rotary_factor")
    return fields if share is None else {**fields, "rotary_dim": int(head_dim * share)}


def _latent_attention(config: Config, *, interleaved: bool) -> Config:
    bias = bool(config.get("attention_bias"))
    return {
        "kind": "mla",
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_attention_heads"],
        "head_dim": config["v_head_dim"],
        **rope_fields(config, 1e4),
        "rope_interleaved": interleaved,
        "score_factor": score_factor(config),
        "qkv_bias": bias,
        "output_bias": bias,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_nope_head_dim": config["qk_nope_head_dim"],
        "qk_rope_head_dim": config["qk_rope_head_dim"],
    }


def _window(config: Config, layers: range, *, opt_in: bool = False) -> Config:
    """Return the sliding window and its layers: those listed, else the family's own `layers`.

    Args:
        config: the configuration.
        layers: of the family, where `layer_types` does not list them.
        opt_in: the window holds only where `use_sliding_window` says so.
    """
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", not opt_in):
        return {}
    types = config.get("layer_types")
    if types:
        listed = [number for number, kind in enumerate(types) if kind == "sliding_attention"]
        return {"window": window, "window_layers": tuple(listed)}
    return {"window": window, "window_layers": tuple(layers)}


def _dtype(config: Config) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return name.removeprefix("torch.")


def _weight_bytes(config: Config, dtype: str) -> float:
    """Return bytes per stored expert weight.

    Block-scaled fp8 is 1 and one float32 per 128 x 128 block; mxfp4 is half a byte and one byte
    per 32.
    """
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "fp8":
        return 1 + 4 / 128**2
    if method == "mxfp4":
        return 0.5 + 1 / 32
    return 4 if dtype == "float32" else 2


_SYNONYMS = (
    ("num_experts", "num_local_experts"),
    ("num_experts_per_tok", "experts_per_token"),  # gpt-oss
)
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
_FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        reader=_mixtral,
        required=(*_COMMON, "num_local_experts", "intermediate_size"),
        norm_epsilon=1e-5,
    ),
    "qwen2_moe": Family(
        reader=_qwen2_moe,
        required=(
            *_COMMON,
            "num_experts",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ),
    ),
    "qwen3_moe": Family(
        reader=_qwen3_moe, required=(*_COMMON, "num_experts", "moe_intermediate_size")
    ),
    "deepseek_v2": Family(
        reader=_deepseek_v2,
        required=_DEEPSEEK,
        fixed=(
            ("scoring_func", ("softmax",)),
            ("topk_method", ("greedy", "group_limited_greedy")),
        ),
    ),
    "deepseek_v3": Family(
        reader=_deepseek_v3,
        required=_DEEPSEEK,
        fixed=(("scoring_func", ("sigmoid",)), ("topk_method", ("noaux_tc",))),
    ),
    "glm4_moe": Family(
        reader=_glm4_moe,
        required=(*_COMMON, "n_routed_experts", "moe_intermediate_size"),
        norm_epsilon=1e-5,
    ),
    "gpt_oss": Family(
        reader=_gpt_oss,
        required=(*_COMMON, "num_local_experts", "intermediate_size"),
        norm_epsilon=1e-5,
    ),
}
