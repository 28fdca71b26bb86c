"""Dispatch with equal splits: every rank has room for `capacity` rows to every slot.

Shapes: T tokens, K experts per token, R rows, W ranks, P slots per rank, S = W x P slots,
C capacity, H hidden size.

The host waits for nothing and all shapes are fixed, so that a CUDA graph can hold the step; the
price is padding on the wire and in the experts. Rows above the capacity are lost. The counts tell,
once a step, and the step is run again without a limit (Megatron's policy); the capacity grows.
"""

from math import ceil, sqrt

import torch
from torch import Tensor

from .channel import Channel
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer
from .flight import Flight
from .order import weighted_sum
from .padding import pad
from .wire import Wire

_DEVIATIONS = 6  # of the rows of one slot around their mean, were tokens to choose at random


class Padded(Dispatcher):
    """Sends `capacity` rows to every slot, used or not.

    Args:
        channel: to travel by.
        slots_per_rank: experts a rank may hold.
        wire: how rows are written on the way to the experts.
        capacity: rows from one rank to one slot in one micro-batch, the same on all ranks.
        dropless: runs steps again that lost rows.
    """

    def __init__(
        self,
        channel: Channel,
        slots_per_rank: int,
        wire: Wire,
        *,
        capacity: int,
        dropless: Dispatcher,
    ) -> None:
        super().__init__(channel, slots_per_rank)
        self.wire = wire
        self.capacity = capacity
        self._dropless = dropless

    def begin(self, routed: Routed) -> Transfer:
        """Put every row at its place."""
        return _PaddedTransfer(self, routed)

    def rerun(self, counts_NWWP: Tensor) -> Dispatcher | None:
        """Return the dropless dispatcher, and let the capacity grow, if there were more rows."""
        most = int(counts_NWWP.max())
        if most <= self.capacity:
            return None
        self.capacity = ceil(1.25 * most)
        return self._dropless


def capacity_for(tokens: int, top_k: int, num_slots: int, factor: float) -> int:
    """Return a capacity: `factor` times the mean, and room for chance; never above `tokens`.

    Args:
        tokens: of one rank in one micro-batch, at most.
        top_k: experts per token.
        num_slots: that hold an expert, of all ranks.
        factor: 1 suits experts that are equally popular.
    """
    mean = tokens * top_k / num_slots
    return max(1, min(tokens, ceil(factor * mean + _DEVIATIONS * sqrt(mean))))


class _PaddedTransfer(Transfer):
    def __init__(self, dispatcher: Padded, routed: Routed) -> None:
        self._channel = channel = dispatcher.channel
        self._wire, self._place = dispatcher.wire, routed.place
        self._capacity, self._dtype = dispatcher.capacity, routed.x_TH.dtype
        self._slots_per_rank, self._held = dispatcher.slots_per_rank, routed.held
        num_slots = channel.world_size * dispatcher.slots_per_rank
        padded, self._place_TK, self._weights_TK, own_S = pad(
            routed.x_TH, routed.slot_TK, routed.weights_TK, num_slots, self._capacity
        )
        self.counts = Counts(own_S=own_S)
        self._written = self._wire.write(padded)
        self._ready = channel.point()

    def send(self) -> None:
        """Send all places; nobody waits."""
        self._flight = self._fly("dispatch")
        self._flight.start(self._written, self._ready)
        del self._written

    def receive(self) -> SlotRows:
        """Return the rows of slots that have an expert, padding included."""
        self._received = self._flight.finish()  # held until the channel is released
        rows_RH = self._wire.read(self._received, self._dtype)
        rows = self._channel.world_size * self._capacity
        rows_of_slot = [rows * held for held in self._held]
        return SlotRows(rows_RH=self._by_slot(rows_RH), rows_of_slot=rows_of_slot)

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Put the outputs of all places in the order in which their rows came."""
        self._outputs_RH, self._ready = self._by_source(outputs_RH), self._channel.point()

    def send_back(self) -> None:
        """Send the outputs of all places."""
        self._flight = self._fly("combine")
        self._flight.start(self._outputs_RH, self._ready)
        del self._outputs_RH

    def receive_back(self) -> Tensor:
        """Add up the outputs."""
        out_TH = weighted_sum(self._flight.finish(), self._place_TK, self._weights_TK)
        self._channel.release()
        del self._received
        return out_TH

    def _fly(self, name: str) -> Flight:
        rows = [self._slots_per_rank * self._capacity] * self._channel.world_size
        return Flight(self._channel, rows, rows, name=name, place=self._place)

    def _by_slot(self, rows_RH: Tensor) -> Tensor:
        """Return rows by source, slot and number in the order of slot, source and number.

        Rows of slots without an expert are left out.
        """
        shape = (self._channel.world_size, len(self._held), self._capacity, rows_RH.shape[1])
        blocks_WPCH = rows_RH.view(shape)
        kept = [blocks_WPCH[:, slot] for slot, held in enumerate(self._held) if held]
        if not kept:
            return rows_RH[:0]
        return (kept[0] if len(kept) == 1 else torch.stack(kept)).reshape(-1, rows_RH.shape[1])

    def _by_source(self, rows_RH: Tensor) -> Tensor:
        """Return rows in the order of `_by_slot` in the order before it."""
        shape = (sum(self._held), self._channel.world_size, self._capacity, rows_RH.shape[1])
        if len(self._held) == sum(self._held) == 1:
            return rows_RH
        if not any(self._held):
            # Joined to the rows, of which there are none: gradients must travel from here too.
            num_rows = len(self._held) * shape[1] * shape[2]
            return torch.cat([rows_RH, rows_RH.new_zeros(num_rows, shape[3])])
        blocks = iter(rows_RH.view(shape))
        nothing_WCH = rows_RH.new_zeros(shape[1:])
        by_slot = [next(blocks) if held else nothing_WCH for held in self._held]
        return torch.stack(by_slot, dim=1).flatten(0, 2)
