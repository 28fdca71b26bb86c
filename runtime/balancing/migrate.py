"""Moving experts between ranks while the model runs, without changing what it computes.

    layer by layer   new copies arrive beside the old ones, which go on computing; when the last
                     byte is there, table and experts of the layer change together, between steps
    chunk by chunk   an expert travels in chunks, point to point; between two layers of the model a
                     rank sends at most one and receives at most one, so that no transfer of rows
                     ever waits behind more than one chunk
    in the same way  every rank derives the same schedule from the two tables and follows it at the
                     same points of its program: no rank ever asks another whether it is ready

Extra memory is that of the experts a rank receives in one layer; where a layer's experts lie in one
block, for grouped products, that block is made once more when its table changes.

Traps of others that this avoids: one batch of hundreds of transfers hangs NCCL (SGLang PR 30829),
ranks that disagree whether a layer is ready wait for ever (vLLM PR 32418).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.errors import EpplanError
from epplan.planner.moves.slot_transfers import Transfer, layer_transfers, local_slot
from epplan.planner.plan import Plan
from epplan.runtime.layer.experts import MlpWeights, fingerprint

CHUNK_BYTES = 4 << 20  # under 0.1 ms on a 400 Gb/s link: shorter than a layer of a decode step

Experts = tuple[MlpWeights | None, ...]  # of one layer on this rank, by slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One chunk of one transfer; the last one is the expert's fingerprint."""

    transfer: Transfer
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a migration has done so far."""

    experts: int = 0  # of all ranks
    bytes: int = 0
    layers: int = 0


def schedule(
    transfers: Sequence[Transfer], num_chunks: int, slots_per_rank: int
) -> list[list[Piece]]:
    """Return rounds of pieces in which no rank sends or receives more than one.

    Args:
        transfers: of one layer.
        num_chunks: of every expert, the fingerprint included.
        slots_per_rank: slots of a rank.
    """
    rounds: list[list[Piece]] = []
    waiting = list(transfers)
    while waiting:
        wave = _disjoint(waiting, slots_per_rank)
        waiting = [transfer for transfer in waiting if transfer not in wave]
        rounds += [
            [Piece(transfer=transfer, chunk=chunk) for transfer in wave]
            for chunk in range(num_chunks)
        ]
    return rounds


def _disjoint(transfers: Sequence[Transfer], slots_per_rank: int) -> list[Transfer]:
    """Return the first transfers that share neither sender nor receiver."""
    senders: set[int] = set()
    receivers: set[int] = set()
    wave = []
    for transfer in transfers:
        sender = transfer.source_slot // slots_per_rank
        receiver = transfer.target_slot // slots_per_rank
        if sender not in senders and receiver not in receivers:
            senders.add(sender)
            receivers.add(receiver)
            wave.append(transfer)
    return wave


class Migration:
    """The way from one slot table to another; a collective: every rank has one and steps alike.

    Args:
        old: the present plan.
        new: the plan to be; the same but for its tables.
        rank: this process.
        experts_of: returns this rank's experts of a MoE layer (ordinal).
        empty_expert: returns weights of the right shapes, to be filled.
        install: told the plan from now on, a layer and this rank's experts of it.
        chunk_bytes: the most a rank sends, and receives, between two layers.
    """

    def __init__(
        self,
        old: Plan,
        new: Plan,
        rank: int,
        *,
        experts_of: Callable[[int], Experts],
        empty_expert: Callable[[], MlpWeights],
        install: Callable[[Plan, int, Experts], None],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._plan, self._new, self._rank = old, new, rank
        self._experts_of, self._empty_expert = experts_of, empty_expert
        self._install, self._chunk_bytes = install, chunk_bytes
        self._layers = [
            layer
            for layer in range(old.model.num_moe_layers)
            if old.expert_of_slot[layer] != new.expert_of_slot[layer]
            or old.shares(layer) != new.shares(layer)
        ]
        self._under_way: list[dist.Work] = []
        self._held: list[Tensor] = []  # fingerprints being sent, until they have left
        self.moved = Moved()
        self._begin_layer()

    @property
    def layers_left(self) -> int:
        """Layers whose tables have yet to change."""
        return len(self._layers)

    @property
    def chunks_left(self) -> int:
        """Rounds of the present layer that have not begun."""
        return len(self._rounds)

    def between_layers(self) -> None:
        """Send and receive the next chunk; the last one has had a layer's time to arrive."""
        self.settle()
        if self._rounds:
            self._start_round(self._rounds.pop(0))

    def between_steps(self) -> bool:
        """Change a layer's table once its experts are here; return whether all is done.

        Raises:
            EpplanError: an expert arrived damaged.
        """
        if self._layers and not self._rounds:
            self.settle()
            self._commit()
        return not self._layers

    def _begin_layer(self) -> None:
        self._rounds: list[list[Piece]] = []
        self._arriving: dict[int, MlpWeights] = {}  # by global slot
        self._fingerprints: dict[int, Tensor] = {}
        if not self._layers:
            return
        layer, per_rank = self._layers[0], self._plan.slots_per_rank
        hosts = [rank.host for rank in self._plan.ranks]
        self._transfers = layer_transfers(
            layer,
            self._plan.expert_of_slot[layer],
            self._new.expert_of_slot[layer],
            per_rank,
            hosts,
        )
        self._expert_bytes = 0
        if self._transfers:
            empty = self._empty_expert()
            chunks = sum(1 for _ in _chunks(empty, self._chunk_bytes))
            self._expert_bytes = sum(tensor.nbytes for tensor in empty.tensors)
            self._rounds = schedule(self._transfers, chunks + 1, per_rank)
            for transfer in self._transfers:
                if transfer.target_slot // per_rank == self._rank:
                    self._arriving[transfer.target_slot] = self._empty_expert()

    def _start_round(self, pieces: list[Piece]) -> None:
        operations = []
        for piece in pieces:
            sender = piece.transfer.source_slot // self._plan.slots_per_rank
            receiver = piece.transfer.target_slot // self._plan.slots_per_rank
            if sender == self._rank:
                operations.append(dist.P2POp(dist.isend, self._outgoing(piece), receiver))
            if receiver == self._rank:
                operations.append(dist.P2POp(dist.irecv, self._incoming(piece), sender))
        if operations:
            self._under_way = dist.batch_isend_irecv(operations)

    def settle(self) -> None:
        """Wait for the chunks under way."""
        for work in self._under_way:
            work.wait()
        self._under_way = []
        self._held = []

    def _outgoing(self, piece: Piece) -> Tensor:
        slot = piece.transfer.source_slot % self._plan.slots_per_rank
        expert = self._experts_of(piece.transfer.layer)[slot]
        assert expert is not None, piece
        chunk = _chunk(expert, self._chunk_bytes, piece.chunk)
        if chunk is None:
            chunk = fingerprint(expert).view(1)
            self._held.append(chunk)
        return chunk

    def _incoming(self, piece: Piece) -> Tensor:
        slot = piece.transfer.target_slot
        chunk = _chunk(self._arriving[slot], self._chunk_bytes, piece.chunk)
        if chunk is None:
            device = self._arriving[slot].up_FH.device
            chunk = self._fingerprints[slot] = torch.zeros(1, dtype=torch.int64, device=device)
        return chunk

    def _commit(self) -> None:
        """Put the layer's new table into use, on all ranks between the same two steps."""
        layer = self._layers.pop(0)
        self._check_arrived(layer)
        experts = self._new_experts(layer)
        self._plan = with_layer_of(self._plan, self._new, layer)
        self._install(self._plan, layer, experts)
        self.moved = Moved(
            experts=self.moved.experts + len(self._transfers),
            bytes=self.moved.bytes + len(self._transfers) * self._expert_bytes,
            layers=self.moved.layers + 1,
        )
        self._begin_layer()

    def _check_arrived(self, layer: int) -> None:
        for slot, expert in self._arriving.items():
            if int(fingerprint(expert)) != int(self._fingerprints[slot]):
                raise EpplanError(
                    f"expert {self._new.expert_of_slot[layer][slot]} of layer "
                    f"{self._new.model.moe_layers[layer]} arrived damaged at rank {self._rank}: "
                    "its fingerprint is not the sender's"
                )

    def _new_experts(self, layer: int) -> Experts:
        """Return this rank's experts by slot: arrived, kept, or moved within the rank."""
        per_rank, old = self._plan.slots_per_rank, self._plan.expert_of_slot[layer]
        first = self._rank * per_rank
        present = self._experts_of(layer)
        found: list[MlpWeights | None] = []
        for slot in range(first, first + per_rank):
            expert = self._new.expert_of_slot[layer][slot]
            if expert is None or slot in self._arriving:
                found.append(self._arriving.get(slot))
            else:
                here = local_slot(old, expert, self._rank, per_rank)
                assert here is not None, (layer, slot)
                found.append(present[here - first])
        return tuple(found)


def with_layer_of(plan: Plan, new: Plan, layer: int) -> Plan:
    """Return `plan` with one layer's table and shares of `new`."""
    layers = range(plan.model.num_moe_layers)
    slots = [(new if at == layer else plan).expert_of_slot[at] for at in layers]
    shares = [(new if at == layer else plan).shares(at) for at in layers]
    placed = [[expert for expert in row if expert is not None] for row in slots]
    copies = any(len(set(experts)) < len(experts) for experts in placed)
    return plan.model_copy(
        update={
            "expert_of_slot": tuple(slots),
            "share_of_slot": tuple(shares) if copies else None,
        }
    )


def empty_like(expert: MlpWeights) -> MlpWeights:
    """Return weights of the same shapes, not yet filled."""
    tensors: dict[str, Any] = {
        field.name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
        for field in fields(expert)
        if isinstance(value := getattr(expert, field.name), Tensor)
    }
    return replace(expert, **tensors)


def _chunks(expert: MlpWeights, chunk_bytes: int) -> Iterator[Tensor]:
    """Yield views of the expert's tensors, each of at most `chunk_bytes`."""
    for tensor in expert.tensors:
        # As bytes: every backend sends those, whatever the weights' dtype.
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        yield from torch.split(flat, chunk_bytes)


def _chunk(expert: MlpWeights, chunk_bytes: int, number: int) -> Tensor | None:
    """Return a chunk; None for the number after the last."""
    for index, chunk in enumerate(_chunks(expert, chunk_bytes)):
        if index == number:
            return chunk
    return None
