"""Checkpoints written by transformers give the same logits here, on 1 and on 16 ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epplan.planner.model import load_model
from epplan.planner.plan import Plan
from epplan.runtime.build import build_model
from epplan.runtime.checkpoints.checkpoint import checkpoint_problems, open_checkpoint
from epplan.runtime.dispatchers.padded import Padded
from epplan.runtime.layer.head import build_head
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.options import Options
from epplan.runtime.schedule import choose
from tests.checkpoints import CASES, make_model, make_tokens, write_checkpoint
from tests.fork_ranks import run_ranks
from tests.runtime_cases import make_plan

CPU = torch.device("cpu")
SEQUENCES, LENGTH, PREFILL = 16, 13, 9
MICRO_BATCHES = 2  # with one sequence a rank, one of them is empty


def logits_of_rank(
    rank: int,
    plan: Plan,
    folder: Path,
    tokens: Tensor,
    dispatcher: str = "auto",
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return the logits of this rank's sequences: all at once, and token by token.

    A padded dispatcher has room for one row only, so that steps are run again.
    """
    weights = open_checkpoint(folder, plan.model, device=device, dtype=torch.float32)
    assert not checkpoint_problems(weights)
    own = tokens.to(device).chunk(plan.world_size)[rank]
    options = Options(
        backend="gloo" if device == CPU else "nccl",
        sequences=own.shape[0],
        sequence_length=LENGTH,
        steps=1,
        seed=0,
        verify=False,
        micro_batches=MICRO_BATCHES,
        dispatcher=dispatcher,
    )
    model = build_model(plan, options, choose(plan, options, device), weights, rank)
    head = build_head(weights)
    reran = []

    def run(x: Tensor, caches: list[KvCache] | None) -> Tensor:
        if isinstance(model.dispatcher, Padded):
            model.dispatcher.capacity = 1
        step = model.forward(head.embed(x), caches=caches)
        reran.append(step.reran)
        return head.logits(step.hidden_BSH)

    caches = model.new_caches()
    steps = [own[:, :PREFILL], *torch.split(own[:, PREFILL:], 1, dim=1)]
    logits = run(own, None), torch.cat([run(step, caches) for step in steps], dim=1)
    assert any(reran) == (dispatcher == "padded")
    return logits


def assert_same_logits(
    plan: Plan, folder: Path, tokens: Tensor, expected: Tensor, dispatcher: str = "auto"
) -> None:
    results: list[tuple[Tensor, Tensor]] = run_ranks(
        logits_of_rank, plan.world_size, plan, folder, tokens, dispatcher
    )
    largest = float(expected.abs().max())
    for at_once_or_stepwise in zip(*results, strict=True):
        error = (torch.cat(at_once_or_stepwise) - expected).abs().max()
        assert float(error) < 1e-5 * largest


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens).logits
    return logits.clone()


# Each family once; slow ones are variants that another of their family holds, or no named family.
SLOW = {"mixtral", "qwen2_moe", "deepseek_v2, greedy, full-rank queries"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    reference, tokens = make_model(case), make_tokens(SEQUENCES, LENGTH)
    folder = write_checkpoint(reference, tmp_path)
    expected = reference_logits(reference, tokens)
    spec = load_model(str(folder))
    assert_same_logits(make_plan(spec, 16), folder, tokens, expected)
    alone = make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1)
    assert_same_logits(alone, folder, tokens, expected)


def test_a_step_that_is_run_again_adds_to_the_cache_once(tmp_path: Path) -> None:
    reference, tokens = make_model("qwen3_moe"), make_tokens(8, LENGTH)
    folder = write_checkpoint(reference, tmp_path)
    plan = make_plan(load_model(str(folder)), 4, slots_per_rank=4)
    expected = reference_logits(reference, tokens)
    assert_same_logits(plan, folder, tokens, expected, "padded")
