"""The model as one rank of an expert-parallel group runs it.

Shapes: B sequences, S positions, T = B x S tokens, H hidden size, E experts, K experts per token,
R rows received, W ranks, P slots per rank, L MoE layers.

A micro-batch is a generator over all layers: attend, route, dispatch, experts, combine. It yields
wherever rows are under way, so that a schedule can let another micro-batch compute meanwhile;
run alone it is a plain forward pass.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epplan.planner.model import ModelSpec

from .attention import attention, rms_norm
from .clock import PhaseClock
from .dispatch import AllToAll, Transfer
from .experts import MlpWeights, mlp, run_experts
from .layers import Layer, MoeWeights
from .router import route

# Where a micro-batch yields in a MoE layer: its counts, its rows, or its outputs are under way.
Point = Literal["counted", "sent", "returned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one forward pass returns."""

    hidden_BSH: Tensor
    experts_LTK: Tensor  # the choice in each MoE layer
    counts_LWWP: Tensor  # rows by source rank, destination rank and slot, on the CPU


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
    def forward(self, x_BSH: Tensor, *, check_rows: bool = False) -> Step:
        """Run this rank's sequences; a collective: every rank calls it.

        Args:
            x_BSH: hidden states.
            check_rows: check the origin of every row that arrives.
        """
        self._clock.start()
        micro_batch = self.micro_batch(x_BSH, check_rows=check_rows)
        while True:
            try:
                next(micro_batch)
            except StopIteration as end:
                step: Step = end.value
                return step

    def micro_batch(
        self, x_BSH: Tensor, *, check_rows: bool = False
    ) -> Generator[Point, None, Step]:
        """Run some of the sequences through all layers; returns their part of the step."""
        choices: list[Tensor] = []
        transfers: list[Transfer] = []
        for layer in self._layers:
            x_BSH = x_BSH + attention(rms_norm(x_BSH), layer.attention, self._spec.attention)
            self._clock.mark("attention")
            h_TH = rms_norm(x_BSH).flatten(0, 1)
            if isinstance(layer.feed_forward, MlpWeights):
                out_TH = mlp(h_TH, layer.feed_forward)
                self._clock.mark("dense_mlp")
            else:
                weights_TK, experts_TK = self._route(h_TH, layer.feed_forward)
                transfer = self._dispatcher.begin(
                    h_TH, layer.feed_forward.slot_E[experts_TK], weights_TK, check_rows=check_rows
                )
                out_TH = yield from self._moe(h_TH, transfer, layer.feed_forward)
                choices.append(experts_TK)
                transfers.append(transfer)
            x_BSH = x_BSH + out_TH.view_as(x_BSH)
        return Step(
            hidden_BSH=x_BSH,
            experts_LTK=torch.stack(choices),
            counts_LWWP=torch.stack([transfer.counts_WWP for transfer in transfers]),
        )

    def _route(self, h_TH: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """Return the weight and the number of each token's experts, [T, K]."""
        logits_TE = h_TH.float() @ weights.router_EH.T
        return route(logits_TE, self._spec.router, self._spec.top_k, weights.bias_E)

    def _moe(
        self, h_TH: Tensor, transfer: Transfer, weights: MoeWeights
    ) -> Generator[Point, None, Tensor]:
        """Take rows that have begun their way to the experts there and back; [T, H]."""
        self._clock.mark("route")
        yield "counted"
        transfer.send()
        self._clock.mark("dispatch")
        yield "sent"
        rows = transfer.receive()
        self._clock.mark("dispatch")
        outputs_RH = run_experts(rows.rows_RH, rows.rows_of_slot, weights.experts)
        self._clock.mark("experts")
        transfer.send_back(outputs_RH)
        self._clock.mark("combine")
        shared_TH = None
        if weights.shared is not None:
            shared_TH = mlp(h_TH, weights.shared)
            self._clock.mark("shared_experts")
        yield "returned"
        out_TH = transfer.receive_back()
        self._clock.mark("combine")
        return out_TH if shared_TH is None else out_TH + shared_TH
