"""Uneven all-to-all with one row per token and rank, however many of its experts are there.

Shapes: T tokens, K experts per token, V rows and R choices received, W ranks, P slots per rank, S =
W x P slots, H hidden size.

With several experts a rank, a token's choices often share a rank. The row then travels once
(`hop.py`). Outputs are weighted and added up where the experts are, so that one row per token and
rank comes back: sums are rounded to the dtype of the rows once more than with a row per choice.
"""

import torch
from torch import Tensor

from .channel import Channel
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer, checked_counts
from .hop import Choices, Hop, Splits, add_up
from .order import count, slot_major
from .wire import Wire


class Deduplicated(Dispatcher):
    """Sends one row per token and rank.

    Args:
        channel: to travel by.
        slots_per_rank: experts a rank may hold.
        wire: how rows are written on the way to the experts.
    """

    def __init__(self, channel: Channel, slots_per_rank: int, wire: Wire) -> None:
        super().__init__(channel, slots_per_rank)
        self.wire = wire

    def begin(self, routed: Routed) -> Transfer:
        """Count and sort rows and choices; the counts are under way."""
        return _DeduplicatedTransfer(self, routed)


class _DeduplicatedTransfer(Transfer):
    def __init__(self, dispatcher: Deduplicated, routed: Routed) -> None:
        self._channel = channel = dispatcher.channel
        self._wire, self._place = dispatcher.wire, routed.place
        self._check, self._dtype = routed.check_rows, routed.x_TH.dtype
        self._top_k = routed.slot_TK.shape[1]
        choices = choices_of(routed)
        num_slots = channel.world_size * dispatcher.slots_per_rank
        self._hop = Hop(
            channel,
            choices,
            choices.slot_N // dispatcher.slots_per_rank,
            num_rows=len(routed.x_TH),
            num_slots=num_slots,
            place=routed.place,
        )
        self.counts = Counts(own_S=count(choices.slot_N, num_slots))
        numbers = torch.cat([self.counts.own_S, self._hop.rows_W])
        self._gathered = channel.gather_to_host(numbers, routed.place)
        self._hop.pack(self._wire.write(routed.x_TH))

    def send(self) -> None:
        """Wait for the counts on the host, then send rows and choices."""
        rank, world_size = self._channel.rank, self._channel.world_size
        matrix = checked_counts(self._gathered.wait(), rank, self._place)
        counts_WWP = matrix[:, :-world_size].reshape(world_size, world_size, -1)
        rows_WW = matrix[:, -world_size:]
        self.counts.all_WWP = counts_WWP
        self._arriving_WP = counts_WWP[:, rank]
        slots_per_rank = counts_WWP.shape[2]
        splits = Splits(
            send_rows=rows_WW[rank].tolist(),
            receive_rows=rows_WW[:, rank].tolist(),
            send_choices=counts_WWP[rank].sum(-1).tolist(),
            receive_choices_WC=self._arriving_WP,
            slots_C=torch.arange(slots_per_rank) + rank * slots_per_rank,
        )
        self._hop.start(splits, "dispatch")
        del self._gathered

    def receive(self) -> SlotRows:
        """Return a row for every choice, in the order of their slots."""
        arrived = self._hop.finish(check=self._check)
        self._arrived = Arrived(*arrived, self._arriving_WP, self._top_k)
        return self._arrived.by_slot(self._wire, self._dtype)

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Add up the outputs for each row by weight."""
        self._sums_VH = self._arrived.sums(outputs_RH)
        self._ready = self._channel.point()

    def send_back(self) -> None:
        """Send the sums."""
        self._hop.send_back(self._sums_VH, "combine", self._ready)
        del self._sums_VH

    def receive_back(self) -> Tensor:
        """Add up the sums of each token's ranks."""
        out_TH = self._hop.finish_back(min(self._top_k, self._channel.world_size))
        self._channel.release()
        del self._arrived, self._hop
        return out_TH


class Arrived:
    """Rows where their experts are, and what is chosen of them.

    Args:
        rows_V: as they travelled.
        row_R: of each choice, by source and slot.
        weight_R: likewise.
        arriving_WP: how many from each rank for each slot here, on the CPU.
        top_k: choices of a token.
    """

    def __init__(
        self, rows_V: Tensor, row_R: Tensor, weight_R: Tensor, arriving_WP: Tensor, top_k: int
    ) -> None:
        self._rows_V, self._arriving_WP = rows_V, arriving_WP
        self._row_R, self._weight_R = row_R, weight_R
        order_R = slot_major(arriving_WP, rows_V.device)
        if order_R is not None:
            self._row_R = self._row_R.index_select(0, order_R)
            self._weight_R = self._weight_R.index_select(0, order_R)
        self._most = min(top_k, arriving_WP.shape[1])

    def by_slot(self, wire: Wire, dtype: torch.dtype) -> SlotRows:
        """Return a row for every choice, in the order of their slots."""
        rows_RH = wire.read(self._rows_V, dtype).index_select(0, self._row_R)
        return SlotRows(rows_RH=rows_RH, rows_of_slot=self._arriving_WP.sum(0).tolist())

    def sums(self, outputs_RH: Tensor) -> Tensor:
        """Return the outputs added up for each row by weight, [V, H]."""
        return add_up(outputs_RH, self._row_R, self._weight_R, len(self._rows_V), self._most)


def choices_of(routed: Routed) -> Choices:
    """Return the choices of all tokens, T x K of them."""
    num_tokens, top_k = routed.slot_TK.shape
    token_T = torch.arange(num_tokens, device=routed.slot_TK.device)
    return Choices(
        row_N=token_T.repeat_interleave(top_k),
        slot_N=routed.slot_TK.flatten(),
        weight_N=routed.weights_TK.flatten(),
    )
