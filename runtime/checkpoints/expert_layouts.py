"""How the routed experts of a layer lie in a checkpoint, and how one of them is read.

Shapes: E experts, H hidden size, F width of an expert, G groups of 32 inputs.

Nothing but the one expert is read, also where all experts of a layer are one tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.runtime.layer.experts import MlpWeights

from .quantized import dequantize_mxfp4
from .tensor_files import TensorReader

_GROUP = 32
Shape = tuple[int, ...]


class ExpertLayout(Protocol):
    """The experts of a layer below a prefix such as `model.layers.3.mlp.experts`."""

    def shapes(self, prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
        """Yield the name and shape on disk of every tensor."""

    def read(self, reader: TensorReader, prefix: str, expert: int, spec: ModelSpec) -> MlpWeights:
        """Return one expert."""


@dataclass(frozen=True, slots=True)
class PerExpert:
    """Three matrices of each expert: what the hub has for all families but gpt-oss."""

    gate: str
    up: str
    down: str

    def shapes(self, prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
        """Yield the name and shape of every expert's matrices."""
        hidden, width = spec.hidden_size, spec.expert_ffn_size
        for expert in range(spec.num_experts):
            yield f"{prefix}.{expert}.{self.gate}.weight", (width, hidden)
            yield f"{prefix}.{expert}.{self.up}.weight", (width, hidden)
            yield f"{prefix}.{expert}.{self.down}.weight", (hidden, width)

    def read(self, reader: TensorReader, prefix: str, expert: int, spec: ModelSpec) -> MlpWeights:
        """Return one expert."""
        return MlpWeights(
            gate_FH=reader.tensor(f"{prefix}.{expert}.{self.gate}.weight"),
            up_FH=reader.tensor(f"{prefix}.{expert}.{self.up}.weight"),
            down_HF=reader.tensor(f"{prefix}.{expert}.{self.down}.weight"),
        )


@dataclass(frozen=True, slots=True)
class Fused:
    """All experts in two tensors, gates before ups: what transformers 5 has in memory."""

    def shapes(self, prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
        """Yield the two tensors."""
        hidden, width = spec.hidden_size, spec.expert_ffn_size
        yield f"{prefix}.gate_up_proj", (spec.num_experts, 2 * width, hidden)
        yield f"{prefix}.down_proj", (spec.num_experts, hidden, width)

    def read(self, reader: TensorReader, prefix: str, expert: int, spec: ModelSpec) -> MlpWeights:
        """Return one expert."""
        width = spec.expert_ffn_size
        return MlpWeights(
            gate_FH=reader.tensor(f"{prefix}.gate_up_proj", expert, slice(0, width)),
            up_FH=reader.tensor(f"{prefix}.gate_up_proj", expert, slice(width, 2 * width)),
            down_HF=reader.tensor(f"{prefix}.down_proj", expert),
        )


@dataclass(frozen=True, slots=True)
class GptOss:
    """gpt-oss: transposed, gates and ups in turn, with biases."""

    def shapes(self, prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
        """Yield the two tensors and their biases."""
        experts, hidden, width = spec.num_experts, spec.hidden_size, spec.expert_ffn_size
        yield f"{prefix}.gate_up_proj", (experts, hidden, 2 * width)
        yield f"{prefix}.down_proj", (experts, width, hidden)
        yield from _gpt_oss_biases(prefix, spec)

    def read(self, reader: TensorReader, prefix: str, expert: int, spec: ModelSpec) -> MlpWeights:
        """Return one expert."""
        both = reader.tensor(f"{prefix}.gate_up_proj", expert).T
        down_HF = reader.tensor(f"{prefix}.down_proj", expert).T.contiguous()
        return _gpt_oss_mlp(reader, prefix, expert, spec, both, down_HF)


@dataclass(frozen=True, slots=True)
class GptOssMxfp4:
    """gpt-oss as published: MXFP4 blocks, gates and ups in turn, with biases."""

    def shapes(self, prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
        """Yield blocks and scales of the two tensors, and their biases."""
        experts, hidden, width = spec.num_experts, spec.hidden_size, spec.expert_ffn_size
        for name, outputs, inputs in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
            groups = inputs // _GROUP
            yield f"{prefix}.{name}_proj_blocks", (experts, outputs, groups, _GROUP // 2)
            yield f"{prefix}.{name}_proj_scales", (experts, outputs, groups)
        yield from _gpt_oss_biases(prefix, spec)

    def read(self, reader: TensorReader, prefix: str, expert: int, spec: ModelSpec) -> MlpWeights:
        """Return one expert."""
        both, down_HF = (
            dequantize_mxfp4(
                reader.raw(f"{prefix}.{name}_proj_blocks", expert),
                reader.raw(f"{prefix}.{name}_proj_scales", expert),
                reader.dtype,
            )
            for name in ("gate_up", "down")
        )
        return _gpt_oss_mlp(reader, prefix, expert, spec, both, down_HF)


def _gpt_oss_biases(prefix: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_up_proj_bias", (spec.num_experts, 2 * spec.expert_ffn_size)
    yield f"{prefix}.down_proj_bias", (spec.num_experts, spec.hidden_size)


def _gpt_oss_mlp(
    reader: TensorReader,
    prefix: str,
    expert: int,
    spec: ModelSpec,
    both: Tensor,
    down_HF: Tensor,
) -> MlpWeights:
    """Return one expert of gates and ups in turn, [2F, H]."""
    bias = reader.tensor(f"{prefix}.gate_up_proj_bias", expert)
    return MlpWeights(
        gate_FH=both[::2].contiguous(),
        up_FH=both[1::2].contiguous(),
        down_HF=down_HF,
        gate_bias_F=bias[::2].contiguous(),
        up_bias_F=bias[1::2].contiguous(),
        down_bias_H=reader.tensor(f"{prefix}.down_proj_bias", expert),
        limit=spec.swiglu_limit,
        alpha=spec.swiglu_alpha,
    )
