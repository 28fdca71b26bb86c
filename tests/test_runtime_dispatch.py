"""Every dispatcher over real gloo ranks, with experts simple enough to know the answer."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epplan.planner.forwarding import through_islands
from epplan.runtime.clock import PhaseClock, Place
from epplan.runtime.dispatchers.alltoall import AllToAll
from epplan.runtime.dispatchers.channel import Arriving, Channel
from epplan.runtime.dispatchers.dedup import Deduplicated
from epplan.runtime.dispatchers.dispatch import Dispatcher, Routed, gather_counts
from epplan.runtime.dispatchers.local import Local
from epplan.runtime.dispatchers.node_dedup import NodeDeduplicated
from epplan.runtime.dispatchers.order import slot_major
from epplan.runtime.dispatchers.padded import Padded, capacity_for
from epplan.runtime.dispatchers.wire import Float8Wire, PlainWire
from tests.fork_ranks import RankError, run_ranks

RANKS = 16
HIDDEN = 8
NODES = np.array([0, 0, 0, 0, 1, 2, 2, 1, 1, 1, 1, 2, 2, 0, 0, 0])  # of 7, 5 and 4 ranks
PLACE = Place(layer=2, micro_batch=0)
Choice = Callable[[int, int], Tensor]  # rank, slots per rank -> slot_TK


def channel(rank: int, world_size: int = RANKS) -> Channel:
    clock = PhaseClock(torch.device("cpu"))
    return Channel(rank=rank, world_size=world_size, device=torch.device("cpu"), clock=clock)


def alltoall(rank: int, slots_per_rank: int) -> Dispatcher:
    return AllToAll(channel(rank), slots_per_rank, PlainWire())


def float8(rank: int, slots_per_rank: int) -> Dispatcher:
    return AllToAll(channel(rank), slots_per_rank, Float8Wire())


def dedup(rank: int, slots_per_rank: int) -> Dispatcher:
    return Deduplicated(channel(rank), slots_per_rank, PlainWire())


def node_dedup(rank: int, slots_per_rank: int) -> Dispatcher:
    return NodeDeduplicated(channel(rank), slots_per_rank, PlainWire(), NODES)


def node_dedup_float8(rank: int, slots_per_rank: int) -> Dispatcher:
    return NodeDeduplicated(channel(rank), slots_per_rank, Float8Wire(), NODES)


def dedup_float8(rank: int, slots_per_rank: int) -> Dispatcher:
    return Deduplicated(channel(rank), slots_per_rank, Float8Wire())


ROUNDED = [float8, dedup_float8, node_dedup_float8]


def padded(rank: int, slots_per_rank: int) -> Dispatcher:
    return Padded(
        channel(rank),
        slots_per_rank,
        PlainWire(),
        capacity=7,
        dropless=alltoall(rank, slots_per_rank),
    )


def spread(rank: int, slots_per_rank: int) -> Tensor:
    return some_slots(rank, torch.arange(RANKS * slots_per_rank))


def some_slots(rank: int, slots: Tensor) -> Tensor:
    """Return 3 of `slots` for each of 20 tokens."""
    generator = torch.Generator().manual_seed(rank)
    rows = [slots[torch.randperm(len(slots), generator=generator)[:3]] for _ in range(20)]
    return torch.stack(rows)


def all_to_one(rank: int, slots_per_rank: int) -> Tensor:
    return torch.full((20, 1), 5 * slots_per_rank + slots_per_rank - 1)


def none_to_rank_3(rank: int, slots_per_rank: int) -> Tensor:
    slots = torch.arange(RANKS * slots_per_rank)
    return some_slots(rank, slots[slots // slots_per_rank != 3])


def uneven_tokens(rank: int, slots_per_rank: int) -> Tensor:
    """Rank 0 has no tokens at all, rank 15 has 15."""
    return spread(rank, slots_per_rank)[:rank]


CHOICES: list[Choice] = [spread, all_to_one, none_to_rank_3, uneven_tokens]


def through(dispatcher: Dispatcher, routed: Routed) -> tuple[Tensor, int, Tensor]:
    """Let the expert in slot s multiply by s + 1.

    Returns:
        The combined output, the number of rows computed, and the gathered counts.
    """
    slots_per_rank = dispatcher.slots_per_rank
    transfer = dispatcher.begin(routed)
    transfer.send()
    rows = transfer.receive()
    factors = torch.arange(slots_per_rank) + dispatcher.channel.rank * slots_per_rank + 1
    factor_R = factors.repeat_interleave(torch.tensor(rows.rows_of_slot))
    transfer.take_outputs(rows.rows_RH * factor_R[:, None])
    transfer.send_back()
    out_TH = transfer.receive_back()
    counts = gather_counts(dispatcher.channel, [transfer.counts], PLACE)[0]
    return out_TH, len(rows.rows_RH), counts


def scale_by_slot(
    rank: int, make: Callable[[int, int], Dispatcher], slots_per_rank: int
) -> list[tuple[int, int, float]]:
    """Take every choice of slots there and back.

    Returns:
        For each choice the number of rows computed here, those counted for this rank, and the
        largest error relative to the largest value.
    """
    results = []
    dispatcher = make(rank, slots_per_rank)
    for choice in CHOICES:
        slot_TK = choice(rank, slots_per_rank)
        generator = torch.Generator().manual_seed(100 + rank)
        x_TH = torch.randn(len(slot_TK), HIDDEN, generator=generator)
        weights_TK = torch.rand(slot_TK.shape, generator=generator)
        routed = Routed(
            x_TH=x_TH,
            slot_TK=slot_TK,
            weights_TK=weights_TK,
            held=(True,) * slots_per_rank,
            place=PLACE,
            check_rows=True,
        )
        out_TH, num_rows, counts_WWP = through(dispatcher, routed)
        rerun = dispatcher.rerun(counts_WWP[None])
        if rerun is not None:
            out_TH, num_rows, _ = through(rerun, routed)
        expected_TH = x_TH * (weights_TK * (slot_TK + 1)).sum(-1, keepdim=True)
        error = (out_TH - expected_TH).abs().amax() / expected_TH.abs().amax() if rank else 0.0
        results.append((num_rows, int(counts_WWP[:, rank].sum()), float(error)))
    return results


@pytest.mark.parametrize(
    ("make", "slots_per_rank"),
    [
        *((make, slots) for make in (alltoall, dedup, node_dedup, padded) for slots in (1, 3)),
        *((make, 3) for make in ROUNDED),
        *(pytest.param(make, 1, marks=pytest.mark.slow) for make in ROUNDED),
    ],
)
def test_rows_come_back_from_the_right_slots(
    make: Callable[[int, int], Dispatcher], slots_per_rank: int
) -> None:
    by_rank = run_ranks(scale_by_slot, RANKS, make, slots_per_rank)
    tolerance = 0.07 if make in ROUNDED else 1e-6
    for number, choice in enumerate(CHOICES):
        rows, counted, errors = zip(*(ranks[number] for ranks in by_rank), strict=True)
        assert max(errors) < tolerance
        sent = sum(choice(rank, slots_per_rank).numel() for rank in range(RANKS))
        assert sum(counted) == sent
        if make is not padded:
            assert rows == counted
        if choice is all_to_one:
            assert rows[5] >= sent
        if choice is none_to_rank_3:
            assert counted[3] == 0


def rows_sent(rank: int, slots_per_rank: int) -> tuple[list[int], list[int], list[int]]:
    """Return the rows that leave a rank for each, and those it has for each rank and each node."""
    dispatcher = NodeDeduplicated(channel(rank), slots_per_rank, PlainWire(), NODES)
    everyone, inside = range(RANKS), np.flatnonzero(NODES[rank] == NODES).tolist()
    sent = [0] * RANKS

    def counting(own: Channel, ranks: Sequence[int]) -> Callable[..., Arriving]:
        real = own.exchange

        def exchange(rows: Tensor, send: list[int], *others: Any, **where: Any) -> Arriving:
            if where["name"] in ("dispatch", "forward"):
                for to, number in zip(ranks, send, strict=True):
                    sent[to] += number
            return real(rows, send, *others, **where)

        return exchange

    slot_TK = spread(rank, slots_per_rank)
    routed = Routed(
        x_TH=torch.zeros(len(slot_TK), HIDDEN),
        slot_TK=slot_TK,
        weights_TK=torch.ones(slot_TK.shape),
        held=(True,) * slots_per_rank,
        place=PLACE,
    )
    with (
        patch.object(dispatcher.channel, "exchange", counting(dispatcher.channel, everyone)),
        patch.object(dispatcher.inside, "exchange", counting(dispatcher.inside, inside)),
    ):
        through(dispatcher, routed)
    ranks = [set((slots // slots_per_rank).tolist()) for slots in slot_TK]
    nodes = [{int(NODES[each]) for each in token} for token in ranks]
    return (
        sent,
        [sum(each in token for token in ranks) for each in range(RANKS)],
        [sum(node in token for token in nodes) for node in range(3)],
    )


def test_rows_are_forwarded_as_the_planner_prices_them() -> None:
    by_rank = run_ranks(rows_sent, RANKS, 3)
    sent, to_rank, to_node = (np.array(each) for each in zip(*by_rank, strict=True))
    own = np.arange(RANKS)
    to_node[own, NODES] = 0  # inside its own node a rank sends straight
    expected = through_islands(to_rank.astype(float), to_node.astype(float), NODES)
    # What stays on a rank: its own rows of its own node pass by both hops.
    sent[own, own] = expected[own, own] = 0
    assert np.array_equal(sent, expected)


def overflow(rank: int) -> tuple[int | None, int]:
    """Give one slot one row more than it has room for, on rank 2 alone."""
    dispatcher = Padded(
        channel(rank, 4),
        1,
        PlainWire(),
        capacity=3,
        dropless=AllToAll(channel(rank, 4), 1, PlainWire()),
    )
    slot_TK = torch.full((4 if rank == 2 else 3, 1), 1)
    routed = Routed(
        x_TH=torch.ones(len(slot_TK), HIDDEN),
        slot_TK=slot_TK,
        weights_TK=torch.ones(slot_TK.shape),
        held=(True,),
        place=PLACE,
    )
    out_TH, _, counts = through(dispatcher, routed)
    lost = int((out_TH == 0).all(1).sum())
    assert dispatcher.rerun(counts[None]) is not None
    return lost, dispatcher.capacity


def test_overflow_is_noticed_by_all_ranks_and_room_grows() -> None:
    assert run_ranks(overflow, 4) == [(0, 5), (0, 5), (1, 5), (0, 5)]


def test_capacity() -> None:
    assert capacity_for(64, 1, 16, 1.0) == 16  # 4 on average, 6 deviations of 2
    assert capacity_for(64, 1, 16, 2.0) == 20
    assert capacity_for(8, 8, 8, 1.25) == 8  # a token goes to a slot once
    assert capacity_for(0, 2, 8, 1.25) == 1


def local_rows(rank: int, slot: int) -> None:
    routed = Routed(
        x_TH=torch.ones(2, HIDDEN),
        slot_TK=torch.tensor([[0], [slot]]),
        weights_TK=torch.ones(2, 1),
        held=(True,),
        place=PLACE,
    )
    out_TH, _, counts = through(Local(channel(rank, 1), 2), routed)
    assert counts.tolist() == [[[1, 1]]]
    assert out_TH[:, 0].tolist() == [1, 2]


def test_local() -> None:
    run_ranks(local_rows, 1, 1)


def local_with_a_row_for_another_rank(rank: int) -> None:
    routed = Routed(
        x_TH=torch.ones(2, HIDDEN),
        slot_TK=torch.tensor([[2 * rank], [3]]),
        weights_TK=torch.ones(2, 1),
        held=(True,),
        place=PLACE,
    )
    through(Local(channel(rank, 2), 2), routed)


def test_local_refuses_rows_of_others() -> None:
    with pytest.raises(
        RankError,
        match=r"rank 0 has 1 rows in layer 2 for slots of other ranks, the first for slot 3; the "
        r"local dispatcher moves none",
    ):
        run_ranks(local_with_a_row_for_another_rank, 2)


def route_rows(rank: int, slots: list[int]) -> Routed:
    return Routed(
        x_TH=torch.zeros(len(slots), HIDDEN),
        slot_TK=torch.tensor(slots)[:, None],
        weights_TK=torch.ones(len(slots), 1),
        held=(True,),
        place=PLACE,
        check_rows=True,
    )


def tamper_with_counts(rank: int) -> None:
    """On rank 2 the all-gather returns two of its own counts exchanged."""

    def wrong_gather(gathered: Tensor, counts: Tensor, *, group: None, async_op: bool) -> object:
        real_gather(gathered, counts)
        gathered[[2 * 4, 2 * 4 + 1]] = gathered[[2 * 4 + 1, 2 * 4]]
        return real_gather(gathered.clone(), counts, async_op=async_op)

    own = channel(rank, 4)
    real_gather = own._all_gather
    with patch.object(own, "_all_gather", wrong_gather):
        through(AllToAll(own, 1, PlainWire()), route_rows(rank, [0, 0, 1]))


def test_counts_that_are_not_what_was_counted() -> None:
    with pytest.raises(
        RankError,
        match=r"(?s)rank 2: .*ValueError: rank 2 counted 3 rows in layer 2, by slot "
        r"\[2, 1, 0, 0\]; the gathered counts say 3: \[1, 2, 0, 0\]",
    ):
        run_ranks(tamper_with_counts, 4)


def reverse_rows(rank: int, kind: type[AllToAll] | type[Deduplicated]) -> None:
    """Rank 1 sends its rows in another order than it counted; no collective can notice."""

    def reversed_exchange(rows: Tensor, *splits: list[int], **where: object) -> Arriving:
        return real(rows.flip(0) if rank == 1 else rows, *splits, **where)

    own = channel(rank, 4)
    real: Callable[..., Arriving] = own.exchange
    with patch.object(own, "exchange", reversed_exchange):
        through(kind(own, 1, PlainWire()), route_rows(rank, [0, 1, 2, 2, 3]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            AllToAll,
            r"ValueError: rank (\d) received 1 wrong rows of \d in layer 2: row \d comes from rank "
            r"1 for slot \d, the counts say rank 1 and slot \1",
        ),
        (
            Deduplicated,
            r"ValueError: rank (\d) received \d wrong choices of \d in layer 2: choice \d is of "
            r"row \d of its source for slot \d, its row and the counts say row \d and slot \1",
        ),
    ],
)
def test_rows_that_arrive_at_the_wrong_slot(
    kind: type[AllToAll] | type[Deduplicated], message: str
) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(reverse_rows, 4, kind)


def test_splits_that_miss_rows() -> None:
    with pytest.raises(ValueError, match=r"splits \[1, 2\] add up to 3 of 4 rows"):
        channel(0, 2).exchange(torch.zeros(4, 1), [1, 2], [1, 2], name="test", place=PLACE)


@given(
    st.integers(1, 5).flatmap(
        lambda slots: st.lists(
            st.lists(st.integers(0, 4), min_size=slots, max_size=slots), min_size=1, max_size=6
        )
    )
)
def test_received_rows_in_the_order_of_slots(arriving: list[list[int]]) -> None:
    arriving_WP = torch.tensor(arriving)
    slot_R = (
        torch.arange(arriving_WP.shape[1])
        .repeat(len(arriving))
        .repeat_interleave(arriving_WP.flatten())
    )
    order_R = slot_major(arriving_WP, torch.device("cpu"))
    if order_R is None:
        order_R = torch.arange(len(slot_R))
    assert torch.equal(order_R, slot_R.argsort(stable=True))
