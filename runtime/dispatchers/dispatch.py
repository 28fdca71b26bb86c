"""The interface of all dispatchers, and what they share.

A dispatcher makes a transfer for each MoE layer of each micro-batch, and the transfer takes the
rows to the experts and back in steps. Between them another micro-batch may compute; `begin` and
`send` are apart so that the host need not wait for counts while the device has nothing queued, and
`take_outputs` and `send_back` so that the other's rows can leave before these outputs.

    begin         count and sort rows; counts are under way
    send          rows are under way
    receive       rows are here, slot by slot: compute the experts
    take_outputs  outputs are in the order in which they travel
    send_back     outputs are under way
    receive_back  outputs are with their tokens

Shapes: T tokens of this rank, K experts per token, N = T x K rows sent, R rows received, W ranks,
P slots per rank, S = W x P slots, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epplan.runtime.clock import Place

from .channel import Channel

DispatcherKind = Literal["alltoall", "padded", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRows:
    """What this rank's experts have to compute."""

    rows_RH: Tensor  # slot by slot, within a slot by source rank
    rows_of_slot: list[int]  # [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Where the tokens of one MoE layer and micro-batch go."""

    x_TH: Tensor  # hidden states, in the dtype they travel in
    slot_TK: Tensor  # global slots, `rank * slots_per_rank + slot of the rank`
    weights_TK: Tensor  # of the experts' outputs, float32
    held: tuple[bool, ...]  # [P]: slots of this rank that have an expert
    place: Place  # in the step, for messages and the trace
    check_rows: bool = False  # send every row's origin and slot along and compare on arrival


@dataclass(slots=True, kw_only=True)
class Counts:
    """Rows of one transfer by slot, int64."""

    own_S: Tensor  # sent by this rank; on the device
    all_WWP: Tensor | None = None  # by all, on the CPU; where they were gathered on the way


class Transfer(ABC):
    """The rows of one MoE layer and micro-batch, on their way to the experts and back."""

    counts: Counts

    @abstractmethod
    def send(self) -> None:
        """Send the rows to the ranks of their experts.

        Raises:
            ValueError: counts or rows are not what was sent.
        """

    @abstractmethod
    def receive(self) -> SlotRows:
        """Return the rows that arrived here, for the experts."""

    @abstractmethod
    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Take the experts' outputs, for the rows in the order of `receive`."""

    @abstractmethod
    def send_back(self) -> None:
        """Send the outputs to their tokens."""

    @abstractmethod
    def receive_back(self) -> Tensor:
        """Return the tokens' outputs, added up by weight, [T, H] in the dtype of the outputs."""


class Dispatcher(ABC):
    """Takes rows to the ranks of their experts."""

    def __init__(self, channel: Channel, slots_per_rank: int) -> None:
        self.channel = channel
        self.slots_per_rank = slots_per_rank

    @abstractmethod
    def begin(self, routed: Routed) -> Transfer:
        """Count and sort the rows that take each token to the slots of its experts."""

    def rerun(self, counts_NWWP: Tensor) -> "Dispatcher | None":
        """Return what to run a step again with that lost rows; None if all rows arrived.

        Args:
            counts_NWWP: rows of the step's transfers, the same on all ranks.
        """
        return None


def gather_counts(channel: Channel, counts: Sequence[Counts], place: Place) -> Tensor:
    """Return rows by transfer, source, destination and slot, int64 [N, W, W, P] on the CPU.

    A collective where the dispatcher has not gathered them on the way.
    """
    known = [each.all_WWP for each in counts if each.all_WWP is not None]
    if len(known) == len(counts):
        return torch.stack(known)
    own_NS = torch.stack([each.own_S for each in counts])
    everything = channel.gather_to_host(own_NS.flatten(), place).wait()
    gathered = checked_counts(everything, channel.rank, place)
    shape = (channel.world_size, len(counts), channel.world_size, -1)
    return gathered.view(shape).transpose(0, 1).contiguous()


def checked_counts(gathered: Tensor, rank: int, place: Place) -> Tensor:
    """Return the counts of all ranks, [W, n].

    Args:
        gathered: them, and once more the own ones, [W + 1, n].
        rank: this process.
        place: in the step.

    Raises:
        ValueError: the gathered counts are not what was counted here.
    """
    matrix, counted = gathered[:-1], gathered[-1]
    if not torch.equal(matrix[rank], counted):
        raise ValueError(
            f"rank {rank} counted {int(counted.sum())} rows in layer {place.layer}, by slot "
            f"{counted.tolist()}; the gathered counts say {int(matrix[rank].sum())}: "
            f"{matrix[rank].tolist()}"
        )
    return matrix
