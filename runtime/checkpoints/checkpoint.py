"""Weights from a Hugging Face checkpoint: each tensor is read when it is asked for.

A rank asks for its own experts only, so nothing else of the routed experts is read. Shapes are as
in `weights`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text
from epplan.planner.huggingface import language_config
from epplan.planner.model import ModelSpec, load_model
from epplan.runtime.layer.attention import attention_shapes
from epplan.runtime.layer.experts import MlpWeights
from epplan.runtime.layer.rope import half_split_order

from . import families
from .families import FAMILIES, MoeNames, attention_name
from .tensor_files import FLOATS, SCALE, TensorFiles, TensorReader

_MAX_NAMED = 20  # of a kind of problem; a wrong model has thousands
_NOT_COMPARED = {"name", "dtype", "weight_bytes"}
_UNUSED = ".rotary_emb.inv_freq"  # older checkpoints; computed here
_STORED_BYTES = ("_blocks", "_scales")  # of MXFP4


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWeights:
    """The weights of a checkpoint folder; nothing is kept."""

    spec: ModelSpec
    names: MoeNames
    reader: TensorReader

    @property
    def device(self) -> torch.device:
        """Where tensors are put."""
        return self.reader.device

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are given as."""
        return self.reader.dtype

    def embedding(self) -> Tensor:
        """Return embedding_VH."""
        return self.reader.tensor(families.EMBEDDING)

    def output_head(self) -> Tensor:
        """Return head_VH; the embedding itself where the model ties them."""
        tied = self.spec.tied_embeddings
        return self.reader.tensor(families.EMBEDDING if tied else families.OUTPUT_HEAD)

    def final_norm(self) -> Tensor:
        """Return gain_H of the norm before the output head."""
        return self.reader.tensor(families.FINAL_NORM)

    def input_norm(self, layer: int) -> Tensor:
        """Return gain_H of the norm before attention."""
        return self.reader.tensor(_below(layer, families.INPUT_NORM))

    def post_attention_norm(self, layer: int) -> Tensor:
        """Return gain_H of the norm before the experts or the MLP."""
        return self.reader.tensor(_below(layer, families.POST_ATTENTION_NORM))

    def attention(self, layer: int) -> dict[str, Tensor]:
        """Return projections, biases, gains and sinks by the names of `attention_shapes`."""
        spec = self.spec.attention
        tensors = {
            name: self.reader.tensor(_attention(layer, name, self.spec))
            for name in attention_shapes(spec, self.spec.hidden_size)
        }
        if spec.rope_interleaved:
            for name, heads in (("query", spec.num_heads), ("latent", 1), ("latent.bias", 1)):
                if name in tensors:
                    tensors[name] = _split_pairs(tensors[name], heads, spec.rotated_dim)
        return tensors

    def router(self, layer: int) -> Tensor:
        """Return router_EH, float32 whatever the model's dtype."""
        return self.reader.tensor(self._router(layer, "weight"), dtype=torch.float32)

    def router_logit_bias(self, layer: int) -> Tensor | None:
        """Return the bias_E of the router's projection, float32."""
        if not self.spec.router.logit_bias:
            return None
        return self.reader.tensor(self._router(layer, "bias"), dtype=torch.float32)

    def router_bias(self, layer: int) -> Tensor | None:
        """Return the correction bias_E, float32."""
        if not self.spec.router.correction_bias:
            return None
        name = self._router(layer, "e_score_correction_bias")
        return self.reader.tensor(name, dtype=torch.float32)

    def expert(self, layer: int, expert: int) -> MlpWeights:
        """Return the weights of one expert."""
        prefix = _below(layer, f"{self.names.block}.experts")
        return self.names.experts.read(self.reader, prefix, expert, self.spec)

    def shared_expert(self, layer: int) -> MlpWeights | None:
        """Return the shared experts as one gated MLP."""
        if not self.spec.shared_ffn_size:
            return None
        return self._mlp(_below(layer, f"{self.names.block}.{self.names.shared}"))

    def shared_gate(self, layer: int) -> Tensor | None:
        """Return gate_1H, whose sigmoid weighs the shared experts."""
        if not self.spec.shared_gate:
            return None
        return self.reader.tensor(_shared_gate(layer, self.names))

    def dense_mlp(self, layer: int) -> MlpWeights:
        """Return the MLP of a layer without experts."""
        return self._mlp(_below(layer, families.DENSE_MLP))

    def _router(self, layer: int, kind: str) -> str:
        return _below(layer, f"{self.names.block}.{self.names.router}.{kind}")

    def _mlp(self, prefix: str) -> MlpWeights:
        gate, up, down = (self.reader.tensor(f"{prefix}.{name}.weight") for name in families.MLP)
        return MlpWeights(gate_FH=gate, up_FH=up, down_HF=down)


def open_checkpoint(
    folder: Path, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype
) -> CheckpointWeights:
    """Return the weights in `folder`, of which only names have been read.

    Args:
        folder: holds config.json, the index and the files.
        spec: of the plan; the checkpoint's must be the same.
        device: where tensors are put.
        dtype: what they are given as.

    Raises:
        InputError: no checkpoint, files missing or damaged, or another model than the plan's.
    """
    document = parse_yaml(read_text(folder / "config.json", "configuration"), f"{folder}")
    own = load_model(str(folder.absolute()))
    differences = _differences(spec, own)
    if differences:
        raise InputError(
            f"checkpoint {folder} is of another model than the plan",
            problems=differences,
            hints=[f"make the plan with `epplan solve --model {folder} ...`"],
        )
    files = TensorFiles(folder)
    config = language_config(document)
    block = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return CheckpointWeights(
        spec=spec,
        names=_names(str(config["model_type"]), spec, files),
        reader=TensorReader(files=files, device=device, dtype=dtype, fp8_block=tuple(block)),
    )


def checkpoint_problems(weights: CheckpointWeights) -> list[str]:
    """Return all tensors that are missing, have another shape or type, or have no use.

    Layers beyond the model's (multi-token prediction) are no problem.
    """
    files, spec = weights.reader.files, weights.spec
    expected = dict(_expected(spec, weights.names))
    missing, wrong = [], []
    for name, shape in expected.items():
        if name not in files.names:
            missing.append(f"{name}: missing")
        elif files.shape(name) != shape:
            wrong.append(f"{name}: {list(files.shape(name))}, the model has {list(shape)}")
        elif files.kind(name) not in FLOATS and not name.endswith(_STORED_BYTES):
            wrong.append(f"{name}: type {files.kind(name)}, not one of {', '.join(FLOATS)}")
    scales = {name + SCALE for name in expected if _is_fp8(files, name)}
    missing += [f"{name}: missing" for name in sorted(scales - set(files.names))]
    extra = [
        f"{name}: not a tensor of this model"
        for name in sorted(set(files.names) - expected.keys() - scales)
        if not _is_ignored(name, spec)
    ]
    return [*_shortened(missing), *_shortened(wrong), *_shortened(extra)]


def _expected(spec: ModelSpec, names: MoeNames) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape on disk of every tensor of the model."""
    hidden = spec.hidden_size
    yield families.EMBEDDING, (spec.vocab_size, hidden)
    yield families.FINAL_NORM, (hidden,)
    if not spec.tied_embeddings:
        yield families.OUTPUT_HEAD, (spec.vocab_size, hidden)
    moe_layers = set(spec.moe_layers)
    for layer in range(spec.num_layers):
        yield _below(layer, families.INPUT_NORM), (hidden,)
        yield _below(layer, families.POST_ATTENTION_NORM), (hidden,)
        for name, shape in attention_shapes(spec.attention, hidden).items():
            yield _attention(layer, name, spec), shape
        if layer in moe_layers:
            yield from _expected_moe(layer, spec, names)
        else:
            yield from _expected_mlp(_below(layer, families.DENSE_MLP), hidden, spec.dense_ffn_size)


def _expected_moe(
    layer: int, spec: ModelSpec, names: MoeNames
) -> Iterator[tuple[str, tuple[int, ...]]]:
    block = _below(layer, names.block)
    router = f"{block}.{names.router}"
    yield f"{router}.weight", (spec.num_experts, spec.hidden_size)
    if spec.router.logit_bias:
        yield f"{router}.bias", (spec.num_experts,)
    if spec.router.correction_bias:
        yield f"{router}.e_score_correction_bias", (spec.num_experts,)
    yield from names.experts.shapes(f"{block}.experts", spec)
    if spec.shared_ffn_size:
        yield from _expected_mlp(f"{block}.{names.shared}", spec.hidden_size, spec.shared_ffn_size)
    if spec.shared_gate:
        yield _shared_gate(layer, names), (1, spec.hidden_size)


def _expected_mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = families.MLP
    yield f"{prefix}.{gate}.weight", (width, hidden)
    yield f"{prefix}.{up}.weight", (width, hidden)
    yield f"{prefix}.{down}.weight", (hidden, width)


def _names(family: str, spec: ModelSpec, files: TensorFiles) -> MoeNames:
    """Return the names this checkpoint has for experts; the hub's if it has none."""
    for names in FAMILIES[family]:
        prefix = _below(spec.moe_layers[0], f"{names.block}.experts")
        first, _ = next(names.experts.shapes(prefix, spec))
        if first in files.names:
            return names
    return FAMILIES[family][0]


def _below(layer: int, name: str) -> str:
    return f"{families.LAYERS}.{layer}.{name}"


def _attention(layer: int, name: str, spec: ModelSpec) -> str:
    return _below(layer, f"{families.ATTENTION}.{attention_name(name, spec.attention)}")


def _shared_gate(layer: int, names: MoeNames) -> str:
    return _below(layer, f"{names.block}.{names.shared}_gate.weight")


def _split_pairs(rows: Tensor, heads: int, rotated_dim: int) -> Tensor:
    """Return the rows of a projection with the last `rotated_dim` of each head in half order."""
    width = rows.shape[0] // heads
    kept = width - rotated_dim
    order = [*range(kept), *(kept + row for row in half_split_order(rotated_dim))]
    of_head = torch.tensor(order, device=rows.device)
    return torch.unflatten(rows, 0, (heads, width))[:, of_head].flatten(0, 1)


def _differences(planned: ModelSpec, own: ModelSpec) -> list[str]:
    """Return every field in which the checkpoint's model differs from the plan's."""
    of_plan, of_checkpoint = _flat(planned.model_dump()), _flat(own.model_dump())
    return [
        f"{field}: {of_plan[field]} in the plan, {value} in the checkpoint"
        for field, value in of_checkpoint.items()
        if of_plan[field] != value
    ]


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, value in fields.items():
        if field in ("attention", "router"):
            flat |= {f"{field}.{inner}": part for inner, part in value.items()}
        elif field not in _NOT_COMPARED:
            flat[field] = value
    return flat


def _is_fp8(files: TensorFiles, name: str) -> bool:
    return name in files.names and files.kind(name) == "F8_E4M3"


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    if name.endswith(_UNUSED) or (spec.tied_embeddings and name == families.OUTPUT_HEAD):
        return True
    layer = name.removeprefix(f"{families.LAYERS}.").partition(".")[0]
    return layer.isdecimal() and int(layer) >= spec.num_layers


def _shortened(problems: list[str]) -> list[str]:
    if len(problems) <= _MAX_NAMED:
        return problems
    kind = problems[0].partition(": ")[2].partition(",")[0]
    return [*problems[:_MAX_NAMED], f"... and {len(problems) - _MAX_NAMED} more like this: {kind}"]
