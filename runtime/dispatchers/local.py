"""Dispatch where every expert a token needs is on its own rank: nothing travels.

Shapes: T tokens, K experts per token, N = T x K rows, W ranks, P slots per rank, S = W x P slots,
H hidden size.
"""

import torch
from torch import Tensor

from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer
from .order import count, inverse, stable_order, weighted_sum


class Local(Dispatcher):
    """Batches rows by expert and brings the outputs back in the tokens' order."""

    def begin(self, routed: Routed) -> Transfer:
        """Count and sort the rows; the counts are on their way to the host."""
        return _LocalTransfer(self, routed)


class _LocalTransfer(Transfer):
    def __init__(self, dispatcher: Local, routed: Routed) -> None:
        channel, slots_per_rank = dispatcher.channel, dispatcher.slots_per_rank
        self._rank, self._layer = channel.rank, routed.place.layer
        self._slots = slice(self._rank * slots_per_rank, (self._rank + 1) * slots_per_rank)
        self._weights_TK, self._slot_TK = routed.weights_TK, routed.slot_TK
        slot_N = routed.slot_TK.flatten()
        self.counts = Counts(own_S=count(slot_N, channel.world_size * slots_per_rank))
        self._on_host = channel.to_host(self.counts.own_S)
        self._sort_N = stable_order(slot_N)
        self._rows_NH = routed.x_TH.index_select(0, self._sort_N // routed.slot_TK.shape[1])

    def send(self) -> None:
        """Wait for the counts on the host.

        Raises:
            ValueError: a row's expert is on another rank.
        """
        counts_S = self._on_host.wait()
        self._rows_of_slot: list[int] = counts_S[self._slots].tolist()
        elsewhere = int(counts_S.sum()) - sum(self._rows_of_slot)
        if elsewhere:
            counts_S[self._slots] = 0
            slot = int(torch.nonzero(counts_S)[0])
            raise ValueError(
                f"rank {self._rank} has {elsewhere} rows in layer {self._layer} for slots of other "
                f"ranks, the first for slot {slot}; the local dispatcher moves none"
            )

    def receive(self) -> SlotRows:
        """Return the rows in the order of their slots."""
        return SlotRows(rows_RH=self._rows_NH, rows_of_slot=self._rows_of_slot)

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Keep the outputs."""
        self._rows_NH = outputs_RH

    def send_back(self) -> None:
        """Send nothing."""

    def receive_back(self) -> Tensor:
        """Add up the outputs."""
        row_TK = inverse(self._sort_N).view_as(self._slot_TK)
        out_TH = weighted_sum(self._rows_NH, row_TK, self._weights_TK)
        del self._rows_NH
        return out_TH
