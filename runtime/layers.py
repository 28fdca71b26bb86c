"""The weights of one rank, layer by layer.

Shapes: E experts, H hidden size.

Attention, shared experts and dense layers are data parallel: every rank holds them and runs them
on its own sequences. Only routed experts are spread, so only their rows travel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.plan import Plan

from .experts import MlpWeights
from .weights import SeededWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """One MoE layer's weights on one rank."""

    router_EH: Tensor  # float32
    bias_E: Tensor | None
    slot_E: Tensor  # int64: the global slot of each expert
    experts: tuple[MlpWeights | None, ...]  # by slot of this rank; None is an empty slot
    shared: MlpWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer on one rank: attention, then experts or one MLP."""

    attention: dict[str, Tensor]
    feed_forward: MoeWeights | MlpWeights


def build_layers(plan: Plan, rank: int, weights: SeededWeights) -> list[Layer]:
    """Return all layers of the plan's model with the experts the plan gives to `rank`."""
    ordinals = {layer: ordinal for ordinal, layer in enumerate(plan.model.moe_layers)}
    return [
        Layer(
            attention=weights.attention(layer),
            feed_forward=(
                _build_moe(plan, ordinals[layer], rank, weights)
                if layer in ordinals
                else weights.dense_mlp(layer)
            ),
        )
        for layer in range(plan.model.num_layers)
    ]


def _build_moe(plan: Plan, ordinal: int, rank: int, weights: SeededWeights) -> MoeWeights:
    layer = plan.model.moe_layers[ordinal]
    slots = plan.expert_of_slot[ordinal]
    slot_of_expert = [slots.index(expert) for expert in range(plan.model.num_experts)]
    first = rank * plan.slots_per_rank
    own = slots[first : first + plan.slots_per_rank]
    return MoeWeights(
        router_EH=weights.router(layer),
        bias_E=weights.router_bias(layer),
        slot_E=torch.tensor(slot_of_expert, device=weights.device),
        experts=tuple(None if e is None else weights.expert(layer, e) for e in own),
        shared=weights.shared_expert(layer),
    )
