"""The model spec: what of a Mixture-of-Experts model matters to placement, cost and runtime.

A spec is a value inside the plan file, so that the runtime builds exactly the model that was
planned. Sizes are in elements, memory in bytes, dtypes by their torch names.
"""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text, validate

from .huggingface import is_huggingface_config, spec_fields

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HEAD_WIDTHS = (
    "head_dim",
    "rotary_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
)


class RopeScaling(BaseModel):
    """How rotary frequencies are stretched for contexts beyond `original_positions`.

    `linear` divides them all by `factor`; `yarn` divides those that turn less than `beta_slow`
    times in the original context, leaves those above `beta_fast`, and lets a ramp join them
    (https://arxiv.org/abs/2309.00071); `llama3` does the same with `low_freq_factor` and
    `high_freq_factor` turns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "yarn", "llama3"]
    factor: float = Field(ge=1)
    original_positions: int = Field(default=0, ge=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends are rounded outwards to whole elements
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    magnitude: float = 1.0  # multiplies rotated queries and keys

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.kind != "linear" and not self.original_positions:
            raise ValueError(f"rope scaling of kind {self.kind} needs original_positions")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor "
                f"{self.high_freq_factor:g}"
            )
        return self


class AttentionSpec(BaseModel):
    """Attention of every layer.

    `gqa` is grouped-query attention (multi-head when num_kv_heads == num_heads); `mla` is
    DeepSeek's multi-head latent attention, whose `head_dim` is the value head's and whose query
    and key heads are `qk_nope_head_dim + qk_rope_head_dim` wide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gqa", "mla"] = "gqa"
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rope_theta: float | None = None  # None: no position encoding (the reference model)
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = False  # the checkpoint pairs elements 2i, 2i + 1, not i, i + D / 2
    rotary_dim: int | None = None  # GQA: the first elements of a head are rotated; None: all
    score_factor: float = 1.0  # multiplies the scores, beside 1 / sqrt(width of a query head)
    window: int | None = Field(default=None, gt=0)  # positions a query sees, its own included
    window_layers: tuple[int, ...] = ()  # layers the window holds for
    sinks: bool = False  # gpt-oss: a learned score per head that takes part in the softmax only
    qkv_bias: bool = False  # MLA: of the two projections that reduce
    output_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm on each query and key head
    q_lora_rank: int | None = None  # MLA; None: full-rank query projection
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0

    @property
    def rotated_dim(self) -> int:
        """Elements of a query or key head that position encoding rotates."""
        if self.kind == "mla":
            return self.qk_rope_head_dim
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer (absolute number); None is no limit."""
        return self.window if layer in self.window_layers else None

    def parameters(self, hidden_size: int) -> int:
        """Return the number of projection weights of one layer."""
        if self.kind == "gqa":
            return hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        qk_dim = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        query = (
            (hidden_size + qk_dim) * self.q_lora_rank if self.q_lora_rank else hidden_size * qk_dim
        )
        latent = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        expand = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.head_dim)
        return query + latent + expand + self.num_heads * self.head_dim * hidden_size

    def kv_elements_per_token(self) -> int:
        """Return the cached elements per token and layer."""
        if self.kind == "gqa":
            return 2 * self.num_kv_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim


class RouterSpec(BaseModel):
    """How logits become experts and weights; the rule itself is `runtime.router.route`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = Field(default=1, ge=1)
    topk_groups: int = Field(default=1, ge=1)
    group_rule: Literal["max", "top2"] = "top2"
    correction_bias: bool = False  # added to the scores, for the choice only
    logit_bias: bool = False  # of the router's projection


class ModelSpec(BaseModel):
    """One Mixture-of-Experts model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    moe_layers: tuple[int, ...] = Field(min_length=1)  # absolute layer numbers, ascending
    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    expert_ffn_size: int = Field(gt=0)
    gated: bool = True  # gate, up and down with SiLU; otherwise up and down with GELU
    expert_bias: bool = False
    swiglu_limit: float | None = Field(default=None, gt=0)  # gpt-oss: see runtime.experts.mlp
    swiglu_alpha: float = 1.702
    shared_ffn_size: int = Field(default=0, ge=0)  # the shared experts as one gated MLP
    shared_gate: bool = False  # Qwen2: a sigmoid of the token weighs the shared experts
    dense_ffn_size: int = Field(default=0, ge=0)  # MLP of the layers that are not MoE
    vocab_size: int = Field(default=0, ge=0)
    tied_embeddings: bool = False  # the output head is the embedding
    norm_epsilon: float = Field(default=1e-6, gt=0)
    attention: AttentionSpec
    router: RouterSpec = RouterSpec()
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # activations and transfers
    weight_bytes: float = Field(gt=0)  # per weight, as stored: 2 for fp16, 1 for fp8

    @model_validator(mode="after")
    def _check(self) -> "ModelSpec":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise ValueError("moe_layers must ascend without repetition")
        if not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < self.num_layers:
            raise ValueError(f"moe_layers must lie within 0..{self.num_layers - 1}")
        if len(self.moe_layers) < self.num_layers and not self.dense_ffn_size:
            raise ValueError("layers that are not MoE need dense_ffn_size")
        if self.num_experts % self.router.groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of router.groups "
                f"{self.router.groups}"
            )
        reachable = self.num_experts // self.router.groups * self.router.topk_groups
        if self.router.topk_groups > self.router.groups or self.top_k > reachable:
            raise ValueError(
                f"top_k {self.top_k} cannot be chosen from {self.router.topk_groups} of "
                f"{self.router.groups} groups of {self.num_experts // self.router.groups} experts"
            )
        if self.attention.num_heads % self.attention.num_kv_heads:
            raise ValueError(
                f"attention.num_heads {self.attention.num_heads} is not a multiple of "
                f"num_kv_heads {self.attention.num_kv_heads}"
            )
        attention = self.attention
        if attention.rope_theta is not None and attention.rotated_dim % 2:
            raise ValueError(
                f"position encoding rotates pairs, and {attention.rotated_dim} elements are odd"
            )
        if attention.rotated_dim > max(attention.head_dim, attention.qk_rope_head_dim):
            raise ValueError(
                f"attention.rotary_dim {attention.rotary_dim} exceeds head_dim {attention.head_dim}"
            )
        if attention.kind == "mla" and not (attention.kv_lora_rank and attention.qk_nope_head_dim):
            raise ValueError("attention of kind mla needs kv_lora_rank and qk_nope_head_dim")
        if attention.kind == "mla" and (attention.sinks or attention.qk_norm):
            raise ValueError("attention of kind mla has neither sinks nor qk_norm")
        if attention.kind == "gqa" and attention.rope_interleaved:
            raise ValueError("rope_interleaved is of attention of kind mla only")
        if not self.gated and (self.expert_bias or self.swiglu_limit):
            raise ValueError("expert_bias and swiglu_limit need gated experts")
        if self.shared_gate and not self.shared_ffn_size:
            raise ValueError("shared_gate needs shared_ffn_size")
        return self

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts."""
        return len(self.moe_layers)

    @property
    def expert_bytes(self) -> int:
        """Memory of one expert of one layer, in bytes."""
        matrices = 3 if self.gated else 2
        weights = matrices * self.hidden_size * self.expert_ffn_size
        biases = 2 * self.expert_ffn_size + self.hidden_size if self.expert_bias else 0
        return round((weights + biases) * self.weight_bytes)

    @property
    def expert_flops_per_row(self) -> int:
        """Floating-point operations of one token through one expert (a multiply-add is two)."""
        return 2 * (3 if self.gated else 2) * self.hidden_size * self.expert_ffn_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one hidden vector on the wire."""
        return self.hidden_size * DTYPE_BYTES[self.dtype]

    @property
    def replicated_bytes(self) -> int:
        """Bytes every rank holds whatever the placement: all weights but the routed experts.

        Attention and shared weights are replicated (attention is data parallel under expert
        parallelism), embedding and output head included.
        """
        attention = self.num_layers * self.attention.parameters(self.hidden_size)
        routers = self.num_moe_layers * self.num_experts * self.hidden_size
        shared = 3 * self.hidden_size * self.shared_ffn_size * self.num_moe_layers
        dense_layers = self.num_layers - self.num_moe_layers
        dense = 3 * self.hidden_size * self.dense_ffn_size * dense_layers
        vocabulary = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        weights = attention + routers + shared + dense + vocabulary
        return round(weights * self.weight_bytes)

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value cache of one token over all layers, in bytes."""
        return self.num_layers * self.attention.kv_elements_per_token() * DTYPE_BYTES[self.dtype]

    def with_overrides(
        self, *, experts: int | None = None, layers: int | None = None, scale: float | None = None
    ) -> "ModelSpec":
        """Return the spec with fewer or more experts, its first `layers` layers, or scaled widths.

        `scale` multiplies hidden size, FFN sizes and head width; counts (layers, heads, experts)
        stay, so that a scaled model has the placement problem of the full one.

        Raises:
            InputError: the result is no model (no MoE layer left, a width of 0, top_k too large).
        """
        fields = self.model_dump()
        if experts is not None:
            fields["num_experts"] = experts
        if layers is not None:
            fields["num_layers"] = layers
            fields["moe_layers"] = tuple(layer for layer in self.moe_layers if layer < layers)
            if not fields["moe_layers"]:
                raise InputError(
                    f"the first {layers} layers of model {self.name} have no experts",
                    hints=[f"its first MoE layer is {self.moe_layers[0]}: take --layers above it"],
                )
        if scale is not None:
            fields = _scaled(fields, scale)
        return validate(ModelSpec, fields, f"model {self.name} with overrides")


def _scaled(fields: dict[str, Any], scale: float) -> dict[str, Any]:
    """Scale all widths; head widths stay even, because position encoding pairs their elements."""
    attention = dict(fields["attention"])
    for name in _HEAD_WIDTHS:
        if attention[name]:
            attention[name] = max(2, round(attention[name] * scale / 2) * 2)
    widths = {
        name: max(8, round(fields[name] * scale / 8) * 8)
        for name in ("hidden_size", "expert_ffn_size", "shared_ffn_size", "dense_ffn_size")
        if fields[name]
    }
    return {**fields, **widths, "attention": attention}


def bundled_models() -> list[str]:
    """Return the names of the models that come with epplan."""
    return sorted(_bundled())


def _bundled() -> dict[str, Traversable]:
    entries = resources.files("epplan.planner.models").iterdir()
    files = [entry for entry in entries if entry.name.endswith((".yaml", ".json"))]
    return {Path(entry.name).stem: entry for entry in files}


def load_model(source: str) -> ModelSpec:
    """Return the model named, or the one in a YAML spec or Hugging Face `config.json`.

    Raises:
        InputError: unknown name, unknown architecture or an invalid file.
    """
    bundled = _bundled().get(source)
    if bundled is not None:
        return _parse_model(bundled.read_text(encoding="utf-8"), f"bundled model {source}")
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise InputError(
            f"unknown model: {source}",
            hints=[
                f"bundled models: {', '.join(bundled_models())}",
                "or give the path of a Hugging Face config.json or of a YAML model spec",
            ],
        )
    return _parse_model(read_text(path, "model file"), f"model file {path}")


def _parse_model(text: str, what: str) -> ModelSpec:
    document = parse_yaml(text, what)
    if not isinstance(document, dict):
        raise InputError(f"{what} holds no mapping at its top level")
    fields = spec_fields(document, what) if is_huggingface_config(document) else document
    return validate(ModelSpec, fields, what)
