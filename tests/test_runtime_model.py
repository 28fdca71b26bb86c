"""16 real gloo ranks against the dense model, for every kind of model, and against mistakes."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime import build
from epplan.runtime.build import build_model
from epplan.runtime.checks.dense import run_dense
from epplan.runtime.dispatchers.replicas import ReplicaChoice
from epplan.runtime.environment import Setting
from epplan.runtime.layer import experts, router
from epplan.runtime.layer.layers import Layer, MoeWeights, build_layers
from epplan.runtime.layer.router import route
from epplan.runtime.measure import run_rank
from epplan.runtime.options import Options
from epplan.runtime.result import Result
from epplan.runtime.schedule import choose
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.fork_ranks import RankError, run_ranks
from tests.plans import bare_plan
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


def run(rank: int, plan: Plan, options: Options = OPTIONS) -> Result | None:
    return run_rank(plan, options, SETTING, rank)


def run_plan(plan: Plan, function: Callable[[int, Plan], Result | None] = run) -> Result:
    result: Result = run_ranks(function, plan.world_size, plan)[0]
    return result


def run_cases(rank: int, plan: Plan, cases: list[Options]) -> list[Result | None]:
    return [run(rank, plan, options) for options in cases]


def case(dispatcher: str, micro_batches: int, **options: Any) -> Options:
    """Two sequences a rank: of 3 micro-batches one is empty."""
    return replace(OPTIONS, dispatcher=dispatcher, micro_batches=micro_batches, **options)


ONE_COPY = [
    case("alltoall", 1),
    case("alltoall", 3),
    case("alltoall", 2, transfer="direct"),
    case("alltoall", 3, transfer="node-dedup"),
    case("padded", 3),
]
COPIES = [
    case("alltoall", 2),
    case("alltoall", 1, transfer="direct"),
    case("padded", 1),
    case("alltoall", 3, transfer="direct", replicas="nearest"),
    case("alltoall", 2, transfer="node-dedup"),
    case("padded", 2, replicas="nearest"),
]
SHALLOW = REFERENCE.with_overrides(layers=2)


@pytest.mark.parametrize(
    ("spec", "slots_per_rank", "copies"),
    [
        (SHALLOW, 1, 0),
        pytest.param(SHALLOW, 2, 9, marks=pytest.mark.slow),
        (MIXTRAL, 1, 0),  # 8 experts on 16 ranks: half of the slots are empty
        pytest.param(MIXTRAL, 1, 6, marks=pytest.mark.slow),
        pytest.param(QWEN, 1, 0, marks=pytest.mark.slow),
        pytest.param(QWEN, 3, 32, marks=pytest.mark.slow),
        pytest.param(DEEPSEEK, 3, 0, marks=pytest.mark.slow),  # 32 experts in 48 slots
        (DEEPSEEK, 3, 12),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_ranks_equal_the_dense_model(spec: ModelSpec, slots_per_rank: int, copies: int) -> None:
    plan = make_plan(spec, RANKS, slots_per_rank=slots_per_rank, copies=copies)
    cases = COPIES if copies else ONE_COPY
    results = run_ranks(run_cases, RANKS, plan, cases)[0]
    for result, options in zip(results, cases, strict=True):
        assert result.verified, (options, result.problems)
        assert result.max_abs_error < 1e-5
        assert result.micro_batches == options.micro_batches
        rows = result.tokens_per_step * spec.top_k
        for by_expert, by_rank in zip(result.expert_load, result.rank_load, strict=True):
            assert sum(by_expert) == sum(by_rank) == rows


def test_deep_model() -> None:
    result = run_plan(make_plan(REFERENCE, RANKS))
    assert result.verified, result.problems
    assert result.dispatcher == "alltoall"
    assert result.micro_batches == 1


def run_uneven(rank: int, plan: Plan, cases: list[Options]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run a sequence of 2 tokens on every third rank, two on every third, none on the others."""
    weights = SeededWeights(spec=plan.model, seed=0, device=SETTING.device, dtype=torch.float32)
    shape = (rank % 3, 2, plan.model.hidden_size)
    x_BSH = seeded_hidden(0, rank, shape, device=SETTING.device, dtype=torch.float32)
    outputs = []
    for options in cases:
        choice = choose(plan, options, SETTING.device)
        step = build_model(plan, options, choice, weights, rank).forward(x_BSH, check_rows=True)
        outputs.append((x_BSH, step.hidden_BSH, step.experts_LTK))
    return outputs


@pytest.mark.parametrize(
    "spec",
    [pytest.param(SHALLOW, marks=pytest.mark.slow), DEEPSEEK],
    ids=lambda spec: spec.name,
)
def test_ranks_without_tokens_and_more_micro_batches_than_tokens(spec: ModelSpec) -> None:
    plan = make_plan(spec, RANKS, slots_per_rank=3, copies=5, num_hosts=4, hosts_an_island=2)
    cases = [
        case("alltoall", 5),
        case("alltoall", 5, transfer="direct"),
        case("alltoall", 5, transfer="node-dedup"),
        case("padded", 5),
    ]
    weights = SeededWeights(spec=spec, seed=0, device=SETTING.device, dtype=torch.float32)
    for runs in zip(*run_ranks(run_uneven, RANKS, plan, cases), strict=True):
        x_BSH, hidden_BSH = (torch.cat([run[number] for run in runs]) for number in (0, 1))
        experts_LTK = torch.cat([run[2] for run in runs], dim=1)
        dense = run_dense(spec, weights, x_BSH, experts_LTK, torch.float32)
        assert not dense.disagreements
        assert torch.allclose(hidden_BSH, dense.hidden_BSH, rtol=0, atol=1e-4)


def test_every_expert_on_every_rank() -> None:
    experts = range(MIXTRAL.num_experts)
    slots = [[*experts] * 4] * MIXTRAL.num_moe_layers
    shares = [[0.25] * 4 * len(experts)] * MIXTRAL.num_moe_layers
    plan = bare_plan(MIXTRAL, [("node0", gpu) for gpu in range(4)], slots, shares)
    cases = [replace(OPTIONS, replicas="nearest"), replace(OPTIONS, replicas="share")]
    nearest, by_share = run_ranks(run_cases, 4, plan, cases)[0]
    assert nearest.verified
    assert nearest.dispatcher == "local"
    assert nearest.dispatcher_reason == "every expert is on every rank: no rows travel"
    assert nearest.rank_load == [[24 * MIXTRAL.top_k] * 4] * 2
    assert by_share.verified
    assert by_share.dispatcher == "alltoall"


def run_biased_to_expert_5(rank: int, plan: Plan, cases: list[Options]) -> list[Result | None]:
    def bias(self: SeededWeights, layer: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(5), self.spec.num_experts) * 100.0

    with patch.object(SeededWeights, "router_bias", bias):
        return run_cases(rank, plan, cases)


def test_all_tokens_to_one_expert() -> None:
    plan = make_plan(SHALLOW, RANKS)
    cases = [case("alltoall", 2), case("alltoall", 1, transfer="direct"), case("padded", 2)]
    results = run_ranks(run_biased_to_expert_5, RANKS, plan, cases)[0]
    for result in results:
        _assert_all_to_expert_5(plan, result)
    assert not any("run again" in note for result in results[:2] for note in result.notes)
    assert any(
        note.startswith("1 of 2 steps (with the warm-up) had more rows")
        for note in results[2].notes
    )


def _assert_all_to_expert_5(plan: Plan, result: Result) -> None:
    assert result.verified, result.problems
    for ordinal, balance in enumerate(result.balance):
        only = plan.slots_of_expert(ordinal)[5][0] // plan.slots_per_rank
        assert result.rank_load[ordinal][only] == result.tokens_per_step
        assert balance.max_over_mean == RANKS
        assert balance.jain == pytest.approx(1 / RANKS)
        assert len(balance.idle_experts) == 15


def run_with_experts_of_another_plan(rank: int, plan: Plan) -> Result | None:
    """Route by `plan`, but hold the experts of a plan with two of them exchanged."""

    def swapped_layers(
        plan: Plan, rank: int, weights: SeededWeights, replicas: ReplicaChoice, *, joined: bool
    ) -> list[Layer]:
        slots = [list(layer) for layer in plan.expert_of_slot]
        slots[-1][3], slots[-1][4] = slots[-1][4], slots[-1][3]
        other = plan.model_copy(update={"expert_of_slot": tuple(map(tuple, slots))})
        layers, held = build_layers(plan, rank, weights), build_layers(other, rank, weights)
        last, last_held = layers[-1].feed_forward, held[-1].feed_forward
        assert isinstance(last, MoeWeights)
        assert isinstance(last_held, MoeWeights)
        feed_forward = replace(last, experts=last_held.experts)
        return [*layers[:-1], replace(layers[-1], feed_forward=feed_forward)]

    with patch.object(build, "build_layers", swapped_layers):
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

    with patch.object(router, "route", misroute):
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
    with pytest.raises(
        RankError, match=r"rank \d+: outputs of expert \d+ of layer 0 are not finite"
    ):
        run_plan(make_plan(one_layer, RANKS), run_with_infinite_output)
