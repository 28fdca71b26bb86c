"""Which copy of an expert a token goes to.

Shapes: T tokens, K experts per token, N = T x K, E experts, C copies of the most copied expert.

The planner prices shares: every slot gets its planned share of its expert's tokens from every
source rank. So the tokens that a rank sends to an expert are numbered, from step to step, and the
number's place in a golden-ratio sequence, which fills [0, 1) evenly from any number on, picks the
slot whose part of [0, 1) it falls into. A rank that sends one token a step then uses all copies in
turn, and ranks start at different places so that they do not all use the same one.

`rank % copies` would be shorter, but loads copies by who sends and not by share (vllm-ascend issue
9244). Nearest copies first saves traffic where loads are even without the shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epplan.planner.plan import Plan

from .order import count, look_up, number_within

ReplicaChoice = Literal["share", "nearest"]
# In units of 2**-32: steps of the golden ratio, and of sqrt(2) to start every rank elsewhere.
_UNIT = 1 << 32
_STEP = 2654435769
_RANK_STEP = 1779033704


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """The copies of every expert of one MoE layer, as one source rank uses them."""

    slot_EC: Tensor  # int64: global slots, the last repeated
    end_EC: Tensor  # int64: where each but the last copy's part of [0, 2**32) ends
    next_E: Tensor  # int64: the number of the next token; counts on with every choice
    start: int  # the place of number 0

    def choose(self, experts_TK: Tensor) -> Tensor:
        """Return the slot of each choice, [T, K], and number the tokens on."""
        if self.slot_EC.shape[1] == 1:
            return look_up(self.slot_EC.flatten(), experts_TK)
        expert_N = experts_TK.flatten()
        counts_E = count(expert_N, len(self.slot_EC))
        number_N = number_within(expert_N, counts_E) + self.next_E[expert_N]
        self.next_E.add_(counts_E)
        # Products wrap; their low 32 bits stay right.
        place_N = (number_N * _STEP + self.start) & (_UNIT - 1)
        copy_N = (place_N[:, None] >= self.end_EC[expert_N]).sum(-1)
        return self.slot_EC[expert_N, copy_N].view_as(experts_TK)


def replicas_of_rank(
    plan: Plan, ordinal: int, rank: int, choice: ReplicaChoice, device: torch.device
) -> Replicas:
    """Return the copies of the experts of MoE layer `ordinal` as `rank` uses them.

    Args:
        plan: slots, shares and hosts.
        ordinal: of the layer among the MoE layers.
        rank: the source rank.
        choice: "share" keeps the planned shares; "nearest" uses a copy on the own GPU alone, else
            those on the own host by share, else all by share.
        device: where choices are made.
    """
    shares = plan.shares(ordinal)
    slots_of_expert = plan.slots_of_expert(ordinal)
    if choice == "nearest":
        slots_of_expert = [_nearest(plan, rank, slots) for slots in slots_of_expert]
    width = max(map(len, slots_of_expert))
    ends = [_ends([shares[slot] for slot in slots], width) for slots in slots_of_expert]
    padded = [slots + slots[-1:] * (width - len(slots)) for slots in slots_of_expert]
    return Replicas(
        slot_EC=torch.tensor(padded, device=device),
        end_EC=torch.tensor(ends, dtype=torch.int64, device=device).view(len(ends), width - 1),
        next_E=torch.zeros(len(ends), dtype=torch.int64, device=device),
        start=rank * _RANK_STEP % _UNIT,
    )


def all_local(plan: Plan, choice: ReplicaChoice) -> bool:
    """Return whether every rank sends every row to itself, so that no rows travel."""
    if plan.world_size == 1:
        return True
    return choice == "nearest" and all(
        len({slot // plan.slots_per_rank for slot in slots}) == plan.world_size
        for ordinal in range(plan.model.num_moe_layers)
        for slots in plan.slots_of_expert(ordinal)
    )


def _nearest(plan: Plan, rank: int, slots: list[int]) -> list[int]:
    hosts = [plan.ranks[slot // plan.slots_per_rank].host for slot in slots]
    own = [slot for slot in slots if slot // plan.slots_per_rank == rank]
    near = [slot for slot, host in zip(slots, hosts, strict=True) if host == plan.ranks[rank].host]
    return own or near or slots


def _ends(shares: Sequence[float], width: int) -> list[int]:
    """Return where the parts of all copies but the last end, filled up to `width` - 1."""
    total = sum(shares)
    if not total:  # the plan gives these copies nothing, yet they are the nearest
        shares, total = [1.0] * len(shares), len(shares)
    ends, filled = [], 0.0
    for share in shares[:-1]:
        filled += share
        ends.append(round(filled / total * _UNIT))
    return ends + [_UNIT] * (width - 1 - len(ends))
