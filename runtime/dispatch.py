"""Dispatch and combine with `all_to_all_single` and uneven splits.

Shapes: T tokens of this rank, K experts per token, N = T x K rows sent, R rows received, W ranks,
P slots per rank, H hidden size.

One all-gather of the counts gives every rank the matrix M[source, destination, slot]; split
sizes, the order of received rows, the load of all experts and the consistency checks all come
from it. On wrong splits gloo can deliver garbage in silence and NCCL hangs, so all is checked.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRows:
    """What this rank's experts have to compute."""

    rows_RH: Tensor  # slot by slot, within a slot by source rank
    rows_of_slot: list[int]  # [P]


class AllToAll:
    """Sends rows to the ranks of their experts and back.

    Args:
        rank: this process.
        world_size: number of ranks, all of the default process group.
        slots_per_rank: experts a rank may hold.
    """

    def __init__(self, *, rank: int, world_size: int, slots_per_rank: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._slots_per_rank = slots_per_rank
        # torch 2.13 renamed the collective and warns about the old name.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def begin(
        self, x_TH: Tensor, slot_TK: Tensor, weights_TK: Tensor, *, check_rows: bool = False
    ) -> "Transfer":
        """Count and sort the rows that take each token to the slots of its experts.

        Args:
            x_TH: hidden states.
            slot_TK: global slot numbers, `rank * slots_per_rank + slot of the rank`.
            weights_TK: of the experts' outputs, float32.
            check_rows: also send every row's origin and slot along and compare on arrival; costs
                a second all-to-all of 8 bytes a row.

        Raises:
            ValueError: the gathered counts are not what was counted here.
        """
        sort_N = slot_TK.flatten().argsort(stable=True)  # (r0,s0), (r0,s1), (r1,s0), ...
        counts_WWP = self._gather_counts(slot_TK)
        send_rows = counts_WWP[self._rank].sum(-1).tolist()
        arriving_WP = counts_WWP[:, self._rank]  # [source, slot]: what each source sends here
        if check_rows:
            self._check_rows(slot_TK.flatten()[sort_N], send_rows, arriving_WP)
        return Transfer(
            send_NH=x_TH[sort_N // slot_TK.shape[1]],
            weights_TK=weights_TK,
            sort_N=sort_N,
            counts_WWP=counts_WWP,
            send_rows=send_rows,
            arriving_WP=arriving_WP,
        )

    def _gather_counts(self, slot_TK: Tensor) -> Tensor:
        """Return M[source, destination, slot] on the CPU."""
        slot_N = slot_TK.flatten()
        num_slots = self._world_size * self._slots_per_rank
        # scatter_add_ and not bincount, which waits for the device.
        counts = torch.zeros(num_slots, dtype=torch.int64, device=slot_N.device)
        counts.scatter_add_(0, slot_N, torch.ones_like(slot_N))
        # Gloo wants the output flat.
        gathered = counts.new_empty(self._world_size * num_slots)
        self._all_gather(gathered, counts)
        # Device-to-host sync: split sizes of uneven collectives are host numbers.
        on_host = torch.cat([counts, gathered]).cpu()
        counted, matrix = on_host[:num_slots], on_host[num_slots:]
        own = matrix.view(self._world_size, num_slots)[self._rank]
        if not torch.equal(own, counted):
            raise ValueError(
                f"rank {self._rank} counted {int(counted.sum())} rows, by slot "
                f"{counted.tolist()}; the gathered counts say {int(own.sum())}: {own.tolist()}"
            )
        return matrix.view(self._world_size, self._world_size, self._slots_per_rank)

    def _check_rows(self, slot_N: Tensor, send_rows: list[int], arriving_WP: Tensor) -> None:
        """Compare origin and slot of every received row with what the counts say."""
        num_slots = self._world_size * self._slots_per_rank
        receive_rows = arriving_WP.sum(-1).tolist()
        tags_R = _exchange(slot_N + self._rank * num_slots, send_rows, receive_rows)
        slots_P = torch.arange(self._slots_per_rank) + self._rank * self._slots_per_rank
        expected_WP = torch.arange(self._world_size)[:, None] * num_slots + slots_P
        expected_R = expected_WP.flatten().repeat_interleave(arriving_WP.flatten())
        wrong_R = tags_R.cpu() != expected_R
        if wrong_R.any():
            row = int(wrong_R.nonzero()[0])
            is_tag, expected_tag = int(tags_R[row]), int(expected_R[row])
            raise ValueError(
                f"rank {self._rank} received {int(wrong_R.sum())} wrong rows of "
                f"{len(expected_R)}: row {row} comes from rank {is_tag // num_slots} for slot "
                f"{is_tag % num_slots}, the counts say rank {expected_tag // num_slots} and slot "
                f"{expected_tag % num_slots}"
            )


class Transfer:
    """The rows of one MoE layer, on their way to the experts and back: four steps, in order."""

    def __init__(
        self,
        *,
        send_NH: Tensor,
        weights_TK: Tensor,
        sort_N: Tensor,  # sorted row -> row t * K + k
        counts_WWP: Tensor,  # M, int64, on the CPU
        send_rows: list[int],  # [W]
        arriving_WP: Tensor,
    ) -> None:
        self.counts_WWP = counts_WWP
        self._rows = send_NH
        self._weights_TK = weights_TK
        self._sort_N = sort_N
        self._send_rows = send_rows
        self._arriving_WP = arriving_WP
        self._receive_rows: list[int] = arriving_WP.sum(-1).tolist()
        # slot-major row -> received row; None where they are the same
        self._slot_major_R: Tensor | None = None

    def send(self) -> None:
        """Send the rows to the ranks of their experts."""
        self._rows = _exchange(self._rows, self._send_rows, self._receive_rows)

    def receive(self) -> SlotRows:
        """Return the rows that arrived here, for the experts."""
        self._slot_major_R = _slot_major(self._arriving_WP, self._rows.device)
        rows_RH = self._rows if self._slot_major_R is None else self._rows[self._slot_major_R]
        return SlotRows(rows_RH=rows_RH, rows_of_slot=self._arriving_WP.sum(0).tolist())

    def send_back(self, outputs_RH: Tensor) -> None:
        """Send the experts' outputs, for the rows in the order of `receive`, to their tokens."""
        if self._slot_major_R is not None:
            outputs_RH = torch.empty_like(outputs_RH).index_copy_(0, self._slot_major_R, outputs_RH)
        self._rows = _exchange(outputs_RH, self._receive_rows, self._send_rows)

    def receive_back(self) -> Tensor:
        """Return the tokens' outputs, added up by weight.

        Returns:
            [T, H] in the dtype of the rows; summed in float32 from a token's first choice to its
            last, whatever the order of arrival.
        """
        home_NH = torch.empty_like(self._rows).index_copy_(0, self._sort_N, self._rows)
        home_TKH = home_NH.view(*self._weights_TK.shape, home_NH.shape[1])
        sum_TH = home_TKH[:, 0].float() * self._weights_TK[:, :1]
        for choice in range(1, self._weights_TK.shape[1]):
            sum_TH += home_TKH[:, choice] * self._weights_TK[:, choice, None]
        return sum_TH.to(self._rows.dtype)


def _exchange(rows: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
    """Send `send_rows[rank]` rows to every rank, in rank order, and return those received."""
    if sum(send_rows) != rows.shape[0]:
        raise ValueError(f"splits {send_rows} add up to {sum(send_rows)} of {rows.shape[0]} rows")
    received = rows.new_empty(sum(receive_rows), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive_rows, send_rows)
    return received


def _slot_major(arriving_WP: Tensor, device: torch.device) -> Tensor | None:
    """Return the order that gathers the rows of each slot, on `device`.

    Received rows are rank-major:   (r0,s0), (r0,s1), (r1,s0), (r1,s1), ...
    experts want them slot-major:   (r0,s0), (r1,s0), ..., (r0,s1), (r1,s1), ...
    """
    num_ranks, slots_per_rank = arriving_WP.shape
    if slots_per_rank == 1:
        return None
    slot_R = (
        torch.arange(slots_per_rank, device=device)
        .repeat(num_ranks)
        .repeat_interleave(
            arriving_WP.flatten().to(device),
            output_size=int(arriving_WP.sum()),  # otherwise a device-to-host sync
        )
    )
    return slot_R.argsort(stable=True)
