"""16 real gloo ranks against the dense model, for every kind of model, and against mistakes."""

import re
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime import experts, measure, model
from epplan.runtime.environment import Setting
from epplan.runtime.layers import Layer, MoeWeights, build_layers
from epplan.runtime.measure import Options, run_rank
from epplan.runtime.result import Result
from epplan.runtime.router import route
from epplan.runtime.weights import SeededWeights
from tests.fork_ranks import run_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

RANKS = 16
OPTIONS = Options(backend="gloo", sequences=2, sequence_length=12, steps=1, seed=0, verify=True)
SETTING = Setting(
    backend="gloo",
    backend_reason="test",
    device=torch.device("cpu"),
    dtype=torch.float32,
    notes=(),
)


def run(rank: int, plan: Plan) -> Result | None:
    return run_rank(plan, OPTIONS, SETTING, rank)


def run_plan(plan: Plan, function: Callable[[int, Plan], Result | None] = run) -> Result:
    result: Result = run_ranks(function, plan.world_size, plan)[0]
    return result


@pytest.mark.parametrize(
    ("spec", "slots_per_rank"),
    [
        (REFERENCE, 1),
        (MIXTRAL, 1),  # 8 experts on 16 ranks: half of the slots are empty
        (QWEN, 1),
        (DEEPSEEK, 3),  # 32 experts in 48 slots, other ones in each layer
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_ranks_equal_the_dense_model(spec: ModelSpec, slots_per_rank: int) -> None:
    result = run_plan(make_plan(spec, RANKS, slots_per_rank=slots_per_rank))
    assert result.verified, result.problems
    assert result.max_abs_error is not None
    assert result.max_abs_error < 1e-5
    rows = result.tokens_per_step * spec.top_k
    for by_expert, by_rank in zip(result.expert_load, result.rank_load, strict=True):
        assert sum(by_expert) == sum(by_rank) == rows


def run_biased_to_expert_5(rank: int, plan: Plan) -> Result | None:
    def bias(self: SeededWeights, layer: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(5), self.spec.num_experts) * 100.0

    with patch.object(SeededWeights, "router_bias", bias):
        return run(rank, plan)


def test_all_tokens_to_one_expert() -> None:
    plan = make_plan(REFERENCE, RANKS)
    result = run_plan(plan, run_biased_to_expert_5)
    assert result.verified, result.problems
    for ordinal, balance in enumerate(result.balance):
        only = plan.slots_of_expert(ordinal)[5][0] // plan.slots_per_rank
        assert result.rank_load[ordinal][only] == result.tokens_per_step
        assert balance.max_over_mean == RANKS
        assert balance.jain == pytest.approx(1 / RANKS)
        assert len(balance.idle_experts) == 15


def run_with_experts_of_another_plan(rank: int, plan: Plan) -> Result | None:
    """Route by `plan`, but hold the experts of a plan with two of them exchanged."""

    def swapped_layers(plan: Plan, rank: int, weights: SeededWeights) -> list[Layer]:
        slots = [list(layer) for layer in plan.expert_of_slot]
        slots[-1][3], slots[-1][4] = slots[-1][4], slots[-1][3]
        other = plan.model_copy(update={"expert_of_slot": tuple(map(tuple, slots))})
        layers, held = build_layers(plan, rank, weights), build_layers(other, rank, weights)
        last, last_held = layers[-1].feed_forward, held[-1].feed_forward
        assert isinstance(last, MoeWeights)
        assert isinstance(last_held, MoeWeights)
        feed_forward = replace(last, experts=last_held.experts)
        return [*layers[:-1], replace(layers[-1], feed_forward=feed_forward)]

    with patch.object(measure, "build_layers", swapped_layers):
        return run(rank, plan)


def test_exchanged_experts_are_noticed() -> None:
    plan = make_plan(REFERENCE, RANKS)
    result = run_plan(plan, run_with_experts_of_another_plan)
    assert result.verified is False
    assert result.max_abs_error is not None
    assert result.tolerance is not None
    assert result.max_abs_error > 10 * result.tolerance
    planned = plan.expert_of_slot[-1]
    assert result.problems[:2] == (
        f"layer 3: slot 0 of rank 3 holds expert {planned[4]}, the plan says expert {planned[3]}",
        f"layer 3: slot 0 of rank 4 holds expert {planned[3]}, the plan says expert {planned[4]}",
    )
    assert re.fullmatch(r"largest difference [\d.]+, tolerance [\d.e-]+", result.problems[2])


def run_with_misrouted_token(rank: int, plan: Plan) -> Result | None:
    """On rank 2, send token 7 of the last layer to its second-best expert."""
    calls = 0

    def misroute(
        logits_TE: Tensor, spec: object, top_k: int, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        weights_TK, experts_TK = route(logits_TE, plan.model.router, top_k, bias_E)
        if rank == 2 and calls % plan.model.num_moe_layers == 0:
            experts_TK[7] = logits_TE[7].topk(2).indices[1]
        return weights_TK, experts_TK

    with patch.object(model, "route", misroute):
        return run(rank, plan)


def test_a_misrouted_token_is_named() -> None:
    result = run_plan(make_plan(REFERENCE, RANKS), run_with_misrouted_token)
    assert result.verified is False
    assert result.routing_ties == 0
    assert len(result.problems) == 2  # the difference, and its cause
    assert re.fullmatch(
        r"layer 3: token 7 of rank 2 went to experts \[\d+\], the dense model chooses \[\d+\]; "
        r"scores differ by [\d.]+%, which is no rounding",
        result.problems[1],
    )


def run_with_infinite_output(rank: int, plan: Plan) -> Result | None:
    def overflow(rows_RH: Tensor, weights: object) -> Tensor:
        return torch.full_like(rows_RH, float("inf"))

    with patch.object(experts, "mlp", overflow):
        return run(rank, plan)


def test_values_that_are_not_finite_are_no_success() -> None:
    one_layer = REFERENCE.with_overrides(layers=1)
    result = run_plan(make_plan(one_layer, RANKS), run_with_infinite_output)
    assert result.verified is False
    assert result.max_abs_error is None
    assert result.problems == ("outputs hold values that are not finite in torch.float32",)
