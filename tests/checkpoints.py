"""Tiny checkpoints of every family, written by transformers: under a megabyte, in several files.

Norm gains, biases, sinks and correction biases are random: with ones and zeros, leaving them out
would change nothing.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,  # unlike any default
    "max_position_embeddings": 4096,
}
_LATENT: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "routed_scaling_factor": 2.5,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
}
# model_type and configuration, by what is special about it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {**_COMMON, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral, window, tied, llama3": (
        "mixtral",
        {
            **_COMMON,
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_COMMON,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "intermediate_size": 40,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_COMMON,
            "head_dim": 16,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek_v2, greedy, full-rank queries": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    "deepseek_v2, groups, yarn": (
        "deepseek_v2",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            **_COMMON,
            "head_dim": 8,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_COMMON,
            "head_dim": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "intermediate_size": 32,
            "sliding_window": 5,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
}


def make_model(case: str) -> Any:
    """Return the transformers model of a case, with random numbers in all its tensors."""
    transformers = pytest.importorskip("transformers", reason="writes checkpoints")
    model_type, fields = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(_random(name, tensor, generator))
    return model


def write_checkpoint(model: Any, folder: Path, **options: Any) -> Path:
    """Write config.json, files of at most 40 kB and their index; return the folder."""
    model.save_pretrained(folder, max_shard_size="40KB", **options)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def make_tokens(sequences: int, length: int) -> Tensor:
    """Return random tokens, [sequences, length]."""
    generator = torch.Generator().manual_seed(8)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(like.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * numbers
    if name.endswith(("bias", "bias_proj")):
        return 0.3 * numbers
    if name.endswith("sinks"):
        return numbers
    if "embed_tokens" in name:
        return numbers
    # gpt-oss has its experts transposed, and its clamp must be met.
    scale = 3.0 if "gate_up_proj" in name else 1.0
    return numbers * scale / math.sqrt(like.shape[-1])
