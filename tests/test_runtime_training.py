"""Gradients of 16 real ranks against the dense model's, through every way rows travel."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime.dispatchers.flight import Flight
from epplan.runtime.environment import Setting
from epplan.runtime.measure import run_rank
from epplan.runtime.options import Options
from epplan.runtime.result import Result
from epplan.runtime.schedule import choose
from epplan.runtime.weights import SeededWeights
from tests.fork_ranks import run_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

pytestmark = pytest.mark.slow

RANKS = 16
OPTIONS = Options(
    backend="gloo", sequences=2, sequence_length=6, steps=1, seed=0, verify=True, train=True
)
SETTING = Setting(
    backend="gloo",
    backend_reason="test",
    device=torch.device("cpu"),
    dtype=torch.float32,
    notes=(),
)
SHALLOW = REFERENCE.with_overrides(layers=2)


def run_cases(rank: int, plan: Plan, cases: list[Options]) -> list[Result | None]:
    return [run_rank(plan, options, SETTING, rank) for options in cases]


def case(dispatcher: str, micro_batches: int, **options: Any) -> Options:
    return replace(OPTIONS, dispatcher=dispatcher, micro_batches=micro_batches, **options)


@pytest.mark.parametrize(
    ("spec", "slots_per_rank", "copies"),
    [(SHALLOW, 2, 9), (MIXTRAL, 1, 6), (QWEN, 2, 12), (DEEPSEEK, 3, 12)],
    ids=lambda value: getattr(value, "name", None),
)
def test_gradients_equal_the_dense_models(
    spec: ModelSpec, slots_per_rank: int, copies: int
) -> None:
    """Of the input, the router, attention and every expert; copies' gradients are added up."""
    plan = make_plan(spec, RANKS, slots_per_rank=slots_per_rank, copies=copies)
    cases = [
        case("alltoall", 2),
        case("alltoall", 3, transfer="direct"),
        case("alltoall", 2, transfer="node-dedup"),
        case("padded", 2),
    ]
    for result, options in zip(run_ranks(run_cases, RANKS, plan, cases)[0], cases, strict=True):
        assert result.verified, (options, result.problems)
        assert {"backward", "gradients"} <= set(result.phases)


def test_one_rank_without_transfers() -> None:
    plan = make_plan(MIXTRAL, 1, slots_per_rank=8, num_hosts=1)
    (result,) = run_ranks(run_cases, 1, plan, [OPTIONS])[0]
    assert result.dispatcher == "local"
    assert result.verified, result.problems
    assert any(note.startswith("training steps") for note in result.notes)


def run_all_to_expert_5(rank: int, plan: Plan, cases: list[Options]) -> list[Result | None]:
    def bias(self: SeededWeights, layer: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(5), self.spec.num_experts) * 100.0

    with patch.object(SeededWeights, "router_bias", bias):
        return run_cases(rank, plan, cases)


def test_experts_without_rows_and_rows_that_do_not_fit() -> None:
    plan = make_plan(SHALLOW, RANKS)
    cases = [case("alltoall", 1), case("padded", 2)]
    for result in run_ranks(run_all_to_expert_5, RANKS, plan, cases)[0]:
        assert result.verified, result.problems


def run_with_lost_gradients(rank: int, plan: Plan) -> Result | None:
    """On rank 3 the gradients of dispatched rows come home halved."""

    def halved(self: Flight, gradient: Tensor) -> None:
        real(self, gradient / 2 if rank == 3 and self._name == "dispatch" else gradient)

    real = Flight._start_gradient
    with patch.object(Flight, "_start_gradient", halved):
        return run_rank(plan, OPTIONS, SETTING, rank)


def test_wrong_gradients_are_noticed() -> None:
    result = run_ranks(run_with_lost_gradients, 4, make_plan(MIXTRAL, 4, slots_per_rank=2))[0]
    assert result.verified is False
    assert result.max_abs_error < 1e-5
    assert result.problems[0].startswith("gradient of ")
    assert "differs from the dense model's by" in result.problems[0]
    assert len(result.problems) == 5


def test_what_training_excludes() -> None:
    plan = make_plan(MIXTRAL, 8)
    options = replace(OPTIONS, fp8_dispatch=True, gating_bias=0.001)
    with pytest.raises(InputError) as raised:
        choose(plan, options, SETTING.device)
    assert str(raised.value) == (
        "--train excludes other options\n"
        "  - --fp8-dispatch: rounding to 8 bits has no gradient\n"
        "  - --gating-bias: gradients could not be compared with the dense model's"
    )
