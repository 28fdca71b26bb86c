"""Dispatchers, streams, trace and CUDA graph on one GPU, as a world of one NCCL rank.

Rows travel through NCCL from the rank to itself, so that streams, events and splits are the real
ones; what one rank cannot show is transfers that take long.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epplan.planner.model import ModelSpec
from epplan.runtime.build import build_model
from epplan.runtime.clock import Span
from epplan.runtime.environment import Setting
from epplan.runtime.measure import run_rank
from epplan.runtime.model import ExpertParallelModel
from epplan.runtime.options import Options
from epplan.runtime.schedule import choose
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA GPU"),
]
OPTIONS = Options(
    backend="nccl", sequences=6, sequence_length=200, steps=2, seed=0, verify=True, micro_batches=3
)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device
    )
    yield
    dist.destroy_process_group()


def setting(dtype: torch.dtype) -> Setting:
    return Setting(
        backend="nccl",
        backend_reason="test",
        device=torch.device("cuda", 0),
        dtype=dtype,
        notes=(),
    )


def wide(spec: ModelSpec, factor: float = 8.0) -> ModelSpec:
    return spec.with_overrides(scale=factor)


def build(spec: ModelSpec, options: Options) -> ExpertParallelModel:
    plan = make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1)
    weights = SeededWeights(spec=spec, seed=0, device=torch.device("cuda", 0), dtype=torch.float16)
    return build_model(plan, options, choose(plan, options, weights.device), weights, 0)


def hidden(spec: ModelSpec, options: Options) -> torch.Tensor:
    shape = (options.sequences, options.sequence_length, spec.hidden_size)
    return seeded_hidden(0, 0, shape, device=torch.device("cuda", 0), dtype=torch.float16)


@pytest.mark.parametrize("spec", [REFERENCE, MIXTRAL, QWEN, DEEPSEEK], ids=lambda spec: spec.name)
def test_equals_the_dense_model(spec: ModelSpec, tmp_path: Path) -> None:
    spec = wide(spec)
    plan = make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1)
    cases: list[dict[str, Any]] = [
        {"dispatcher": "local"},
        {"dispatcher": "alltoall"},
        {"dispatcher": "alltoall", "micro_batches": 1},
        {"dispatcher": "alltoall", "micro_batches": 9},
        {"dispatcher": "alltoall", "transfer": "direct"},
        {"dispatcher": "alltoall", "fp8_dispatch": True},
        {"dispatcher": "padded"},
        {"dispatcher": "padded", "capacity_factor": 0.1},
        {"dispatcher": "padded", "fp8_dispatch": True},
    ]
    for case in cases:
        options = replace(OPTIONS, **case, trace=tmp_path / "trace.json")
        result = run_rank(plan, options, setting(torch.float16), 0)
        assert result is not None
        assert result.verified, (case, result.problems)
        assert (tmp_path / "trace.json").stat().st_size > 1000


def test_transfers_run_beside_the_computation() -> None:
    """Attention of the second micro-batch is queued before the rows of the first are there."""
    # Large enough for the device to be behind the host: attention takes milliseconds.
    spec = wide(REFERENCE, 64.0)
    options = replace(
        OPTIONS, dispatcher="alltoall", micro_batches=2, sequences=2, sequence_length=32768
    )
    model = build(spec, options)
    x_BSH = hidden(spec, options)
    for _ in range(3):
        model.forward(x_BSH)
    spans = model.clock.spans()

    def find(track: str, name: str, layer: int, micro_batch: int) -> Span:
        return [
            span
            for span in spans
            if (span.track, span.name, span.place) == (track, name, (layer, micro_batch))
        ][-1]

    for layer in range(spec.num_layers):
        rows = find("communication", "dispatch", layer, 0)
        attention = find("compute", "attention", layer, 1)
        assert rows.begin_s < attention.end_s
        assert rows.end_s < attention.end_s
        experts = find("compute", "experts", layer, 0)
        assert find("communication", "dispatch", layer, 1).begin_s < experts.end_s


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_padded_waits_for_nothing_and_fits_into_a_graph() -> None:
    spec = wide(DEEPSEEK)
    options = replace(OPTIONS, dispatcher="padded", micro_batches=2, capacity_factor=4.0)
    model = build(spec, options)
    x_BSH = hidden(spec, options)
    expected = model.forward(x_BSH)
    assert not expected.reran
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.run(x_BSH, model.dispatcher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        static_BSH = x_BSH.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            batches = model.run(static_BSH, model.dispatcher)
            out_BSH = torch.cat([batch.hidden_BSH for batch in batches])
        for factor in (1.0, -1.0):
            static_BSH.copy_(x_BSH * factor)
            graph.replay()
            again = model.forward(x_BSH * factor)
            assert torch.equal(out_BSH, again.hidden_BSH)
            counted = torch.stack([each.own_S for batch in batches for each in batch.counts])
            assert int(counted.sum()) == int(again.counts_LWWP.sum())


def test_memory_is_that_of_the_micro_batches_in_flight() -> None:
    spec = wide(REFERENCE, 32.0)
    peaks = {}
    for number in (2, 8):
        options = replace(OPTIONS, sequences=16, sequence_length=1024, dispatcher="alltoall")
        model = build(spec, replace(options, micro_batches=number))
        x_BSH = hidden(spec, options)
        model.forward(x_BSH)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.forward(x_BSH)
        peaks[number] = torch.cuda.max_memory_allocated() - before
    assert peaks[8] < 0.6 * peaks[2]
