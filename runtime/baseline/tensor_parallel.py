"""Tensor parallelism, of the baseline: every rank of a stage holds a slice of every matrix.

Shapes: B sequences, S positions, T = B x S tokens, H hidden size, E experts, K experts per token,
N = T x K rows (padded: E x T), L MoE layers of the stage.

Projections into heads and into an MLP's width are split by rows, those out of them by columns, so
that a rank's output is a part of a sum (Megatron-LM's scheme). All ranks of a stage see all its
tokens and hold a slice of every expert: rows never travel, but two sums do in every layer.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.runtime.clock import PhaseClock, Place
from epplan.runtime.dispatchers.batching import batch
from epplan.runtime.dispatchers.order import count, weighted_sum
from epplan.runtime.dispatchers.padding import pad
from epplan.runtime.layer.attention import attention, attention_step, join_projections
from epplan.runtime.layer.experts import MlpWeights, mlp, run_experts, shared_mlp, stack_experts
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.layer.norm import add_rms_norm
from epplan.runtime.layer.router import route_tokens
from epplan.runtime.pipeline import Point
from epplan.runtime.weights import Weights

# Slices of rows follow heads or the MLP's width; what is not named here is whole on every rank.
_SPLIT_BY_QUERY_HEAD = ("query", "query.bias", "expand", "sinks")
_SPLIT_BY_KV_HEAD = ("key", "key.bias", "value", "value.bias")
# Padding is what a graph costs: a decode step of 512 tokens took two H200 3.6 and 5.1 ms as a graph
# and 7.8 and 7.0 without, one of 1024 6.7 and 9.5 against 7.6 and 9.2 (docs/log.md).
_PADDED_TOKENS = 512
_PADDED_BYTES = 1 << 28  # of all experts' rows: a guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which of `size` slices a rank holds."""

    rank: int
    size: int

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the slice, in memory of its own so that the whole can be freed."""
        width = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * width, width).clone()

    def of_heads(self, tensor: Tensor, num_heads: int) -> Tensor:
        """Return the rows of this shard's heads; of a shared one where there are too few."""
        if num_heads >= self.size:
            return self.of(tensor)
        width = tensor.shape[0] // num_heads
        return tensor.narrow(0, self.rank * num_heads // self.size * width, width).clone()

    def once(self, bias: Tensor | None) -> Tensor | None:
        """Return what must be added to a sum over shards once only: nothing but on the first."""
        return bias if self.rank == 0 else None


def check_shards(spec: ModelSpec, size: int) -> None:
    """Check that every width can be split into `size` slices.

    Raises:
        InputError: all that cannot.
    """
    widths = {
        "hidden_size": spec.hidden_size,
        "attention.num_heads": spec.attention.num_heads,
        "expert_ffn_size": spec.expert_ffn_size,
        "shared_ffn_size": spec.shared_ffn_size,
        "dense_ffn_size": spec.dense_ffn_size,
    }
    problems = [
        f"{name} {width} is not a multiple of {size}"
        for name, width in widths.items()
        if width % size
    ]
    kv_heads = spec.attention.num_kv_heads
    if spec.attention.kind == "gqa" and kv_heads % size and size % kv_heads:
        problems.append(f"attention.num_kv_heads {kv_heads} and {size} do not divide each other")
    if problems:
        raise InputError(f"model {spec.name} cannot be split into {size} shards", problems=problems)


def shard_attention_spec(spec: AttentionSpec, size: int, layers: range) -> AttentionSpec:
    """Return the attention of one of `size` shards, with `layers` numbered from 0."""
    windows = (number - layers.start for number in spec.window_layers if number in layers)
    return spec.model_copy(
        update={
            "num_heads": spec.num_heads // size,
            "num_kv_heads": max(1, spec.num_kv_heads // size),
            "window_layers": tuple(windows),
        }
    )


def shard_attention(
    weights: dict[str, Tensor], spec: AttentionSpec, shard: Shard
) -> dict[str, Tensor]:
    """Return a shard of a layer's tensors, named and shaped as `attention_shapes` says."""
    sharded = {}
    for name, tensor in weights.items():
        if name == "output.bias" and shard.rank != 0:
            continue
        if name in _SPLIT_BY_QUERY_HEAD:
            tensor = shard.of(tensor)
        elif name in _SPLIT_BY_KV_HEAD:
            tensor = shard.of_heads(tensor, spec.num_kv_heads)
        elif name == "output":
            tensor = shard.of(tensor, dim=1)
        sharded[name] = tensor
    return sharded


def shard_mlp(weights: MlpWeights, shard: Shard) -> MlpWeights:
    """Return a shard of an MLP: a part of its width."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else shard.of(tensor)

    return replace(
        weights,
        gate_FH=rows(weights.gate_FH),
        up_FH=shard.of(weights.up_FH),
        down_HF=shard.of(weights.down_HF, dim=1),
        gate_bias_F=rows(weights.gate_bias_F),
        up_bias_F=rows(weights.up_bias_F),
        down_bias_H=shard.once(weights.down_bias_H),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedMoe:
    """A slice of all experts of one layer."""

    router_EH: Tensor  # float32, whole
    logit_bias_E: Tensor | None
    bias_E: Tensor | None
    experts: tuple[MlpWeights | None, ...]  # [E], none of them None
    shared: MlpWeights | None
    shared_gate_1H: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedLayer:
    """A slice of one layer."""

    input_norm_H: Tensor | None
    attention: dict[str, Tensor]
    post_attention_norm_H: Tensor | None
    feed_forward: ShardedMoe | MlpWeights


def build_shard(weights: Weights, numbers: range, shard: Shard) -> list[ShardedLayer]:
    """Return a slice of some layers, built one matrix at a time."""
    spec = weights.spec
    return [
        ShardedLayer(
            input_norm_H=weights.input_norm(number),
            attention=join_projections(
                shard_attention(weights.attention(number), spec.attention, shard)
            ),
            post_attention_norm_H=weights.post_attention_norm(number),
            feed_forward=(
                _build_moe(weights, number, shard)
                if number in spec.moe_layers
                else shard_mlp(weights.dense_mlp(number), shard)
            ),
        )
        for number in numbers
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What a stage makes of one micro-batch."""

    hidden_BSH: Tensor
    experts_LTK: list[Tensor]  # the choice in each MoE layer of the stage


class TensorParallelStage:
    """Some layers of the model, run together with the other shards of the stage.

    Args:
        spec: the whole model.
        numbers: of the layers, absolute.
        layers: this rank's slices of them.
        shard: which.
        group: the ranks that hold the others.
        clock: times phases.
    """

    def __init__(
        self,
        spec: ModelSpec,
        numbers: range,
        layers: list[ShardedLayer],
        shard: Shard,
        group: dist.ProcessGroup,
        clock: PhaseClock,
    ) -> None:
        self._spec = spec
        self._numbers = numbers
        self.attention = shard_attention_spec(spec.attention, shard.size, numbers)
        self.layers = layers
        self._shard = shard
        self._group = group
        self._clock = clock

    def micro_batch(
        self, number: int, x_BSH: Tensor, cache: KvCache | None
    ) -> Generator[Point, None, StageOutput]:
        """Run some sequences through the stage's layers; yields while a sum is under way.

        Args:
            number: of the micro-batch.
            x_BSH: hidden states.
            cache: of these sequences in the stage's layers, numbered from 0.
        """
        step = attention_step(self._spec, x_BSH, cache)
        epsilon = self._spec.norm_epsilon
        choices: list[Tensor] = []
        sum_BSH: Tensor | None = None  # of the layer before, added where the next norm is taken
        for ordinal, layer in enumerate(self.layers):
            place = Place(self._numbers[ordinal], number)
            x_BSH, h_BSH = add_rms_norm(x_BSH, sum_BSH, layer.input_norm_H, epsilon)
            part_BSH = attention(h_BSH, layer.attention, self.attention, step, ordinal)
            self._clock.mark("attention", place)
            sum_BSH = yield from self._sum(part_BSH, place)
            x_BSH, h_BSH = add_rms_norm(x_BSH, sum_BSH, layer.post_attention_norm_H, epsilon)
            h_TH = h_BSH.flatten(0, 1)
            if isinstance(layer.feed_forward, MlpWeights):
                part_TH = mlp(h_TH, layer.feed_forward)
                self._clock.mark("dense_mlp", place)
            else:
                part_TH, experts_TK = self._moe(h_TH, layer.feed_forward, place)
                choices.append(experts_TK)
            sum_BSH = (yield from self._sum(part_TH, place)).view_as(x_BSH)
        if sum_BSH is not None:
            x_BSH = x_BSH + sum_BSH
        return StageOutput(hidden_BSH=x_BSH, experts_LTK=choices)

    def gather(self, slice_BSh: Tensor, place: Place) -> Generator[Point, None, Tensor]:
        """Return [B, S, H], of which every shard has h = H / size columns."""
        size = self._shard.size
        gathered = slice_BSh.new_empty(size * slice_BSh.numel())
        # torch 2.13 renamed the collective and warns about the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = all_gather(gathered, slice_BSh.flatten(), group=self._group, async_op=True)
        yield "sent"
        work.wait()
        self._clock.mark("transfer", place)
        return gathered.view(size, *slice_BSh.shape).movedim(0, 2).flatten(2)

    def _sum(self, part: Tensor, place: Place) -> Generator[Point, None, Tensor]:
        """Return the sum of all shards' parts."""
        part = part.contiguous()
        work = dist.all_reduce(part, group=self._group, async_op=True)
        yield "sent"
        assert work is not None
        work.wait()
        self._clock.mark("all_reduce", place)
        return part

    def _moe(self, h_TH: Tensor, weights: ShardedMoe, place: Place) -> tuple[Tensor, Tensor]:
        """Return this shard's part of the layer's output, and the choice of experts."""
        spec = self._spec
        weights_TK, experts_TK = route_tokens(
            h_TH,
            weights.router_EH,
            weights.logit_bias_E,
            spec.router,
            spec.top_k,
            weights.bias_E,
        )
        self._clock.mark("route", place)
        if never_waits(spec, h_TH):
            # Every expert has room for all tokens: none is lost, and no count is needed.
            rows_of_expert = [len(h_TH)] * spec.num_experts
            rows_NH, place_TK, weights_TK, _ = pad(
                h_TH, experts_TK, weights_TK, spec.num_experts, len(h_TH)
            )
        else:
            # Device-to-host sync: the products' sizes are host numbers.
            rows_of_expert = count(experts_TK.flatten(), spec.num_experts).tolist()
            rows_NH, place_TK = batch(h_TH, experts_TK)
        outputs_NH = run_experts(rows_NH, rows_of_expert, weights.experts)
        part_TH = weighted_sum(outputs_NH, place_TK, weights_TK)
        self._clock.mark("experts", place)
        if weights.shared is not None:
            part_TH = part_TH + shared_mlp(h_TH, weights.shared, weights.shared_gate_1H)
            self._clock.mark("shared_experts", place)
        return part_TH, experts_TK


def never_waits(spec: ModelSpec, h_TH: Tensor) -> bool:
    """Return whether a step of these tokens runs without the host, as a CUDA graph asks for.

    Then experts compute padding: as many rows each as there are tokens.
    """
    num_bytes = spec.num_experts * h_TH.numel() * h_TH.itemsize
    return h_TH.is_cuda and len(h_TH) <= _PADDED_TOKENS and num_bytes <= _PADDED_BYTES


def _build_moe(weights: Weights, number: int, shard: Shard) -> ShardedMoe:
    shared = weights.shared_expert(number)
    experts = range(weights.spec.num_experts)
    return ShardedMoe(
        router_EH=weights.router(number),
        logit_bias_E=weights.router_logit_bias(number),
        bias_E=weights.router_bias(number),
        experts=stack_experts(
            [shard_mlp(weights.expert(number, expert), shard) for expert in experts]
        ),
        shared=None if shared is None else shard_mlp(shared, shard),
        shared_gate_1H=weights.shared_gate(number),
    )
