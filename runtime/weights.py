"""Where weights come from; and seeded ones: every tensor is a function of its name alone.

A rank builds only its own experts, the dense model builds one expert at a time, and both get the
same numbers. torch's own generators would not do: what they draw on a GPU depends on its number of
multiprocessors, so that ranks on different GPU models would disagree. Here each element is an
integer hash of its index and of the tensor's key, exact on every device.

Shapes: H hidden size, E experts, F width of an MLP, V vocabulary.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.runtime.layer.attention import attention_shapes
from epplan.runtime.layer.experts import MlpWeights

# Elements hashed at a time: in a core's cache, or enough to fill a GPU.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}
# Logits of unit RMS hidden states have this standard deviation: every expert gets its share, and
# scores differ enough for a choice to be clear.
_LOGIT_STD = 1.0
_BIAS_STD = 0.05  # against sigmoid scores about 0.5: changes some choices, rules none out


class Weights(Protocol):
    """The weights of a model, on demand: what is not asked for is neither built nor read.

    `layer` is the absolute layer number everywhere. Tensors are on `device`, in `dtype` unless
    said otherwise. None is a part the model does not have, or a gain of ones.
    """

    @property
    def spec(self) -> ModelSpec:
        """The model."""

    @property
    def device(self) -> torch.device:
        """Where tensors are put."""

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are given as."""

    def embedding(self) -> Tensor:
        """Return embedding_VH."""

    def output_head(self) -> Tensor:
        """Return head_VH; the embedding itself where the model ties them."""

    def final_norm(self) -> Tensor | None:
        """Return gain_H of the norm before the output head."""

    def input_norm(self, layer: int) -> Tensor | None:
        """Return gain_H of the norm before attention."""

    def post_attention_norm(self, layer: int) -> Tensor | None:
        """Return gain_H of the norm before the experts or the MLP."""

    def attention(self, layer: int) -> dict[str, Tensor]:
        """Return projections, biases, gains and sinks by the names of `attention_shapes`."""

    def router(self, layer: int) -> Tensor:
        """Return router_EH, float32 whatever the model's dtype."""

    def router_logit_bias(self, layer: int) -> Tensor | None:
        """Return the bias_E of the router's projection, float32."""

    def router_bias(self, layer: int) -> Tensor | None:
        """Return the correction bias_E added to scores for the choice only, float32."""

    def expert(self, layer: int, expert: int) -> MlpWeights:
        """Return the weights of one expert."""

    def shared_expert(self, layer: int) -> MlpWeights | None:
        """Return the shared experts as one gated MLP."""

    def shared_gate(self, layer: int) -> Tensor | None:
        """Return gate_1H, whose sigmoid weighs the shared experts."""

    def dense_mlp(self, layer: int) -> MlpWeights:
        """Return the MLP of a layer without experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededWeights:
    """Weights drawn from a seed; gains are 1. Nothing is kept."""

    spec: ModelSpec
    seed: int
    device: torch.device
    dtype: torch.dtype
    router_skew: float = 0.0  # standard deviation of what logits prefer experts by

    def embedding(self) -> Tensor:
        """Return embedding_VH of unit variance."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        key = f"{self.seed}/embedding"
        return seeded_tensor(key, shape, std=1.0, device=self.device, dtype=self.dtype)

    def output_head(self) -> Tensor:
        """Return head_VH."""
        if self.spec.tied_embeddings:
            return self.embedding()
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        std = 1 / math.sqrt(self.spec.hidden_size)
        key = f"{self.seed}/output_head"
        return seeded_tensor(key, shape, std=std, device=self.device, dtype=self.dtype)

    def final_norm(self) -> None:
        """Return no gain."""

    def input_norm(self, layer: int) -> None:
        """Return no gain."""

    def post_attention_norm(self, layer: int) -> None:
        """Return no gain."""

    def attention(self, layer: int) -> dict[str, Tensor]:
        """Return projections, biases and sinks of one layer, by name."""
        shapes = attention_shapes(self.spec.attention, self.spec.hidden_size)
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 2:
                tensors[name] = self._matrix(layer, name, shape)
            elif not name.endswith("_norm"):
                std = 1.0 if name == "sinks" else _BIAS_STD
                tensors[name] = self._seeded(layer, name, shape, std, self.dtype)
        return tensors

    def router(self, layer: int) -> Tensor:
        """Return router_EH, float32 whatever the model's dtype."""
        shape = (self.spec.num_experts, self.spec.hidden_size)
        std = _LOGIT_STD / math.sqrt(self.spec.hidden_size)
        return self._seeded(layer, "router", shape, std, torch.float32)

    def router_logit_bias(self, layer: int) -> Tensor | None:
        """Return bias_E, float32, for models whose router's projection has one, and for skew.

        Of a token's experts by `softmax(logits)` one with bias b has exp(b) times the chances:
        normal biases make lognormal popularity.
        """
        std = self.router_skew or (_BIAS_STD if self.spec.router.logit_bias else 0.0)
        if not std:
            return None
        shape = (self.spec.num_experts,)
        return self._seeded(layer, "router_logit_bias", shape, std, torch.float32)

    def router_bias(self, layer: int) -> Tensor | None:
        """Return bias_E, float32, for models with a correction bias."""
        if not self.spec.router.correction_bias:
            return None
        shape = (self.spec.num_experts,)
        return self._seeded(layer, "router_bias", shape, _BIAS_STD, torch.float32)

    def expert(self, layer: int, expert: int) -> MlpWeights:
        """Return the weights of one expert."""
        name, width = f"expert{expert}", self.spec.expert_ffn_size
        weights = self._mlp(layer, name, width, self.spec.gated)
        weights = replace(weights, limit=self.spec.swiglu_limit, alpha=self.spec.swiglu_alpha)
        if not self.spec.expert_bias:
            return weights
        return replace(
            weights,
            gate_bias_F=self._bias(layer, f"{name}.gate.bias", width),
            up_bias_F=self._bias(layer, f"{name}.up.bias", width),
            down_bias_H=self._bias(layer, f"{name}.down.bias", self.spec.hidden_size),
        )

    def shared_expert(self, layer: int) -> MlpWeights | None:
        """Return the shared experts as one gated MLP, for models that have them."""
        if not self.spec.shared_ffn_size:
            return None
        return self._mlp(layer, "shared", self.spec.shared_ffn_size, gated=True)

    def shared_gate(self, layer: int) -> Tensor | None:
        """Return gate_1H, for models that weigh their shared experts."""
        if not self.spec.shared_gate:
            return None
        return self._matrix(layer, "shared_gate", (1, self.spec.hidden_size))

    def dense_mlp(self, layer: int) -> MlpWeights:
        """Return the MLP of a layer without experts."""
        return self._mlp(layer, "dense", self.spec.dense_ffn_size, gated=True)

    def _mlp(self, layer: int, name: str, width: int, gated: bool) -> MlpWeights:
        up_shape, down_shape = (width, self.spec.hidden_size), (self.spec.hidden_size, width)
        return MlpWeights(
            gate_FH=self._matrix(layer, f"{name}.gate", up_shape) if gated else None,
            up_FH=self._matrix(layer, f"{name}.up", up_shape),
            down_HF=self._matrix(layer, f"{name}.down", down_shape),
        )

    def _bias(self, layer: int, name: str, width: int) -> Tensor:
        return self._seeded(layer, name, (width,), _BIAS_STD, self.dtype)

    def _matrix(self, layer: int, name: str, shape: Sequence[int]) -> Tensor:
        """Return a projection, [out, in], that keeps the variance of its input."""
        return self._seeded(layer, name, shape, 1 / math.sqrt(shape[1]), self.dtype)

    def _seeded(
        self, layer: int, name: str, shape: Sequence[int], std: float, dtype: torch.dtype
    ) -> Tensor:
        key = f"{self.seed}/{layer}/{name}"
        return seeded_tensor(key, shape, std=std, device=self.device, dtype=dtype)


def seeded_hidden(
    seed: int,
    rank: int,
    shape: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return the input hidden states of a rank, [sequences, positions, H], of unit variance."""
    hidden = torch.empty(*shape, device=device, dtype=dtype)
    for sequence, out in enumerate(hidden):
        key = f"{seed}/input/{rank}/{sequence}"
        out.copy_(seeded_tensor(key, out.shape, std=1.0, device=device, dtype=dtype))
    return hidden


def seeded_tokens(
    seed: int, rank: int, shape: tuple[int, int], vocabulary: int, *, device: torch.device
) -> Tensor:
    """Return the input tokens of a rank, [sequences, positions], int64."""
    keys = _keys(f"{seed}/tokens/{rank}")
    words = torch.arange(math.prod(shape), dtype=torch.int32, device=device)
    return (_hash(words, keys).long() % vocabulary).view(shape)


def seeded_tensor(
    key: str, shape: Sequence[int], *, std: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a tensor of uniform numbers with mean 0, the same on every device.

    Args:
        key: its name; another key gives independent numbers.
        shape: of fewer than 2**31 elements.
        std: standard deviation.
    """
    keys = _keys(key)
    flat = torch.empty(math.prod(shape), device=device, dtype=dtype)
    assert flat.numel() < 1 << 31, (key, shape)
    scale = std * math.sqrt(3) / 2**31  # uniform on [-a, a] has standard deviation a / sqrt(3)
    chunk = _CHUNK[device.type]
    for first in range(0, flat.numel(), chunk):
        last = min(first + chunk, flat.numel())
        words = torch.arange(first, last, dtype=torch.int32, device=device)
        flat[first:last] = _hash(words, keys).to(torch.float32).mul_(scale)
    return flat.view(*shape)


def _keys(key: str) -> tuple[int, ...]:
    return struct.unpack("<3i", hashlib.blake2b(key.encode(), digest_size=12).digest())


def _hash(words: Tensor, keys: Sequence[int]) -> Tensor:
    """Hash int32 words in place, one round per key; products wrap, shifts are made logical."""
    for key in keys:
        words.bitwise_xor_(key)
        words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(0x45D9F3B)
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))
