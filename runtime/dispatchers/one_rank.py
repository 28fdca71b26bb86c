"""The dispatcher of a rank that runs alone: all of its work but the transfers.

Rows are sorted by slot and added up by token as for sending and receiving, and the rank's experts
compute as many rows as it sends: its share when load is even. Nothing travels, so outputs are not
the model's; it is for timing only, and its host never waits for the device.

Shapes: T tokens, K experts per token, N = T x K rows, P slots, H hidden size.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .batching import batch
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer
from .order import weighted_sum


class OneRank(Dispatcher):
    """Hands a rank its own rows."""

    def __init__(self) -> None:
        """Without a channel: nothing is sent."""

    def begin(self, routed: Routed) -> Transfer:
        """Sort the rows by slot."""
        return _OneRankTransfer(routed)


class _OneRankTransfer(Transfer):
    def __init__(self, routed: Routed) -> None:
        self._held = routed.held
        self._weights_TK = routed.weights_TK
        self._rows_NH, self._place_TK = batch(routed.x_TH, routed.slot_TK)
        self.counts = Counts(own_S=torch.empty(0, dtype=torch.int64))  # nobody asks

    def send(self) -> None:
        """Send nothing."""

    def receive(self) -> SlotRows:
        """Return the rows, spread evenly over the slots that hold an expert."""
        num_rows, num_held = len(self._rows_NH), sum(self._held)
        ends = [num_rows * number // num_held for number in range(num_held + 1)]
        shares = iter([end - begin for begin, end in pairwise(ends)])
        rows_of_slot = [next(shares) if is_held else 0 for is_held in self._held]
        return SlotRows(rows_RH=self._rows_NH, rows_of_slot=rows_of_slot)

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Keep the outputs."""
        self._rows_NH = outputs_RH

    def send_back(self) -> None:
        """Send nothing."""

    def receive_back(self) -> Tensor:
        """Add up the outputs."""
        return weighted_sum(self._rows_NH, self._place_TK, self._weights_TK)
