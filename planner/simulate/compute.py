"""The computing of a layer: its parts as work of a GPU.

Rows are tokens of one micro-batch. A share of a layer (tensor parallelism) has a part of the heads
and of every MLP's width, and all rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.planner.model import DTYPE_BYTES, AttentionSpec, ModelSpec

from .device import Device
from .scene import Phase
from .work import Work

Floats = npt.NDArray[np.float64]
# Beside its two products, an expert that is picked with a mask and launched piece by piece costs
# the host this much: (4.491 - 1.436) ms over 2 layers x 16 experts in data/one-rank-h200.yaml.
NAIVE_EXPERT_S = 95e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the model's layers on one GPU: all of it, or one of `tp` shares."""

    model: ModelSpec
    tp: int = 1
    norm_share: float = 1.0  # of the tokens that this part normalises (sequence parallelism)

    @property
    def heads(self) -> AttentionSpec:
        """The attention heads of this part; latents belong to all heads and are not split."""
        spec = self.model.attention
        heads = max(1, spec.num_heads // self.tp)
        kv = heads if spec.kind == "mla" else max(1, spec.num_kv_heads // self.tp)
        return spec.model_copy(update={"num_heads": heads, "num_kv_heads": min(kv, heads)})

    @property
    def kv_bytes(self) -> float:
        """Cache bytes of a position in one layer."""
        return self.heads.kv_elements_per_token() * DTYPE_BYTES[self.model.dtype]

    @property
    def attention_weights(self) -> float:
        """Projection weights of one layer."""
        return self.model.attention.parameters(self.model.hidden_size) / self.tp


def attention(part: Part, device: Device, phase: Phase, sequences: Floats, context: int) -> Work:
    """Return norm, projections and attention of one layer, [ranks]."""
    model = part.model
    tokens = sequences * (context if phase == "prefill" else 1)
    width = model.hidden_size + part.heads.num_heads * part.heads.head_dim
    work = device.norm_rows(tokens * part.norm_share, model.row_bytes)
    work += device.linear(part.attention_weights, tokens, model.weight_bytes, 2 * width)
    if phase == "prefill":
        return work + device.prefill_attention(part.heads, sequences, context)
    if context == 0:
        return work
    return work + device.decode_attention(part.heads, sequences, context, part.kv_bytes)


def route(part: Part, device: Device, tokens: Floats) -> Work:
    """Return norm, router and the sorting of rows by expert, [ranks]."""
    model = part.model
    work = device.norm_rows(tokens * part.norm_share, model.row_bytes)
    weights = model.num_experts * model.hidden_size
    work += device.linear(weights, tokens, model.weight_bytes, model.hidden_size)
    # Scores, choice, sort and counts: small kernels, then the rows themselves.
    work += device.launches(8, len(tokens), eager=False)
    return work + device.move_rows(tokens * model.top_k, model.row_bytes)


def unsort(part: Part, device: Device, tokens: Floats) -> Work:
    """Return bringing results back into token order and adding them up, [ranks]."""
    return device.move_rows(tokens * part.model.top_k, part.model.row_bytes)


def experts(part: Part, device: Device, rows: Floats, *, naive: bool) -> Work:
    """Return the routed experts' work for the rows of every one, [expert copies]."""
    model = part.model
    ffn = max(1, model.expert_ffn_size // part.tp)
    work = device.mlp(model.hidden_size, ffn, model.gated, rows, model.weight_bytes)
    if naive:
        none = np.zeros_like(rows)
        host = np.full_like(rows, NAIVE_EXPERT_S)
        work += Work(arithmetic_s=none, memory_s=none, launch_s=host, flops=none, hbm_bytes=none)
    return work


def gated_mlp(part: Part, device: Device, ffn: int, tokens: Floats) -> Work:
    """Return the shared experts' or a dense layer's work, [ranks]."""
    hidden, weight_bytes = part.model.hidden_size, part.model.weight_bytes
    return device.mlp(hidden, max(1, ffn // part.tp), True, tokens, weight_bytes)


def head(part: Part, device: Device, sequences: Floats) -> Work:
    """Return the output head's work: one position of every sequence, [ranks]."""
    model = part.model
    weights = model.vocab_size * model.hidden_size / part.tp
    if not weights:
        return Work.nothing(len(sequences))
    return device.linear(weights, sequences, model.weight_bytes, model.hidden_size)
