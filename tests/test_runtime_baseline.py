"""The baseline on real gloo ranks against the dense model."""

import pytest
import torch
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.runtime.baseline.pipeline_parallel import (
    Grid,
    PipelineParallelModel,
    check_grid,
)
from epplan.runtime.checks.dense import run_dense
from epplan.runtime.clock import PhaseClock
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.fork_ranks import run_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE

CPU = torch.device("cpu")
SEQUENCES, LENGTH = 5, 7


def wide(spec: ModelSpec, num_heads: int) -> ModelSpec:
    attention = spec.attention.model_copy(
        update={"num_heads": num_heads, "num_kv_heads": num_heads}
    )
    return spec.model_copy(update={"attention": attention})


REFERENCE_16 = wide(REFERENCE, 16)
GPT_OSS = REFERENCE.model_copy(
    update={
        "attention": REFERENCE.attention.model_copy(
            update={
                "qkv_bias": True,
                "output_bias": True,
                "sinks": True,
                "window": 3,
                "window_layers": (0, 3),
            }
        )
    }
)


def make_weights(spec: ModelSpec) -> SeededWeights:
    return SeededWeights(spec=spec, seed=3, device=CPU, dtype=torch.float32)


def make_input(spec: ModelSpec) -> Tensor:
    shape = (SEQUENCES, LENGTH, spec.hidden_size)
    return seeded_hidden(3, 0, shape, device=CPU, dtype=torch.float32)


def run(
    rank: int, spec: ModelSpec, grid: Grid, num_micro_batches: int, overlap: bool, prompt: int
) -> tuple[Tensor | None, list[Tensor]]:
    """Run the prompt at once and the rest position by position, with a cache."""
    model = PipelineParallelModel(make_weights(spec), grid, rank, PhaseClock(CPU))
    x_BSH = make_input(spec)
    caches = None if prompt == LENGTH else model.new_caches(min(num_micro_batches, SEQUENCES))
    lengths = [prompt] + [1] * (LENGTH - prompt)
    steps = [
        model.forward(part, num_micro_batches=num_micro_batches, overlap=overlap, caches=caches)
        for part in torch.split(x_BSH, lengths, dim=1)
    ]
    hidden = [step.hidden_BSH for step in steps if step.hidden_BSH is not None]
    choices = [
        torch.cat([choice.view(SEQUENCES, -1, spec.top_k) for choice in layer], 1).flatten(0, 1)
        for layer in zip(*(step.experts_LTK for step in steps), strict=True)
    ]
    return torch.cat(hidden, 1) if hidden else None, choices


@pytest.mark.parametrize(
    ("spec", "grid", "num_micro_batches", "overlap", "prompt"),
    [
        (REFERENCE_16, Grid(shards=8, stages=2), 1, False, LENGTH),
        pytest.param(
            REFERENCE_16, Grid(shards=8, stages=2), 3, True, LENGTH, marks=pytest.mark.slow
        ),
        (REFERENCE_16, Grid(shards=8, stages=2), 3, True, 4),
        (REFERENCE_16, Grid(shards=16, stages=1), 9, False, LENGTH),  # more than sequences
        (REFERENCE, Grid(shards=4, stages=4), 5, True, 6),
        (REFERENCE, Grid(shards=1, stages=1), 2, True, 1),
        (MIXTRAL, Grid(shards=4, stages=2), 2, True, 4),  # two shards share a key head
        pytest.param(QWEN, Grid(shards=8, stages=2), 2, True, LENGTH, marks=pytest.mark.slow),
        (DEEPSEEK, Grid(shards=4, stages=3), 2, True, 4),
        (GPT_OSS, Grid(shards=2, stages=3), 2, True, 4),  # windows, sinks and biases
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_baseline_equals_the_dense_model(
    spec: ModelSpec, grid: Grid, num_micro_batches: int, overlap: bool, prompt: int
) -> None:
    outputs = run_ranks(run, grid.world_size, spec, grid, num_micro_batches, overlap, prompt)
    choices = torch.stack([choice for stage in outputs[:: grid.shards] for choice in stage[1]])
    dense = run_dense(spec, make_weights(spec), make_input(spec), choices, torch.float32)
    assert dense.disagreements == ()
    for hidden, _ in outputs[: -grid.shards]:
        assert hidden is None
    for hidden, _ in outputs[-grid.shards :]:
        torch.testing.assert_close(hidden, dense.hidden_BSH, rtol=1e-4, atol=1e-5)


def test_stages_get_even_parts_of_the_layers() -> None:
    grid = Grid(shards=2, stages=3)
    parts = [list(grid.layers_of(stage, 7)) for stage in range(3)]
    assert parts == [[0, 1, 2], [3, 4], [5, 6]]


def test_a_model_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        check_grid(Grid(shards=8, stages=2), MIXTRAL, 16)
    assert str(refused.value) == (
        "model mixtral-tiny cannot be split into 8 shards\n"
        "  - attention.num_heads 4 is not a multiple of 8"
    )
    with pytest.raises(
        InputError, match=r"^model mixtral-tiny has 2 layers, too few for 4 stages$"
    ):
        check_grid(Grid(shards=4, stages=4), MIXTRAL, 16)
    with pytest.raises(InputError, match=r"^tp8pp2 is for 16 ranks, there are 4$"):
        check_grid(Grid(shards=8, stages=2), MIXTRAL, 4)
