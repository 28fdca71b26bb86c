"""Dispatch and combine over real gloo ranks, with experts simple enough to know the answer."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from epplan.runtime import dispatch as dispatch_module
from epplan.runtime.dispatch import AllToAll
from tests.fork_ranks import RankError, run_ranks

RANKS = 16
HIDDEN = 8
Choice = Callable[[int, int], Tensor]  # rank, slots per rank -> slot_TK


def spread(rank: int, slots_per_rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randperm(RANKS * slots_per_rank, generator=generator)[:3] for _ in range(20)]
    return torch.stack(rows)


def all_to_one(rank: int, slots_per_rank: int) -> Tensor:
    return torch.full((20, 1), 5 * slots_per_rank + slots_per_rank - 1)


def none_to_rank_3(rank: int, slots_per_rank: int) -> Tensor:
    slot_TK = spread(rank, slots_per_rank)
    return torch.where(slot_TK // slots_per_rank == 3, 2 * slots_per_rank, slot_TK)


def uneven_tokens(rank: int, slots_per_rank: int) -> Tensor:
    """Rank 0 has no tokens at all, rank 15 has 15."""
    return spread(rank, slots_per_rank)[:rank]


def scale_by_slot(rank: int, slots_per_rank: int, choice: Choice) -> tuple[int, bool]:
    """Let the expert in slot s multiply by s + 1.

    Returns:
        The number of rows received, and whether the combined output is right.
    """
    slot_TK = choice(rank, slots_per_rank)
    generator = torch.Generator().manual_seed(100 + rank)
    x_TH = torch.randn(len(slot_TK), HIDDEN, generator=generator)
    weights_TK = torch.rand(slot_TK.shape, generator=generator)
    exchange = AllToAll(rank=rank, world_size=RANKS, slots_per_rank=slots_per_rank)
    transfer = exchange.begin(x_TH, slot_TK, weights_TK, check_rows=True)
    transfer.send()
    rows = transfer.receive()
    factors = torch.arange(slots_per_rank) + rank * slots_per_rank + 1
    factor_R = factors.repeat_interleave(torch.tensor(rows.rows_of_slot))
    transfer.send_back(rows.rows_RH * factor_R[:, None])
    out_TH = transfer.receive_back()
    expected_TH = x_TH * (weights_TK * (slot_TK + 1)).sum(-1, keepdim=True)
    return len(rows.rows_RH), torch.allclose(out_TH, expected_TH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slots_per_rank", [1, 3])
@pytest.mark.parametrize("choice", [spread, all_to_one, none_to_rank_3, uneven_tokens])
def test_rows_come_back_from_the_right_slots(choice: Choice, slots_per_rank: int) -> None:
    received, right = zip(*run_ranks(scale_by_slot, RANKS, slots_per_rank, choice), strict=True)
    assert all(right)
    sent = [choice(rank, slots_per_rank).numel() for rank in range(RANKS)]
    assert sum(received) == sum(sent)
    if choice is all_to_one:
        assert received[5] == sum(sent)
    if choice is none_to_rank_3:
        assert received[3] == 0


def tamper_with_counts(rank: int) -> None:
    """On rank 2 the all-gather returns two of its own counts exchanged."""

    def wrong_gather(gathered: Tensor, counts: Tensor) -> None:
        real_gather(gathered, counts)
        gathered[[2 * 4, 2 * 4 + 1]] = gathered[[2 * 4 + 1, 2 * 4]]

    exchange = AllToAll(rank=rank, world_size=4, slots_per_rank=1)
    real_gather = exchange._all_gather
    with patch.object(exchange, "_all_gather", wrong_gather if rank == 2 else real_gather):
        exchange.begin(torch.zeros(3, HIDDEN), torch.tensor([[0], [0], [1]]), torch.ones(3, 1))


def test_counts_that_are_not_what_was_counted() -> None:
    with pytest.raises(
        RankError,
        match=r"(?s)rank 2: .*ValueError: rank 2 counted 3 rows, by slot \[2, 1, 0, 0\]; "
        r"the gathered counts say 3: \[1, 2, 0, 0\]",
    ):
        run_ranks(tamper_with_counts, 4)


def reverse_rows(rank: int) -> None:
    """Rank 1 sends its rows in another order than it counted; no collective can notice."""

    def reversed_exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return real(rows.flip(0) if rank == 1 else rows, send, receive)

    real = dispatch_module._exchange
    exchange = AllToAll(rank=rank, world_size=4, slots_per_rank=1)
    with patch.object(dispatch_module, "_exchange", reversed_exchange):
        slot_TK = torch.tensor([[0], [1], [2], [2], [3]])
        exchange.begin(torch.zeros(5, HIDDEN), slot_TK, torch.ones(5, 1), check_rows=True)


def test_rows_that_arrive_at_the_wrong_slot() -> None:
    with pytest.raises(
        RankError,
        match=r"ValueError: rank (\d) received 1 wrong rows of \d: row \d comes from rank 1 for "
        r"slot \d, the counts say rank 1 and slot \1",
    ):
        run_ranks(reverse_rows, 4)


def test_splits_that_miss_rows() -> None:
    with pytest.raises(ValueError, match=r"splits \[1, 2\] add up to 3 of 4 rows"):
        dispatch_module._exchange(torch.zeros(4, 1), [1, 2], [1, 2])
