"""A step under expert parallelism: attention where the sequence lives, experts spread whole.

Micro-batches take turns, layer by layer. With two of them the transfers of one run under the
computing of the other:

    compute   A0  A1  E0  E1  A0' A1' ...       A attention and routing, E experts
    network       D0  D1  C0  C1  D0' ...       D dispatch, C combine
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epplan.planner.token_sets import TokenSets
from epplan.topologies.transfer_cost import TransferCost

from . import compute
from .compute import Part
from .copies import Choices
from .device import Device
from .ledger import Ledger, Program
from .scene import Floats, Ints, Scene, Usage
from .transfers import make_library
from .work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moe:
    """What one micro-batch does in one MoE layer."""

    dispatch: TransferCost
    experts: Work
    combine: TransferCost


def expert_parallel(scene: Scene, usage: Usage, window: int) -> Program:
    """Return one step of the group.

    Args:
        scene: what runs.
        usage: how.
        window: of the traffic.
    """
    model, part = scene.model, Part(model=scene.model)
    parts = usage.micro_batches
    sequences = np.full(scene.num_ranks, -(-usage.batch // scene.num_ranks) / parts)
    tokens = sequences * (usage.context if usage.phase == "prefill" else 1)

    def on_ranks(make: Callable[[Device, Ints], Work]) -> Work:
        return scene.work(make)

    attend = on_ranks(
        lambda d, r: compute.attention(part, d, usage.phase, sequences[r], usage.context)
    )
    route = on_ranks(lambda d, r: compute.route(part, d, tokens[r]))
    unsort = on_ranks(lambda d, r: compute.unsort(part, d, tokens[r]))
    shared = on_ranks(lambda d, r: compute.gated_mlp(part, d, model.shared_ffn_size, tokens[r]))
    dense = on_ranks(lambda d, r: compute.gated_mlp(part, d, model.dense_ffn_size, tokens[r]))
    head = on_ranks(lambda d, r: compute.head(part, d, sequences[r]))
    layers = _MoeLayers(scene, usage, window, float(tokens[0]))

    ledger = Ledger(scene.routes, usage.compute_factor)
    ready: list[tuple[int, ...]] = [()] * parts
    ordinal = {layer: number for number, layer in enumerate(model.moe_layers)}
    for layer in range(model.num_layers):
        for mb in range(parts):
            at = (layer, mb)
            done = ledger.compute("attention", attend, ready[mb], at)
            if layer in ordinal:
                done = ledger.compute("route", route, (done,), at)
            else:
                done = ledger.compute("dense MLP", dense, (done,), at)
            ready[mb] = (done,)
        if layer not in ordinal:
            continue
        moe = layers[ordinal[layer]]
        sent: list[int] = []
        for mb in range(parts):
            at = (layer, mb)
            sent.append(ledger.transfer("dispatch", moe.dispatch, ready[mb], at))
            if model.shared_ffn_size:  # needs no transfer: runs while rows are on their way
                ledger.compute("shared experts", shared, ready[mb], at)
        for mb in range(parts):
            at = (layer, mb)
            done = ledger.compute("experts", moe.experts, (sent[mb],), at)
            back = ledger.transfer("combine", moe.combine, (done,), at)
            ready[mb] = (back,)
        for mb in range(parts):
            at = (layer, mb)
            ready[mb] = (ledger.compute("unsort", unsort, ready[mb], at),)
    if model.vocab_size:
        for mb in range(parts):
            at = (model.num_layers, mb)
            ledger.compute("output head", head, ready[mb], at)
    return Program(ledger=ledger, last_of_step=(len(ledger.tasks),))


class _MoeLayers:
    """The MoE layers of one micro-batch.

    Transfers are priced for one token a rank, once per traffic, placement and library, whatever the
    micro-batches: bytes are proportional to tokens.
    """

    def __init__(self, scene: Scene, usage: Usage, window: int, tokens: float) -> None:
        self._scene, self._usage, self._window, self._tokens = scene, usage, window, tokens
        self._island = scene.routes.island
        self._library = make_library(
            usage.transfer.for_plan(scene.planned),
            scene.routes,
            scene.model.hidden_size,
            usage.dispatch_dtype or scene.model.dtype,
            scene.model.dtype,
        )
        self._known: dict[object, _Moe] = {}

    def __getitem__(self, ordinal: int) -> _Moe:
        scene = self._scene
        counts, shares = scene.counts[self._window, ordinal], scene.shares[ordinal]
        sets = None if scene.sets is None else scene.sets[self._window][ordinal]
        key = hash(counts.tobytes()), hash(shares.tobytes()), hash(sets and sets.experts.tobytes())
        if key not in self._known:
            library, tokens = self._library, self._tokens
            there, back = self._priced(key, counts, shares, sets)
            self._known[key] = _Moe(
                dispatch=library.scaled(there, tokens, combine=False),
                experts=self._experts(counts * tokens, shares),
                combine=library.scaled(back, tokens, combine=True),
            )
        return self._known[key]

    def _priced(
        self, key: object, counts: Floats, shares: Floats, sets: TokenSets | None
    ) -> tuple[TransferCost, TransferCost]:
        """Return dispatch and combine for one token a rank."""
        library = self._library
        full_key = (key, library.profile, library.dispatch_row_bytes, library.combine_row_bytes)
        prices = self._scene.prices
        if full_key not in prices:
            choices = Choices(
                model=self._scene.model,
                counts=counts,
                shares=shares,
                island=self._island,
                sets=sets,
            )
            prices[full_key] = (
                library.price(choices, combine=False),
                library.price(choices, combine=True),
            )
        return prices[full_key]

    def _experts(self, counts: Floats, shares: Floats) -> Work:
        scene, part = self._scene, Part(model=self._scene.model)
        expert, rank = np.nonzero(shares)
        rows = counts.sum(axis=0)[expert] * shares[expert, rank]  # of every copy
        total = Work.nothing(scene.num_ranks)
        for device, ranks in scene.kinds:
            here = np.isin(rank, ranks)
            work = compute.experts(part, device, rows[here], naive=self._usage.naive)
            total += work.on(rank[here], scene.num_ranks)
        return total
