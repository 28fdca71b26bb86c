"""All experts of a rank, as a loop and as one grouped product, against one expert at a time."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from epplan.runtime.layer import experts
from epplan.runtime.layer.experts import MlpWeights, mlp, run_experts, stack_experts

H, F = 16, 24
BF16 = torch.bfloat16


def make_expert(seed: int, *, gated: bool, dtype: torch.dtype) -> MlpWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).to(dtype)

    return MlpWeights(
        gate_FH=random(F, H) if gated else None, up_FH=random(F, H), down_HF=random(H, F)
    )


def one_by_one(rows: Tensor, counts: list[int], slots: list[MlpWeights | None]) -> Tensor:
    parts = [
        part if expert is None else mlp(part, expert)
        for part, expert in zip(torch.split(rows, counts), slots, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 0, 5, 1], [0, 0, 0, 0, 9], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("grad", [False, True])
def test_loop_runs_every_slot(gated: bool, counts: list[int], grad: bool) -> None:
    slots = [make_expert(seed, gated=gated, dtype=torch.float32) for seed in range(5)]
    with_empty = [slots[0], slots[1], None, *slots[3:]]
    rows = torch.randn(sum(counts), H, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        actual = run_experts(rows, counts, with_empty)
        torch.testing.assert_close(actual, one_by_one(rows, counts, with_empty))
        if not grad:
            by_matrix = experts._run_by_matrix(rows, counts, with_empty, slots[0])
            torch.testing.assert_close(actual, by_matrix)
    assert actual.requires_grad == grad


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("gated", [False, True])
def test_loop_adds_biases(gated: bool, limit: float | None) -> None:
    slots = [
        replace(
            make_expert(seed, gated=gated, dtype=torch.float32),
            gate_bias_F=torch.randn(F) if gated else None,
            up_bias_F=torch.randn(F),
            down_bias_H=torch.randn(H),
            limit=limit,
        )
        for seed in range(2)
    ]
    rows = torch.randn(5, H)
    expected = one_by_one(rows, [2, 3], [*slots])
    with torch.inference_mode():
        torch.testing.assert_close(run_experts(rows, [2, 3], slots), expected)
        by_matrix = experts._run_by_matrix(rows, [2, 3], slots, slots[0])
        torch.testing.assert_close(by_matrix, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_grouped_product_equals_the_loop(gated: bool) -> None:
    slots: list[MlpWeights | None] = [make_expert(s, gated=gated, dtype=BF16) for s in range(4)]
    slots[1] = None
    counts = [3, 0, 0, 5]
    rows = torch.randn(8, H).to(BF16)
    stacked = stack_experts(slots)
    assert stacked[1] is None
    calls = 0

    def grouped(rows_RH: Tensor, rows_of_expert: list[int], group: MlpWeights) -> Tensor:
        nonlocal calls
        calls += 1
        assert rows_of_expert == [3, 0, 5]
        assert group.up_FH.shape == (3, F, H)
        return run_grouped(rows_RH, rows_of_expert, group)

    run_grouped = experts._run_grouped
    with (
        patch.object(experts, "_run_grouped", grouped),
        patch.object(experts, "_groups_are_faster", lambda *_: True),
        torch.inference_mode(),
    ):
        actual = run_experts(rows, counts, stacked)
        torch.testing.assert_close(actual, one_by_one(rows, counts, slots), atol=2e-2, rtol=2e-2)
        assert calls == 1
        run_experts(rows, counts, slots)  # not adjacent: the loop
        exchanged = [stacked[3], None, *stacked[1:3], stacked[0]]
        run_experts(rows, [3, 0, 0, 0, 5], exchanged)
        assert calls == 1


def test_only_what_gains_is_stacked() -> None:
    half = [make_expert(seed, gated=True, dtype=torch.float16) for seed in range(2)]
    assert stack_experts(half) == tuple(half)
    limited = [replace(make_expert(s, gated=True, dtype=BF16), limit=7.0) for s in range(2)]
    assert stack_experts(limited) == tuple(limited)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_experts_on_a_gpu(dtype: torch.dtype) -> None:
    """As many rows as make the grouped product the faster one."""
    torch.manual_seed(0)
    slots = [
        MlpWeights(
            gate_FH=None,
            up_FH=torch.randn(512, 256, device="cuda").div(16).to(dtype),
            down_HF=torch.randn(256, 512, device="cuda").div(22).to(dtype),
        )
        for _ in range(4)
    ]
    counts = [100, 0, 300, 7]
    rows = torch.randn(407, 256, device="cuda").to(dtype)
    with torch.inference_mode():
        actual = run_experts(rows, counts, stack_experts(slots))
        torch.testing.assert_close(actual, one_by_one(rows, counts, [*slots]), atol=3e-2, rtol=3e-2)
