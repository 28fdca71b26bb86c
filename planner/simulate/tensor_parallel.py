"""A step under tensor x pipeline parallelism: layers cut in `tp` shares, `pp` stages.

    ranks of one copy of the model: stage 0 first, `tp` ranks each; two all-reduces a layer

Micro-batches move through the stages; in decode the next token of a sequence begins when its last
one has left the last stage. Two micro-batches may take turns in a stage, so that the all-reduce of
one runs under the computing of the other.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from epplan.topologies.transfer_cost import TransferCost, transfer_cost

from . import compute
from .compute import Part
from .device import Device
from .ledger import Ledger, Program
from .scene import Floats, Layout, Scene, Usage
from .transfers import TransferProfile, library_routes, transfer_profile
from .work import Work

DECODE_STEPS = 3  # enough for the pipeline to fill


def tensor_parallel(
    scene: Scene, usage: Usage, layout: Layout, window: int, *, together: int
) -> Program:
    """Return some steps of all copies of the model: one for prefill, `DECODE_STEPS` for decode.

    Args:
        scene: what runs; the placement of experts does not matter, every rank has a share of all.
        usage: how.
        layout: tp and pp.
        window: of the traffic.
        together: micro-batches that take turns in a stage.
    """
    stages = _Stages(scene, usage, layout, window)
    steps = DECODE_STEPS if usage.phase == "decode" else 1
    ready: list[tuple[int, ...]] = [()] * usage.micro_batches
    last_of_step = []
    for _ in range(steps):
        for first in range(0, usage.micro_batches, together):
            wave = range(first, min(first + together, usage.micro_batches))
            for stage in range(layout.pp):
                stages.run(stage, wave, ready)
        last_of_step.append(len(stages.ledger.tasks))
    return Program(ledger=stages.ledger, last_of_step=tuple(last_of_step))


class _Stages:
    """The stages of the pipelines, all copies of the model side by side."""

    def __init__(self, scene: Scene, usage: Usage, layout: Layout, window: int) -> None:
        self._scene, self._usage, self._layout = scene, usage, layout
        self.ledger = Ledger(scene.routes, usage.compute_factor)
        # Sequence parallelism: an all-reduce in two halves, norms on a share of the tokens between.
        shared_norms = usage.phase == "prefill" and not usage.naive
        self._part = Part(
            model=scene.model, tp=layout.tp, norm_share=1 / layout.tp if shared_norms else 1.0
        )
        copies = scene.num_ranks // layout.size
        self._sequences = -(-usage.batch // copies) / usage.micro_batches
        self._tokens = self._sequences * (usage.context if usage.phase == "prefill" else 1)
        self._rows = scene.counts[window].mean(axis=1) * self._tokens  # [layers, experts]
        number = np.arange(scene.num_ranks) % layout.size // layout.tp
        self._ranks = [np.flatnonzero(number == stage) for stage in range(layout.pp)]
        self._layers = np.array_split(np.arange(scene.model.num_layers), layout.pp)
        self._ordinal = {layer: n for n, layer in enumerate(scene.model.moe_layers)}
        self._reduce = [self._all_reduce(stage) for stage in range(layout.pp)]
        self._hand_on = [self._to_next_stage(stage) for stage in range(layout.pp)]
        self._feed_forward: dict[bytes, list[Work]] = {}
        self._attention = [self._on(stage, self._attend) for stage in range(layout.pp)]

    def run(self, stage: int, wave: range, ready: list[tuple[int, ...]]) -> None:
        """Issue one stage for some micro-batches; `ready` is what they wait for and then is done.

        Micro-batches of a wave take turns, part by part.
        """
        model, ranks = self._scene.model, self._ranks[stage]
        for layer in self._layers[stage].tolist():
            halves = (
                ("attention", self._attention[stage]),
                ("experts" if layer in self._ordinal else "dense MLP", self._mlp(stage, layer)),
            )
            for name, work in halves:
                for mb in wave:
                    done = self.ledger.compute(name, work, ready[mb], (layer, mb), ranks)
                    if self._layout.tp > 1:
                        done = self.ledger.transfer(
                            "all-reduce",
                            self._reduce[stage],
                            (done,),
                            (layer, mb),
                            ranks,
                        )
                    ready[mb] = (done,)
        for mb in wave:
            at = (model.num_layers, mb)
            if stage == self._layout.pp - 1 and model.vocab_size:
                head = self._on(stage, self._head)
                ready[mb] = (self.ledger.compute("output head", head, ready[mb], at, ranks),)
            if self._layout.pp > 1:
                both = np.concatenate([ranks, self._ranks[(stage + 1) % self._layout.pp]])
                ready[mb] = (
                    self.ledger.transfer(
                        "next stage",
                        self._hand_on[stage],
                        ready[mb],
                        at,
                        both,
                        f"after stage {stage}",
                    ),
                )

    def _on(self, stage: int, make: Callable[[Device, Floats], Work]) -> Work:
        """Return work of one rank of each kind, on all of a stage."""
        total = Work.nothing(self._scene.num_ranks)
        for device, kind in self._scene.kinds:
            ranks = np.intersect1d(kind, self._ranks[stage])
            total += make(device, np.ones(1)).on(ranks, self._scene.num_ranks)
        return total

    def _attend(self, device: Device, one: Floats) -> Work:
        usage = self._usage
        sequences = one * self._sequences
        return compute.attention(self._part, device, usage.phase, sequences, usage.context)

    def _head(self, device: Device, one: Floats) -> Work:
        return compute.head(self._part, device, one * self._sequences)

    def _mlp(self, stage: int, layer: int) -> Work:
        """Return routing, all experts' shares and shared experts, or a dense layer's share."""
        if layer not in self._ordinal:
            return self._on(stage, self._dense)
        rows = self._rows[self._ordinal[layer]]  # [experts]
        key = rows.tobytes()
        if key not in self._feed_forward:
            self._feed_forward[key] = [
                self._on(each, partial(self._moe, rows)) for each in range(self._layout.pp)
            ]
        return self._feed_forward[key][stage]

    def _dense(self, device: Device, one: Floats) -> Work:
        ffn = self._scene.model.dense_ffn_size
        return compute.gated_mlp(self._part, device, ffn, one * self._tokens)

    def _moe(self, rows: Floats, device: Device, one: Floats) -> Work:
        part, tokens = self._part, one * self._tokens
        work = compute.route(part, device, tokens) + compute.unsort(part, device, tokens)
        each = compute.experts(part, device, rows, naive=self._usage.naive)
        work += each.on(np.zeros(len(rows), dtype=np.intp), 1)
        if part.model.shared_ffn_size:
            work += compute.gated_mlp(part, device, part.model.shared_ffn_size, tokens)
        return work

    def _all_reduce(self, stage: int) -> TransferCost:
        """Return the reduction of every token's hidden vector over the ranks of a stage.

        In a ring each rank sends its right neighbour 2 (tp - 1) / tp of the vectors; where the
        switch adds them up, (tp + 1) / tp leave and enter a rank.
        """
        tp, model = self._layout.tp, self._scene.model
        profile = self._all_reduce_profile()
        times = (tp + 1) / tp if profile.name == "nvls" else 2 * (tp - 1) / tp
        size = self._tokens * model.row_bytes * times
        sent = np.zeros((self._scene.num_ranks,) * 2)
        for number, rank in enumerate(self._ranks[stage].tolist()):
            following = rank + 1 if (number + 1) % tp else rank + 1 - tp
            sent[rank, following] += size if tp > 1 else 0.0
        return self._cost(profile, sent)

    def _all_reduce_profile(self) -> TransferProfile:
        gpus = [device.gpu for device in self._scene.devices]
        able = all((gpu.sm or 0) >= 90 and gpu.fabric == "switch" for gpu in gpus)
        one_island = self._layout.tp <= self._scene.island_size
        in_switch = able and one_island and not self._usage.naive
        return transfer_profile("nvls" if in_switch else "ring")

    def _to_next_stage(self, stage: int) -> TransferCost:
        """Return handing hidden vectors on: shares over the network, gathered inside the stage.

        The last stage sends tokens back to the first, which is next to nothing.
        """
        tp, pp, model = self._layout.tp, self._layout.pp, self._scene.model
        size = self._tokens * model.row_bytes
        sent = np.zeros((self._scene.num_ranks,) * 2)
        back = stage == pp - 1
        for rank in self._ranks[stage].tolist() if pp > 1 else []:
            there = rank + tp if not back else rank - tp * (pp - 1)
            sent[rank, there] += 4 * self._sequences if back else size / tp
            if tp > 1 and not back:
                following = there + 1 if (there + 1) % tp else there + 1 - tp
                sent[there, following] += size * (tp - 1) / tp
        return self._cost(transfer_profile("point-to-point"), sent)

    def _cost(self, profile: TransferProfile, sent: Floats) -> TransferCost:
        routes = library_routes(profile, self._scene.routes, 1.0, combine=False)
        return transfer_cost(routes, sent, profile.host)
