"""Balancing that changes outputs: the rules, against loops that follow their words."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.model import RouterSpec
from epplan.runtime.balancing.balance import (
    OutputChanges,
    capacity,
    limited,
    rows_within,
    updated_bias,
)
from epplan.runtime.layer.router import route


def test_bias_rises_below_the_mean_and_falls_above() -> None:
    bias_E = torch.tensor([0.0, 1.0, -1.0, 0.5])
    rows_E = torch.tensor([7, 3, 5, 5])  # mean 5
    assert updated_bias(bias_E, rows_E, 0.25).tolist() == [-0.25, 1.25, -1.0, 0.5]


def test_bias_compares_without_rounding() -> None:
    """Counts that float32 could not tell from their mean."""
    large = 2**40
    rows_E = torch.tensor([large, large + 1, large - 1])
    assert updated_bias(torch.zeros(3), rows_E, 1.0).tolist() == [0.0, -1.0, 1.0]


def test_bias_evens_out_a_skewed_router() -> None:
    torch.manual_seed(0)
    spec = RouterSpec(score="sigmoid", renormalize=True)
    logits_TE = torch.randn(4096, 16) + torch.linspace(-1, 1, 16)
    bias_E = torch.zeros(16)

    def rows(bias_E: torch.Tensor) -> torch.Tensor:
        return torch.bincount(route(logits_TE, spec, 2, bias_E)[1].flatten(), minlength=16)

    def imbalance(rows_E: torch.Tensor) -> float:
        return float(rows_E.max() / rows_E.double().mean())

    before = imbalance(rows(bias_E))
    for _ in range(300):
        bias_E = updated_bias(bias_E, rows(bias_E), 1e-3)
    assert before > 2
    assert imbalance(rows(bias_E)) < 1.1


@pytest.mark.parametrize(
    ("tokens", "factor", "rows"), [(10, 1.0, 3), (10, 1.25, 4), (8, 1.0, 2), (0, 1.0, 0)]
)
def test_capacity_is_the_even_share_rounded_up(tokens: int, factor: float, rows: int) -> None:
    assert capacity(tokens, 2, 8, factor) == rows == math.ceil(tokens * 2 / 8 * factor)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    choice = [draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    some = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # ties are frequent
    weights = [[draw(some) for _ in range(top_k)] for _ in range(tokens)]
    shape = (tokens, top_k)
    return (
        torch.tensor(choice, dtype=torch.int64).view(shape),
        torch.tensor(weights, dtype=torch.float32).view(shape),
        experts,
        draw(st.integers(0, 6)),
    )


@settings(max_examples=200, deadline=None)
@given(routings())
def test_an_expert_keeps_its_heaviest_rows(
    case: tuple[torch.Tensor, torch.Tensor, int, int],
) -> None:
    experts_TK, weights_TK, num_experts, limit = case
    rows: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for row, (expert, weight) in enumerate(
        zip(experts_TK.flatten().tolist(), weights_TK.flatten().tolist(), strict=True)
    ):
        rows[expert].append((-weight, row))
    expected = sorted(row for own in rows.values() for _, row in sorted(own)[:limit])
    assert rows_within(experts_TK, weights_TK, num_experts, limit).tolist() == expected


def test_dropped_rows_add_nothing() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 2]])
    weights_TK = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    x_TH = torch.tensor([[1.0], [2], [3]])
    sent = limited(x_TH, experts_TK, weights_TK, 3, 0.5)  # 3 x 2 / 3 x 0.5: one row an expert
    assert sent.x_MH.tolist() == [[1.0], [2], [3]]
    assert sent.experts_MK.tolist() == [[0], [1], [2]]
    assert sent.weights_MK.flatten().tolist() == pytest.approx([0.9, 0.2, 0.6])
    assert sent.home(torch.tensor([[1.0, 1], [2, 2], [3, 3]])).tolist() == [[1, 1], [2, 2], [3, 3]]
    two = limited(x_TH, experts_TK, weights_TK, 3, 1.0)
    assert two.home(torch.ones(5, 1)).flatten().tolist() == [2, 2, 1]
    everything = limited(x_TH, experts_TK, weights_TK, 3, None)
    assert everything.x_MH is x_TH
    assert everything.home(x_TH) is x_TH


def test_what_changes_outputs_is_said() -> None:
    assert OutputChanges().notes() == ()
    assert OutputChanges(bias_rate=0.001, capacity_factor=1.25).notes() == (
        "gating bias, 0.001 a step: tokens may go to other experts than the model's router chooses",
        "capacity 1.25: rows of a rank beyond this many times an expert's even share are dropped",
    )
