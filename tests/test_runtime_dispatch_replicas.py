"""Which copy a token goes to: the planned shares, from every rank, for any number of tokens."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.dispatchers.replicas import ReplicaChoice, Replicas, all_local, replicas_of_rank
from tests.plans import bare_plan
from tests.runtime_cases import MIXTRAL

SPEC = MIXTRAL.with_overrides(experts=4, layers=1)
# Ranks 0 and 1 on host a, 2 and 3 on host b; two slots each.
SLOTS = [0, 1, 0, 2, 3, 0, 1, 2]
SHARES = [0.5, 0.3, 0.2, 1.0, 1.0, 0.3, 0.7, 0.0]


def plan_with(slots: list[int | None], shares: list[float] | None) -> Plan:
    gpus = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    return bare_plan(SPEC, gpus, [slots], None if shares is None else [shares])


def replicas(rank: int, choice: ReplicaChoice = "share") -> Replicas:
    plan = plan_with([*SLOTS], SHARES)
    return replicas_of_rank(plan, 0, rank, choice, torch.device("cpu"))


def counts(slots: Tensor) -> list[int]:
    return torch.bincount(slots.flatten(), minlength=len(SLOTS)).tolist()


@given(
    st.integers(0, 3),
    st.lists(st.lists(st.integers(0, 3), max_size=60), min_size=1, max_size=6),
)
def test_every_rank_keeps_the_shares_at_any_time(rank: int, calls: list[list[int]]) -> None:
    """However the tokens of an expert come, over calls and between others, no slot is far off."""
    table = replicas(rank)
    chosen = [table.choose(torch.tensor(experts, dtype=torch.int64)[:, None]) for experts in calls]
    for number in range(len(calls)):
        experts = torch.tensor([*chain(*calls[: number + 1])], dtype=torch.int64)
        slots = torch.cat(chosen[: number + 1]).flatten()
        assert [SLOTS[slot] for slot in slots.tolist()] == experts.tolist()
        of_expert = torch.bincount(experts, minlength=4).tolist()
        for slot, took in enumerate(counts(slots)):
            assert abs(took - SHARES[slot] * of_expert[SLOTS[slot]]) < 2.5


def test_many_tokens() -> None:
    slots = replicas(2).choose(torch.zeros(100_000, 1, dtype=torch.int64))
    for slot, took in enumerate(counts(slots)):
        assert took == pytest.approx(SHARES[slot] * 100_000 if SLOTS[slot] == 0 else 0, abs=4)


def test_one_token_a_step_uses_all_copies_and_ranks_start_apart() -> None:
    tables = [replicas(rank) for rank in range(4)]
    steps = [
        [int(table.choose(torch.zeros(1, 1, dtype=torch.int64))) for table in tables]
        for _ in range(20)
    ]
    assert len(set(steps[0])) > 1
    for of_rank in zip(*steps, strict=True):
        assert set(of_rank) == {0, 2, 5}


def test_choice_is_the_same_for_the_same_tokens() -> None:
    experts_TK = torch.tensor([[0, 1], [1, 0], [0, 3]])
    assert torch.equal(replicas(1).choose(experts_TK), replicas(1).choose(experts_TK))


def test_a_copy_without_share_gets_nothing() -> None:
    assert counts(replicas(0).choose(torch.full((500, 1), 2))) == [0, 0, 0, 500, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [0, 1, 3, 4]),  # expert 0 has a copy here; 2 on the other GPU of the host; 3 elsewhere
        (1, [2, 1, 3, 4]),
        (2, [5, 6, 7, 4]),
        (3, [5, 6, 7, 4]),
    ],
)
def test_nearest(rank: int, expected: list[int]) -> None:
    slots = replicas(rank, "nearest").choose(torch.arange(4)[:, None])
    assert slots.flatten().tolist() == expected


def test_nearest_keeps_shares_among_equally_near_copies() -> None:
    """From host a, both copies of expert 1 are on host b."""
    plan = plan_with([0, 2, 0, 3, 1, None, 1, None], [0.5, 1, 0.5, 1, 0.25, 0, 0.75, 0])
    table = replicas_of_rank(plan, 0, 0, "nearest", torch.device("cpu"))
    assert counts(table.choose(torch.full((400, 1), 1))) == pytest.approx(
        [0, 0, 0, 0, 100, 0, 300, 0], abs=2
    )


def test_all_local() -> None:
    gpus = [("a", 0), ("b", 0)]
    plan = bare_plan(SPEC, gpus, [[0, 1, 2, 3, 3, 2, 1, 0]], [[0.5] * 8])
    assert all_local(plan, "nearest")
    assert not all_local(plan, "share")
    assert not all_local(plan_with([*SLOTS], SHARES), "nearest")
    assert all_local(bare_plan(SPEC, gpus[:1], [[2, 1, 0, 3]]), "share")
