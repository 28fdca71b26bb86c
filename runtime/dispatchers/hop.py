"""One hop of rows that go to a rank once, with what is chosen of them there, and of sums back.

Shapes: U rows here, N choices of them, M rows sent, V rows and R choices received, W ranks, S slots
of all ranks, C slots that can be chosen where a hop ends, Q values, J most of them of one row.

A choice is a slot that wants a row, and its weight: 8 bytes that travel beside the rows say which
of the source's rows it wants, and with which weight. Nobody sends which slot it is: choices come in
the order of slots, and the counts say how many each slot has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.runtime.clock import Place

from .channel import Channel
from .flight import Flight
from .order import count, number_within, repeat_each, stable_order, weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Which slots want which rows."""

    row_N: Tensor  # int64
    slot_N: Tensor  # of all ranks' slots, int64
    weight_N: Tensor  # float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What goes where, as the counts of all ranks say; on the CPU."""

    send_rows: list[int]  # to each rank
    receive_rows: list[int]  # from each rank
    send_choices: list[int]  # to each rank
    receive_choices_WC: Tensor  # from each rank, of each slot that can be chosen here
    slots_C: Tensor  # which those are, ascending


class Hop:
    """Rows on their way from rank to rank.

    What arrives is held as long as the hop, which is dropped when its channel has been released.

    Args:
        channel: to travel by.
        choices: of the rows here.
        to_N: the rank where each choice ends or goes on.
        num_rows: U.
        num_slots: S.
        place: in the step.
    """

    def __init__(
        self,
        channel: Channel,
        choices: Choices,
        to_N: Tensor,
        *,
        num_rows: int,
        num_slots: int,
        place: Place,
    ) -> None:
        self._channel, self._choices, self._place = channel, choices, place
        self._num_rows = num_rows
        place_N = choices.row_N * channel.world_size + to_N
        goes_UW = mark(place_N, num_rows, channel.world_size)
        self.rows_W = goes_UW.sum(0)  # to each rank
        number_N = (goes_UW.cumsum(0) - 1).flatten().index_select(0, place_N)  # among those
        first_W = self.rows_W.cumsum(0) - self.rows_W
        sent_N = number_N + first_W.index_select(0, to_N)
        # There are at most N rows to send; how many, the host learns from the counts.
        self._row_M = torch.zeros_like(sent_N).scatter_(0, sent_N, choices.row_N)
        self._sort_N = stable_order(to_N * num_slots + choices.slot_N)
        weight_N = choices.weight_N.index_select(0, self._sort_N)
        number_N = number_N.index_select(0, self._sort_N).int()
        self._choices_N2 = torch.stack([weight_N, number_N.view(torch.float32)], dim=1)

    def pack(self, rows: Tensor, num_sent: int | None = None) -> None:
        """Put rows, [U, ...], in the order in which they leave; at this point of the computation.

        Args:
            rows: as they travel.
            num_sent: M, where the host knows it already.
        """
        self._packed = rows.index_select(0, self._row_M[:num_sent])
        self._ready = self._channel.point()

    def start(self, splits: Splits, name: str) -> None:
        """Send rows and choices."""
        self._splits, self._row_M = splits, self._row_M[: sum(splits.send_rows)]
        receive_choices = splits.receive_choices_WC.sum(1).tolist()
        self._rows = self._fly(name, splits.send_rows, splits.receive_rows)
        self._rows.start(self._packed[: sum(splits.send_rows)], self._ready)
        self._chosen = self._fly(f"{name} choices", splits.send_choices, receive_choices)
        self._chosen.start(self._choices_N2, self._ready)
        del self._packed, self._choices_N2

    def finish(self, *, check: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that arrive, by source, and the row and weight of each choice of them.

        Choices are by source and slot.

        Args:
            check: compare rows and choices with what their sources took them for.

        Raises:
            ValueError: they are others.
        """
        self._received = self._rows.finish(), self._chosen.finish()
        rows, choices_R2 = self._received
        choices_W = self._splits.receive_choices_WC.sum(1)
        rows_W = torch.tensor(self._splits.receive_rows)
        first_R = repeat_each(rows_W.cumsum(0) - rows_W, choices_W, rows.device)
        row_R = choices_R2[:, 1].detach().contiguous().view(torch.int32) + first_R
        if check:
            self._check(row_R)
        return rows, row_R, choices_R2[:, 0]

    def received_slots(self) -> Tensor:
        """Return the slot of each choice that arrives, as the counts say."""
        arriving_WC, slots_C = self._splits.receive_choices_WC, self._splits.slots_C
        device = self._choices.slot_N.device
        return repeat_each(slots_C.repeat(len(arriving_WC)), arriving_WC.flatten(), device)

    def send_back(self, sums: Tensor, name: str, after: torch.Event | None = None) -> None:
        """Send a sum for each row that arrived, [V, H]; they are ready at the point `after`."""
        self._back = self._fly(name, self._splits.receive_rows, self._splits.send_rows)
        self._back.start(sums, after)

    def finish_back(self, most: int) -> Tensor:
        """Return the sum of what comes back of each row, [U, H].

        Args:
            most: ranks that one row went to.
        """
        self._returned = self._back.finish()
        return add_up(self._returned, self._row_M, None, self._num_rows, most)

    def _fly(self, name: str, send: Sequence[int], receive: Sequence[int]) -> Flight:
        return Flight(self._channel, send, receive, name=name, place=self._place)

    def _check(self, row_R: Tensor) -> None:
        """Compare every choice's row and slot, as its source knows them, with what is here."""
        splits = self._splits
        receive_choices = splits.receive_choices_WC.sum(1).tolist()
        wanted_N2 = torch.stack([self._choices.row_N, self._choices.slot_N], dim=1)
        wanted_N2 = wanted_N2.index_select(0, self._sort_N)
        row_V = self._exchange(self._row_M, splits.send_rows, splits.receive_rows)
        wanted_R2 = self._exchange(wanted_N2, splits.send_choices, receive_choices)
        here_R2 = torch.stack([row_V[row_R], self.received_slots()], dim=1)
        wrong_R = (wanted_R2 != here_R2).any(1)
        if wrong_R.any():
            choice = int(wrong_R.nonzero()[0])
            row, slot = wanted_R2[choice].tolist()
            here_row, here_slot = here_R2[choice].tolist()
            raise ValueError(
                f"rank {dist.get_rank()} received {int(wrong_R.sum())} wrong choices of "
                f"{len(wrong_R)} in layer {self._place.layer}: choice {choice} is of row {row} of "
                f"its source for slot {slot}, its row and the counts say row {here_row} and slot "
                f"{here_slot}"
            )

    def _exchange(self, tags: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        arriving = self._channel.exchange(tags, send, receive, name="check", place=self._place)
        arriving.wait()
        return arriving.rows


def mark(place_N: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return a matrix of 1 at some places and 0 elsewhere, int32.

    Args:
        place_N: row times the number of columns, plus column.
        num_rows: of the matrix.
        num_columns: likewise.
    """
    marks = torch.zeros(num_rows * num_columns, dtype=torch.int32, device=place_N.device)
    return marks.scatter_(0, place_N, 1).view(num_rows, num_columns)


def add_up(
    values_QH: Tensor, row_Q: Tensor, weight_Q: Tensor | None, num_rows: int, most: int
) -> Tensor:
    """Return the sum of each row's values by weight, in their order, [rows, H].

    Args:
        values_QH: to add up.
        row_Q: of each.
        weight_Q: of each, float32; None is 1.
        num_rows: of the result.
        most: values of one row.
    """
    num_values, device = len(values_QH), values_QH.device
    number_Q = number_within(row_Q, count(row_Q, num_rows))
    # Row after row its values; those that a row has not are one of weight 0.
    value_J = torch.full((num_rows * most,), num_values, device=device)
    value_J.scatter_(0, row_Q * most + number_Q, torch.arange(num_values, device=device))
    if weight_Q is None:
        weight_J = (value_J < num_values).float()
    else:
        weight_J = torch.cat([weight_Q, weight_Q.new_zeros(1)]).index_select(0, value_J)
    return weighted_sum(
        values_QH,
        value_J.clamp(max=max(0, num_values - 1)).view(num_rows, most),
        weight_J.view(num_rows, most),
    )
