"""The one routing rule against each family's own, written out token by token."""

import math
from collections.abc import Callable

import pytest
import torch

from epplan.planner.model import RouterSpec
from epplan.runtime.layer.router import route, router_logits

Oracle = Callable[[list[float], list[float]], dict[int, float]]


def _softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def _best(values: dict[int, float], count: int) -> list[int]:
    return sorted(values, key=lambda key: -values[key])[:count]


def switch(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Top-1 of the softmax, weight not renormalised (the reference model)."""
    scores = _softmax(logits)
    return {expert: scores[expert] for expert in _best(dict(enumerate(scores)), 1)}


def mixtral(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Top-2, then softmax over these two."""
    chosen = _best(dict(enumerate(logits)), 2)
    return dict(zip(chosen, _softmax([logits[expert] for expert in chosen]), strict=True))


def gpt_oss(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Top-4 of the logits, then softmax over these four."""
    chosen = _best(dict(enumerate(logits)), 4)
    return dict(zip(chosen, _softmax([logits[expert] for expert in chosen]), strict=True))


def qwen2(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Top-4 of the softmax over all, as they are."""
    scores = _softmax(logits)
    return {expert: scores[expert] for expert in _best(dict(enumerate(scores)), 4)}


def deepseek_v2(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Top-3 within the 2 of 4 groups whose best expert is best; scaled, not renormalised."""
    scores = _softmax(logits)
    groups = _best({group: max(scores[group * 4 : group * 4 + 4]) for group in range(4)}, 2)
    allowed = {expert: scores[expert] for expert in range(16) if expert // 4 in groups}
    return {expert: 16.0 * scores[expert] for expert in _best(allowed, 3)}


def deepseek_v3(logits: list[float], bias: list[float]) -> dict[int, float]:
    """Sigmoid; bias for groups (sum of their two best) and experts; renormalised and scaled."""
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [score + correction for score, correction in zip(scores, bias, strict=True)]
    of_group = {group: sorted(biased[group * 4 : group * 4 + 4])[-2:] for group in range(4)}
    groups = _best({group: sum(two) for group, two in of_group.items()}, 2)
    allowed = {expert: biased[expert] for expert in range(16) if expert // 4 in groups}
    chosen = _best(allowed, 3)
    total = sum(scores[expert] for expert in chosen)
    return {expert: 2.5 * scores[expert] / total for expert in chosen}


@pytest.mark.parametrize(
    ("oracle", "spec", "top_k"),
    [
        (switch, RouterSpec(renormalize=False), 1),
        (mixtral, RouterSpec(), 2),
        (gpt_oss, RouterSpec(), 4),
        (qwen2, RouterSpec(renormalize=False), 4),
        (
            deepseek_v2,
            RouterSpec(renormalize=False, scale=16.0, groups=4, topk_groups=2, group_rule="max"),
            3,
        ),
        (
            deepseek_v3,
            RouterSpec(score="sigmoid", scale=2.5, groups=4, topk_groups=2, correction_bias=True),
            3,
        ),
    ],
)
def test_family(oracle: Oracle, spec: RouterSpec, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 16, generator=generator)
    bias = 0.1 * torch.randn(16, generator=generator) if spec.correction_bias else None
    weights, experts = route(logits, spec, top_k, bias)
    correction = [0.0] * 16 if bias is None else bias.tolist()
    for token in range(500):
        actual = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        expected = oracle(logits[token].tolist(), correction)
        assert actual == pytest.approx(expected, rel=1e-5)


def test_logits_of_half_precision_tokens_are_float32_with_their_bias() -> None:
    tokens = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    router = torch.tensor([[1.0, 1e-4], [3.0, 0.0]])
    logits = router_logits(tokens, router, torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(logits, torch.tensor([[1.5002, 2.0]]))
    assert torch.equal(router_logits(tokens, router, None), logits - torch.tensor([0.5, -1.0]))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.tensor([[10.0, 9.99, -5.0]], dtype=torch.bfloat16)
    weights, _ = route(logits, RouterSpec(renormalize=False), 1)
    assert weights.dtype == torch.float32
    assert weights.item() == float(logits.float().softmax(-1).max())


def test_sigmoid_scores_that_all_underflow_give_finite_weights() -> None:
    spec = RouterSpec(score="sigmoid")
    weights, _ = route(torch.full((1, 4), -200.0), spec, 2)
    assert weights.isfinite().all()
