"""Dispatch with `all_to_all_single` and uneven splits: no row is padded, none is lost.

Shapes: T tokens of this rank, K experts per token, N = T x K rows sent, R rows received, W ranks,
P slots per rank, S = W x P slots, H hidden size.

One all-gather of the counts gives every rank the matrix M[source, destination, slot]; split
sizes, the order of received rows, the load of all experts and the consistency checks all come
from it. On wrong splits gloo can deliver garbage in silence and NCCL hangs, so all is checked.
Split sizes are host numbers: `send` waits for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import Channel
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer, checked_counts
from .flight import Flight
from .order import count, inverse, slot_major, stable_order, weighted_sum
from .wire import Wire


class AllToAll(Dispatcher):
    """Sends one row per token and expert.

    Args:
        channel: to travel by.
        slots_per_rank: experts a rank may hold.
        wire: how rows are written on the way to the experts.
    """

    def __init__(self, channel: Channel, slots_per_rank: int, wire: Wire) -> None:
        super().__init__(channel, slots_per_rank)
        self.wire = wire

    def begin(self, routed: Routed) -> Transfer:
        """Count and sort the rows; the counts are under way."""
        return _AllToAllTransfer(self, routed)


class _AllToAllTransfer(Transfer):
    def __init__(self, dispatcher: AllToAll, routed: Routed) -> None:
        self._channel = channel = dispatcher.channel
        self._wire = dispatcher.wire
        self._place, self._check = routed.place, routed.check_rows
        self._dtype = routed.x_TH.dtype
        self._weights_TK, self._slot_TK = routed.weights_TK, routed.slot_TK
        slot_N = routed.slot_TK.flatten()
        self.counts = Counts(own_S=count(slot_N, channel.world_size * dispatcher.slots_per_rank))
        self._gathered = channel.gather_to_host(self.counts.own_S, routed.place)
        # (r0,s0), (r0,s1), (r1,s0), ...: sorted row -> row t * K + k
        self._sort_N = stable_order(slot_N)
        sorted_NH = routed.x_TH.index_select(0, self._sort_N // routed.slot_TK.shape[1])
        self._written = self._wire.write(sorted_NH)
        # What is queued from here on, another micro-batch's attention, must not hold up the rows.
        self._ready = channel.point()

    def send(self) -> None:
        """Wait for the counts on the host, then send the rows."""
        rank, world_size = self._channel.rank, self._channel.world_size
        matrix = checked_counts(self._gathered.wait(), rank, self._place)
        counts_WWP = self.counts.all_WWP = matrix.view(world_size, world_size, -1)
        self._send_rows: list[int] = counts_WWP[rank].sum(-1).tolist()
        self._arriving_WP = counts_WWP[:, rank]  # [source, slot]: what comes from each source
        self._receive_rows: list[int] = self._arriving_WP.sum(-1).tolist()
        if self._check:
            self._check_rows()
        self._flight = self._fly("dispatch", self._send_rows, self._receive_rows)
        self._flight.start(self._written, self._ready)
        del self._written, self._gathered

    def receive(self) -> SlotRows:
        """Return the rows in the order of their slots."""
        self._received = self._flight.finish()  # held until the channel is released
        rows_RH = self._wire.read(self._received, self._dtype)
        self._slot_major_R = slot_major(self._arriving_WP, rows_RH.device)
        if self._slot_major_R is not None:
            rows_RH = rows_RH.index_select(0, self._slot_major_R)
        return SlotRows(rows_RH=rows_RH, rows_of_slot=self._arriving_WP.sum(0).tolist())

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Put the outputs in the order in which their rows came."""
        if self._slot_major_R is not None:
            outputs_RH = outputs_RH.index_select(0, inverse(self._slot_major_R))
        self._outputs_RH, self._ready = outputs_RH, self._channel.point()

    def send_back(self) -> None:
        """Send the outputs."""
        self._flight = self._fly("combine", self._receive_rows, self._send_rows)
        self._flight.start(self._outputs_RH, self._ready)
        del self._outputs_RH

    def receive_back(self) -> Tensor:
        """Add up the outputs."""
        returned_NH = self._flight.finish()
        row_TK = inverse(self._sort_N).view_as(self._slot_TK)
        out_TH = weighted_sum(returned_NH, row_TK, self._weights_TK)
        self._channel.release()
        del self._received
        return out_TH

    def _fly(self, name: str, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Flight:
        return Flight(self._channel, send_rows, receive_rows, name=name, place=self._place)

    def _check_rows(self) -> None:
        """Compare origin and slot of every received row with what the counts say."""
        channel = self._channel
        num_slots = len(self.counts.own_S)
        slots_per_rank = num_slots // channel.world_size
        slot_N = self._slot_TK.flatten().index_select(0, self._sort_N)
        arriving = channel.exchange(
            slot_N + channel.rank * num_slots,
            self._send_rows,
            self._receive_rows,
            name="check",
            place=self._place,
        )
        arriving.wait()
        slots_P = torch.arange(slots_per_rank) + channel.rank * slots_per_rank
        expected_WP = torch.arange(channel.world_size)[:, None] * num_slots + slots_P
        expected_R = expected_WP.flatten().repeat_interleave(self._arriving_WP.flatten())
        tags_R = arriving.rows.cpu()
        wrong_R = tags_R != expected_R
        if wrong_R.any():
            row = int(wrong_R.nonzero()[0])
            is_tag, expected_tag = int(tags_R[row]), int(expected_R[row])
            raise ValueError(
                f"rank {channel.rank} received {int(wrong_R.sum())} wrong rows of "
                f"{len(expected_R)} in layer {self._place.layer}: row {row} comes from rank "
                f"{is_tag // num_slots} for slot {is_tag % num_slots}, the counts say rank "
                f"{expected_tag // num_slots} and slot {expected_tag % num_slots}"
            )
