"""The model as one rank of an expert-parallel group runs it.

Shapes: B sequences, S positions, T = B x S tokens, H hidden size, E experts, K experts per token,
R rows received, W ranks, P slots per rank.

Attention, shared experts and dense layers are data parallel: every rank holds them and runs them
on its own sequences. Only routed experts are spread, so only their rows travel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan

from .attention import attention, attention_step
from .clock import PhaseClock
from .dispatch import AllToAll, Dispatched
from .experts import MlpWeights, mlp, shared_mlp
from .kv_cache import KvCache
from .norm import rms_norm
from .router import route, router_logits
from .weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """One MoE layer's weights on one rank."""

    router_EH: Tensor  # float32
    logit_bias_E: Tensor | None
    bias_E: Tensor | None  # corrects scores, for the choice only
    slot_E: Tensor  # int64: the global slot of each expert
    experts: tuple[MlpWeights | None, ...]  # by slot of this rank; None is an empty slot
    shared: MlpWeights | None
    shared_gate_1H: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer on one rank: attention, then experts or one MLP; gains that are None are 1."""

    input_norm_H: Tensor | None
    attention: dict[str, Tensor]
    post_attention_norm_H: Tensor | None
    feed_forward: MoeWeights | MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one forward pass returns."""

    hidden_BSH: Tensor
    experts_LTK: Tensor  # the choice in each MoE layer
    counts_LWWP: Tensor  # rows by source rank, destination rank and slot, on the CPU


def build_layers(plan: Plan, rank: int, weights: Weights) -> list[Layer]:
    """Return all layers of the plan's model with the experts the plan gives to `rank`."""
    ordinals = {layer: ordinal for ordinal, layer in enumerate(plan.model.moe_layers)}
    return [
        Layer(
            input_norm_H=weights.input_norm(layer),
            attention=weights.attention(layer),
            post_attention_norm_H=weights.post_attention_norm(layer),
            feed_forward=(
                _build_moe(plan, ordinals[layer], rank, weights)
                if layer in ordinals
                else weights.dense_mlp(layer)
            ),
        )
        for layer in range(plan.model.num_layers)
    ]


class ExpertParallelModel:
    """The layers of one rank, run together with the other ranks'."""

    def __init__(
        self, spec: ModelSpec, layers: list[Layer], dispatcher: AllToAll, clock: PhaseClock
    ) -> None:
        self._spec = spec
        self._layers = layers
        self._dispatcher = dispatcher
        self._clock = clock

    @torch.inference_mode()
    def forward(
        self, x_BSH: Tensor, *, cache: KvCache | None = None, check_rows: bool = False
    ) -> Step:
        """Run this rank's sequences; a collective: every rank calls it.

        Args:
            x_BSH: hidden states.
            cache: positions already seen, which these follow; they are added to it.
            check_rows: check the origin of every row that arrives.
        """
        spec, step = self._spec, attention_step(self._spec, x_BSH, cache)
        choices: list[Tensor] = []
        counts: list[Tensor] = []
        self._clock.start()
        for number, layer in enumerate(self._layers):
            h_BSH = rms_norm(x_BSH, layer.input_norm_H, spec.norm_epsilon)
            x_BSH = x_BSH + attention(h_BSH, layer.attention, spec.attention, step, number)
            self._clock.mark("attention")
            h_BSH = rms_norm(x_BSH, layer.post_attention_norm_H, spec.norm_epsilon)
            h_TH = h_BSH.flatten(0, 1)
            if isinstance(layer.feed_forward, MlpWeights):
                out_TH = mlp(h_TH, layer.feed_forward)
                self._clock.mark("dense_mlp")
            else:
                out_TH, experts_TK, sent = self._moe(h_TH, layer.feed_forward, check_rows)
                choices.append(experts_TK)
                counts.append(sent.counts_WWP)
            x_BSH = x_BSH + out_TH.view_as(x_BSH)
        return Step(
            hidden_BSH=x_BSH, experts_LTK=torch.stack(choices), counts_LWWP=torch.stack(counts)
        )

    def _moe(
        self, h_TH: Tensor, weights: MoeWeights, check_rows: bool
    ) -> tuple[Tensor, Tensor, Dispatched]:
        """Return the layer's output, its choice of experts and what was dispatched."""
        logits_TE = router_logits(h_TH, weights.router_EH, weights.logit_bias_E)
        weights_TK, experts_TK = route(
            logits_TE, self._spec.router, self._spec.top_k, weights.bias_E
        )
        self._clock.mark("route")
        sent = self._dispatcher.dispatch(h_TH, weights.slot_E[experts_TK], check_rows=check_rows)
        self._clock.mark("dispatch")
        rows_RH = _run_experts(sent, weights.experts)
        self._clock.mark("experts")
        out_TH = self._dispatcher.combine(rows_RH, sent, weights_TK)
        self._clock.mark("combine")
        if weights.shared is not None:
            out_TH = out_TH + shared_mlp(h_TH, weights.shared, weights.shared_gate_1H)
            self._clock.mark("shared_experts")
        return out_TH, experts_TK, sent


def _run_experts(sent: Dispatched, experts: tuple[MlpWeights | None, ...]) -> Tensor:
    """Return the output of each received row, in the order of `sent.rows_RH`."""
    slots = torch.split(sent.rows_RH, sent.rows_of_slot)
    outputs = [
        rows if expert is None else mlp(rows, expert)  # an empty slot has no rows
        for rows, expert in zip(slots, experts, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _build_moe(plan: Plan, ordinal: int, rank: int, weights: Weights) -> MoeWeights:
    layer = plan.model.moe_layers[ordinal]
    slots = plan.expert_of_slot[ordinal]
    slot_of_expert = [slots.index(expert) for expert in range(plan.model.num_experts)]
    first = rank * plan.slots_per_rank
    own = slots[first : first + plan.slots_per_rank]
    return MoeWeights(
        router_EH=weights.router(layer),
        logit_bias_E=weights.router_logit_bias(layer),
        bias_E=weights.router_bias(layer),
        slot_E=torch.tensor(slot_of_expert, device=weights.device),
        experts=tuple(None if e is None else weights.expert(layer, e) for e in own),
        shared=weights.shared_expert(layer),
        shared_gate_1H=weights.shared_gate(layer),
    )
