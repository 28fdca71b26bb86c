"""The weights of one rank, layer by layer.

Shapes: E experts, H hidden size.

Attention, shared experts and dense layers are data parallel: every rank holds them and runs them
on its own sequences. Only routed experts are spread, so only their rows travel.
"""

from dataclasses import dataclass

from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.dispatchers.replicas import ReplicaChoice, Replicas, replicas_of_rank
from epplan.runtime.weights import Weights

from .attention import join_projections
from .experts import MlpWeights, stack_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """One MoE layer's weights on one rank."""

    router_EH: Tensor  # float32
    logit_bias_E: Tensor | None
    bias_E: Tensor | None  # corrects scores, for the choice only
    replicas: Replicas  # the slots of each expert, as this rank uses them
    experts: tuple[MlpWeights | None, ...]  # by slot of this rank; None is an empty slot
    shared: MlpWeights | None
    shared_gate_1H: Tensor | None

    @property
    def held(self) -> tuple[bool, ...]:
        """Which slots of this rank hold an expert, [P]."""
        return tuple(expert is not None for expert in self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer on one rank: attention, then experts or one MLP; gains that are None are 1."""

    input_norm_H: Tensor | None
    attention: dict[str, Tensor]
    post_attention_norm_H: Tensor | None
    feed_forward: MoeWeights | MlpWeights


def build_layers(
    plan: Plan,
    rank: int,
    weights: Weights,
    replicas: ReplicaChoice = "share",
    *,
    joined: bool = True,
) -> list[Layer]:
    """Return all layers of the plan's model with the experts the plan gives to `rank`.

    Args:
        plan: the placement.
        rank: this process.
        weights: of all experts.
        replicas: which copy of an expert this rank uses.
        joined: put tensors that one product can read next to each other in memory; not where each
            is to have gradients of its own.
    """
    ordinals = {layer: ordinal for ordinal, layer in enumerate(plan.model.moe_layers)}
    return [
        Layer(
            input_norm_H=weights.input_norm(layer),
            attention=(
                join_projections(weights.attention(layer)) if joined else weights.attention(layer)
            ),
            post_attention_norm_H=weights.post_attention_norm(layer),
            feed_forward=(
                _build_moe(plan, ordinals[layer], rank, weights, replicas, joined)
                if layer in ordinals
                else weights.dense_mlp(layer)
            ),
        )
        for layer in range(plan.model.num_layers)
    ]


def _build_moe(
    plan: Plan,
    ordinal: int,
    rank: int,
    weights: Weights,
    replicas: ReplicaChoice,
    joined: bool,
) -> MoeWeights:
    layer = plan.model.moe_layers[ordinal]
    first = rank * plan.slots_per_rank
    own = plan.expert_of_slot[ordinal][first : first + plan.slots_per_rank]
    experts = [None if expert is None else weights.expert(layer, expert) for expert in own]
    return MoeWeights(
        router_EH=weights.router(layer),
        logit_bias_E=weights.router_logit_bias(layer),
        bias_E=weights.router_bias(layer),
        replicas=replicas_of_rank(plan, ordinal, rank, replicas, weights.device),
        experts=stack_experts(experts) if joined else tuple(experts),
        shared=weights.shared_expert(layer),
        shared_gate_1H=weights.shared_gate(layer),
    )
