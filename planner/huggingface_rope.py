"""Rotary position encoding of a Hugging Face configuration.

transformers 5 has one mapping `rope_parameters`; published configurations have `rope_theta` at
the top level and `rope_scaling`, whose kind is `rope_type` or, in older ones, `type`. What these
mean: `modeling_rope_utils.py` of transformers 5.
"""

import math
from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]
_KINDS = ("default", "linear", "yarn", "llama3")


def rope_scaling(config: Config) -> Config:
    """Return the scaling's own fields, empty where there is none."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_problems(config: Config) -> Iterator[str]:
    """Yield what of the position encoding is not supported or not complete."""
    fields = rope_scaling(config)
    kind = _kind(fields)
    if any(isinstance(value, dict) for value in fields.values()):
        yield "rope_parameters: one position encoding per layer type"
    elif kind not in _KINDS:
        yield f"rope_type: {kind!r}, not {', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
    elif kind != "default" and not _factor(config):
        yield f"rope scaling of type {kind} has no factor"
    elif kind in ("yarn", "llama3") and not _original_positions(config):
        yield f"rope scaling of type {kind} has no original_max_position_embeddings"


def rope_fields(config: Config, default_theta: float) -> Config:
    """Return the rope fields of an `AttentionSpec`."""
    fields = rope_scaling(config)
    theta = config.get("rope_theta") or fields.get("rope_theta") or default_theta
    kind = _kind(fields)
    if kind == "default":
        return {"rope_theta": float(theta)}
    scaling: Config = {"kind": kind, "factor": _factor(config)}
    if kind != "linear":
        scaling["original_positions"] = _original_positions(config)
    if kind == "yarn":
        scaling["magnitude"] = _magnitude(config)
    names = {
        "yarn": ("beta_fast", "beta_slow", "truncate"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }
    for name in names.get(kind, ()):
        if fields.get(name) is not None:
            scaling[name] = fields[name]
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def score_factor(config: Config) -> float:
    """Return what DeepSeek's attention scores are multiplied by beside 1 / sqrt(width)."""
    fields = rope_scaling(config)
    if _kind(fields) == "default" or not fields.get("mscale_all_dim"):
        return 1.0
    return _mscale(_factor(config), fields["mscale_all_dim"]) ** 2


def _kind(fields: Config) -> str:
    return str(fields.get("rope_type") or fields.get("type") or "default")


def _factor(config: Config) -> float:
    """Return the stretch; some configurations give it only as a ratio of context lengths."""
    factor = rope_scaling(config).get("factor")
    if factor is None and _original_positions(config):
        factor = config.get("max_position_embeddings", 0) / _original_positions(config)
    return float(factor or 0)


def _original_positions(config: Config) -> int:
    return int(
        rope_scaling(config).get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
        or 0
    )


def _magnitude(config: Config) -> float:
    """Return YaRN's factor on rotated queries and keys."""
    fields, factor = rope_scaling(config), _factor(config)
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return _mscale(factor, fields["mscale"]) / _mscale(factor, fields["mscale_all_dim"])
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
