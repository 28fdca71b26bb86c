"""Uneven all-to-all with one row per token and rank, however many of its experts are there.

Shapes: T tokens, K experts per token, N = T x K choices sent, U rows sent, R choices and V rows
received, W ranks, P slots per rank, S = W x P slots, J most choices of one row, H hidden size.

With several experts a rank, a token's choices often share a rank. The row then travels once, and
8 bytes a choice say which rows a slot computes and with which weight. Outputs are weighted and
added up where the experts are, so that one row per token and rank comes back: sums are rounded to
the dtype of the rows once more than with a row per choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .alltoall import repeat_each, slot_major
from .channel import Channel
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer, checked_counts
from .flight import Flight
from .order import count, number_within, stable_order, weighted_sum
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
        self._wire = dispatcher.wire
        self._place, self._check = routed.place, routed.check_rows
        self._dtype = routed.x_TH.dtype
        self._slot_TK = routed.slot_TK
        world_size, slots_per_rank = channel.world_size, dispatcher.slots_per_rank
        top_k = routed.slot_TK.shape[1]
        rank_TK = routed.slot_TK // slots_per_rank
        rows = _number_rows(rank_TK, world_size)
        self._row_TK, self._first_TK = rows.row_TK, rows.first_TK
        slot_N = routed.slot_TK.flatten()
        own_S = count(slot_N, world_size * slots_per_rank)
        self.counts = Counts(own_S=own_S)
        numbers = torch.cat([own_S, rows.rows_W])
        self._gathered = channel.gather_to_host(numbers, routed.place)
        # Choices in the order (r0,s0), (r0,s1), (r1,s0), ...: weight, and number of its row there.
        self._sort_N = stable_order(slot_N)
        weight_N = routed.weights_TK.flatten().index_select(0, self._sort_N)
        number_N = rows.number_TK.flatten().index_select(0, self._sort_N)
        self._choices_N2 = torch.stack([weight_N, number_N.int().view(torch.float32)], dim=1)
        # Row after row its token. There are at most N; how many the host learns from the counts.
        token_N = torch.arange(len(slot_N), device=slot_N.device) // top_k
        self._token_U = torch.zeros_like(slot_N).scatter_(0, rows.row_TK.flatten(), token_N)
        self._written = self._wire.write(routed.x_TH.index_select(0, self._token_U))
        self._ready = channel.point()

    def send(self) -> None:
        """Wait for the counts on the host, then send rows and choices."""
        rank, world_size = self._channel.rank, self._channel.world_size
        matrix = checked_counts(self._gathered.wait(), rank, self._place)
        counts_WWP = matrix[:, :-world_size].reshape(world_size, world_size, -1)
        self._rows_WW = matrix[:, -world_size:]
        self.counts.all_WWP = counts_WWP
        self._send_choices: list[int] = counts_WWP[rank].sum(-1).tolist()
        self._send_rows: list[int] = self._rows_WW[rank].tolist()
        self._arriving_WP = counts_WWP[:, rank]
        self._receive_choices: list[int] = self._arriving_WP.sum(-1).tolist()
        self._receive_rows: list[int] = self._rows_WW[:, rank].tolist()
        self._rows = self._fly("dispatch", self._send_rows, self._receive_rows)
        self._rows.start(self._written[: sum(self._send_rows)], self._ready)
        self._choices = self._fly("choices", self._send_choices, self._receive_choices)
        self._choices.start(self._choices_N2, self._ready)
        del self._written, self._choices_N2

    def receive(self) -> SlotRows:
        """Return a row for every choice, in the order of their slots."""
        self._received = self._rows.finish(), self._choices.finish()
        received_VH, choices_R2 = self._received  # held until the channel is released
        device = received_VH.device
        rows_W = self._rows_WW[:, self._channel.rank]
        first_R = repeat_each(rows_W.cumsum(0) - rows_W, self._arriving_WP.sum(-1), device)
        row_R = choices_R2[:, 1].detach().contiguous().view(torch.int32) + first_R
        if self._check:
            self._check_rows(row_R)
        weight_R = choices_R2[:, 0]
        order_R = slot_major(self._arriving_WP, device)
        if order_R is not None:
            row_R, weight_R = row_R.index_select(0, order_R), weight_R.index_select(0, order_R)
        self._row_R, self._weight_R = row_R, weight_R
        rows_RH = self._wire.read(received_VH, self._dtype).index_select(0, row_R)
        return SlotRows(rows_RH=rows_RH, rows_of_slot=self._arriving_WP.sum(0).tolist())

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Add up the outputs for each row by weight."""
        num_rows, num_choices = sum(self._receive_rows), len(outputs_RH)
        width = min(self._slot_TK.shape[1], self._arriving_WP.shape[1])
        number_R = number_within(self._row_R, count(self._row_R, num_rows))
        numbers_R = torch.arange(num_choices, device=outputs_RH.device)
        # Row after row its choices, by slot; those that a row has not are a choice of weight 0.
        choice_VJ = numbers_R.new_full((num_rows * width,), num_choices)
        choice_VJ.scatter_(0, self._row_R * width + number_R, numbers_R)
        weights = torch.cat([self._weight_R, self._weight_R.new_zeros(1)])
        self._sums_VH = weighted_sum(
            outputs_RH,
            choice_VJ.clamp(max=max(0, num_choices - 1)).view(num_rows, width),
            weights.index_select(0, choice_VJ).view(num_rows, width),
        )
        self._ready = self._channel.point()

    def send_back(self) -> None:
        """Send the sums."""
        self._rows = self._fly("combine", self._receive_rows, self._send_rows)
        self._rows.start(self._sums_VH, self._ready)
        del self._sums_VH

    def receive_back(self) -> Tensor:
        """Add up the sums of each token's ranks."""
        out_TH = weighted_sum(self._rows.finish(), self._row_TK, self._first_TK.float())
        self._channel.release()
        del self._received, self._choices
        return out_TH

    def _fly(self, name: str, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Flight:
        return Flight(self._channel, send_rows, receive_rows, name=name, place=self._place)

    def _check_rows(self, row_R: Tensor) -> None:
        """Compare every choice's token and slot with its row's token and the counts.

        Args:
            row_R: the received row of each choice, in the order of arrival.
        """
        channel = self._channel
        slots_per_rank = self._arriving_WP.shape[1]
        token_N = self._sort_N // self._slot_TK.shape[1]
        slot_N = self._slot_TK.flatten().index_select(0, self._sort_N)
        tags_N2 = torch.stack([token_N, slot_N], dim=1)
        sent_V = self._token_U[: sum(self._send_rows)]
        token_V = self._exchange(sent_V, self._send_rows, self._receive_rows).cpu()
        tags_R2 = self._exchange(tags_N2, self._send_choices, self._receive_choices).cpu()
        own_P = torch.arange(slots_per_rank) + channel.rank * slots_per_rank
        slot_R = own_P.repeat(channel.world_size).repeat_interleave(self._arriving_WP.flatten())
        expected_R2 = torch.stack([token_V[row_R.cpu()], slot_R], dim=1)
        wrong_R = (tags_R2 != expected_R2).any(1)
        if wrong_R.any():
            choice = int(wrong_R.nonzero()[0])
            token, slot = tags_R2[choice].tolist()
            row_token, row_slot = expected_R2[choice].tolist()
            raise ValueError(
                f"rank {channel.rank} received {int(wrong_R.sum())} wrong choices of "
                f"{len(wrong_R)} in layer {self._place.layer}: choice {choice} is of token {token} "
                f"for slot {slot}, its row and the counts say token {row_token} and slot {row_slot}"
            )

    def _exchange(self, tags: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        arriving = self._channel.exchange(tags, send, receive, name="check", place=self._place)
        arriving.wait()
        return arriving.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbering:
    rows_W: Tensor  # to each rank
    number_TK: Tensor  # of each choice's row, among those to its rank
    row_TK: Tensor  # the same among all rows, rank after rank
    first_TK: Tensor  # whether a token's choice is its first of that rank


def _number_rows(rank_TK: Tensor, world_size: int) -> _Numbering:
    """Number the rows that take each token once to each of its ranks, by rank and token."""
    goes_TW = rank_TK.new_zeros(len(rank_TK), world_size, dtype=torch.int32)
    goes_TW.scatter_(1, rank_TK, 1)
    rows_W = goes_TW.sum(0)
    number_TK = (goes_TW.cumsum(0) - 1).gather(1, rank_TK)
    first_W = rows_W.cumsum(0) - rows_W
    same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
    return _Numbering(
        rows_W=rows_W,
        number_TK=number_TK,
        row_TK=number_TK + first_W[rank_TK],
        first_TK=~same_TKK.tril(-1).any(-1),
    )
