"""The model as one rank of an expert-parallel group runs it.

Shapes: B sequences, S positions, T = B x S tokens, H hidden size, E experts, K experts per token,
R rows received, W ranks, P slots per rank, L MoE layers, M tokens as dispatch takes them (T of
them, or single rows where some are dropped).

A micro-batch is a generator over all layers: attend, route, dispatch, experts, combine. It yields
wherever rows are under way, so that a schedule can let another micro-batch compute meanwhile;
run alone it is a plain forward pass.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.runtime.balancing.balance import Outgoing, limited
from epplan.runtime.dispatchers.dispatch import Counts, Dispatcher, Routed, Transfer, gather_counts
from epplan.runtime.layer.attention import attention, attention_step
from epplan.runtime.layer.experts import MlpWeights, mlp, run_experts, shared_mlp
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.layer.layers import Layer, MoeWeights
from epplan.runtime.layer.norm import add_rms_norm
from epplan.runtime.layer.router import route_tokens

from .clock import PhaseClock, Place
from .hooks import Hooks
from .pipeline import Point, Schedule, take_turns

_END = Place(-1, -1)  # of a step, after all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What some of a step's sequences give."""

    hidden_BSH: Tensor
    experts: list[Tensor]  # the choice in each MoE layer, [T, K]
    counts: list[Counts]  # [L]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one forward pass returns."""

    hidden_BSH: Tensor
    experts_LTK: Tensor  # the choice in each MoE layer
    counts_LWWP: Tensor  # rows by source rank, destination rank and slot, on the CPU
    reran: bool  # rows did not fit, and the step was run again without a limit


class ExpertParallelModel:
    """The layers of one rank, run together with the other ranks'.

    Args:
        spec: the model.
        layers: this rank's weights.
        dispatcher: takes rows to the experts.
        schedule: of micro-batches.
        clock: times phases.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[Layer],
        dispatcher: Dispatcher,
        schedule: Schedule,
        clock: PhaseClock,
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.dispatcher = dispatcher
        self.schedule = schedule
        self.clock = clock
        self.hooks = Hooks()

    def new_caches(self, capacity: int = 0) -> list[KvCache]:
        """Return empty caches, one for each micro-batch.

        Args:
            capacity: positions to make room for at once.
        """
        num_layers = len(self.layers)
        return [KvCache(num_layers, capacity) for _ in range(self.schedule.micro_batches)]

    def forward(
        self,
        x_BSH: Tensor,
        *,
        caches: Sequence[KvCache] | None = None,
        check_rows: bool = False,
        train: bool = False,
    ) -> Step:
        """Run this rank's sequences; a collective: every rank calls it.

        Args:
            x_BSH: hidden states; ranks may have different numbers of sequences, or none.
            caches: from `new_caches`, of each micro-batch the positions already seen, which these
                follow; they are added to it.
            check_rows: check the origin of every row that arrives.
            train: keep what gradients need.
        """
        with torch.inference_mode(not train):
            self.clock.start()
            if self.hooks.finite is not None:
                self.hooks.finite.start()
            seen = [cache.length for cache in caches or ()]
            batches = self.run(x_BSH, self.dispatcher, caches=caches, check_rows=check_rows)
            counts = self._gather(batches)
            dropless = self.dispatcher.rerun(counts)
            if dropless is not None:
                for cache, length in zip(caches or (), seen, strict=True):
                    cache.truncate(length)
                batches = self.run(x_BSH, dropless, caches=caches, check_rows=check_rows)
                counts = self._gather(batches)
            num_ranks = counts.shape[1]
            return Step(
                hidden_BSH=torch.cat([batch.hidden_BSH for batch in batches]),
                experts_LTK=torch.cat([torch.stack(batch.experts) for batch in batches], dim=1),
                counts_LWWP=counts.view(len(batches), -1, num_ranks, *counts.shape[2:]).sum(0),
                reran=dropless is not None,
            )

    def run(
        self,
        x_BSH: Tensor,
        dispatcher: Dispatcher,
        *,
        caches: Sequence[KvCache] | None = None,
        check_rows: bool = False,
    ) -> list[MicroBatch]:
        """Run all micro-batches; with a padded dispatcher the host never waits."""
        parts = torch.tensor_split(x_BSH, self.schedule.micro_batches)
        of_part: Sequence[KvCache | None] = caches or [None] * len(parts)
        batches = (
            self._micro_batch(number, part, cache, dispatcher, check_rows)
            for number, (part, cache) in enumerate(zip(parts, of_part, strict=True))
        )
        return take_turns(batches, self.schedule)

    def _gather(self, batches: list[MicroBatch]) -> Tensor:
        """Return rows by micro-batch and layer, source, destination and slot."""
        counts = [each for batch in batches for each in batch.counts]
        gathered = gather_counts(self.dispatcher.channel, counts, _END)
        if counts[0].all_WWP is None:
            self.clock.mark("counts", _END)
        return gathered

    def _micro_batch(
        self,
        number: int,
        x_BSH: Tensor,
        cache: KvCache | None,
        dispatcher: Dispatcher,
        check_rows: bool,
    ) -> Generator[Point, None, MicroBatch]:
        """Take some of the sequences through all layers."""
        spec, step = self.spec, attention_step(self.spec, x_BSH, cache)
        choices: list[Tensor] = []
        counts: list[Counts] = []
        out_BSH: Tensor | None = None  # of the layer before, added where the next norm is taken
        for index, layer in enumerate(self.layers):
            place = Place(index, number)
            x_BSH, h_BSH = add_rms_norm(x_BSH, out_BSH, layer.input_norm_H, spec.norm_epsilon)
            out_BSH = h_BSH
            if len(x_BSH):  # an empty micro-batch has no attention: CUDA's would return None for it
                out_BSH = attention(h_BSH, layer.attention, spec.attention, step, index)
            self.clock.mark("attention", place)
            if isinstance(layer.feed_forward, MoeWeights):
                yield "attended"
            gain_H = layer.post_attention_norm_H
            x_BSH, h_BSH = add_rms_norm(x_BSH, out_BSH, gain_H, spec.norm_epsilon)
            if self.hooks.finite is not None:
                self.hooks.finite.home(index, x_BSH)
            h_TH = h_BSH.flatten(0, 1)
            if isinstance(layer.feed_forward, MlpWeights):
                out_TH = mlp(h_TH, layer.feed_forward)
                self.clock.mark("dense_mlp", place)
            else:
                weights_TK, experts_TK = self._route(h_TH, layer.feed_forward)
                outgoing = limited(
                    h_TH, experts_TK, weights_TK, spec.num_experts, self.hooks.capacity_factor
                )
                transfer = dispatcher.begin(
                    Routed(
                        x_TH=outgoing.x_MH,
                        slot_TK=layer.feed_forward.replicas.choose(outgoing.experts_MK),
                        weights_TK=outgoing.weights_MK,
                        held=layer.feed_forward.held,
                        place=place,
                        check_rows=check_rows,
                    )
                )
                out_TH = yield from self._moe(h_TH, transfer, outgoing, layer.feed_forward, place)
                choices.append(experts_TK)
                counts.append(transfer.counts)
            out_BSH = out_TH.view_as(x_BSH)
        if out_BSH is not None:
            x_BSH = x_BSH + out_BSH
        return MicroBatch(hidden_BSH=x_BSH, experts=choices, counts=counts)

    def _route(self, h_TH: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """Return the weight and the number of each token's experts, [T, K]."""
        return route_tokens(
            h_TH,
            weights.router_EH,
            weights.logit_bias_E,
            self.spec.router,
            self.spec.top_k,
            weights.bias_E,
        )

    def _moe(
        self,
        h_TH: Tensor,
        transfer: Transfer,
        outgoing: Outgoing,
        weights: MoeWeights,
        place: Place,
    ) -> Generator[Point, None, Tensor]:
        """Take rows that have begun their way to the experts there and back; [T, H]."""
        self.clock.mark("route", place)
        yield "counted"
        transfer.send()
        self.hooks.rows_under_way(place)
        self.clock.mark("dispatch", place)
        yield "sent"
        rows = transfer.receive()
        self.clock.mark("dispatch", place)
        outputs_RH = run_experts(
            rows.rows_RH,
            rows.rows_of_slot,
            weights.experts,
            beside_transfers=self.schedule.in_flight > 1,
        )
        if self.hooks.finite is not None:
            self.hooks.finite.experts(place.layer, outputs_RH, rows.rows_of_slot)
        self.clock.mark("experts", place)
        transfer.take_outputs(outputs_RH)
        self.clock.mark("combine", place)
        del rows, outputs_RH
        yield "computed"
        transfer.send_back()
        shared_TH = None
        if weights.shared is not None:
            shared_TH = shared_mlp(h_TH, weights.shared, weights.shared_gate_1H)
            self.clock.mark("shared_experts", place)
        yield "returned"
        out_TH = outgoing.home(transfer.receive_back())
        self.clock.mark("combine", place)
        return out_TH if shared_TH is None else out_TH + shared_TH
