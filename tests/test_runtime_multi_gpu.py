"""Two or more GPUs of one host over NCCL: equal to the dense model, and overlapped on the device.

All cases run in one process group, because a start costs more than a case.
"""

import faulthandler
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from epplan.launcher.targets.local import free_port
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime.baseline import tensor_parallel
from epplan.runtime.baseline.pipeline_parallel import Grid, PipelineParallelModel
from epplan.runtime.build import build_model
from epplan.runtime.clock import PhaseClock, Span
from epplan.runtime.decode import DecodeGraph, GraphedDecode
from epplan.runtime.dispatchers.padded import Padded
from epplan.runtime.environment import Setting
from epplan.runtime.layer.filled_cache import filled_cache
from epplan.runtime.measure import run_rank
from epplan.runtime.options import Options
from epplan.runtime.schedule import choose
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.fork_ranks import fork_ranks
from tests.runtime_cases import DEEPSEEK, MIXTRAL, QWEN, REFERENCE, make_plan

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} GPUs, 2 needed"),
]
_TIMEOUT_S = 90
OPTIONS = Options(backend="nccl", sequences=4, sequence_length=96, steps=2, seed=0, verify=True)
CASES: list[dict[str, Any]] = [
    {"dispatcher": "alltoall"},
    {"dispatcher": "alltoall", "micro_batches": 3},
    {"dispatcher": "alltoall", "micro_batches": 9},
    {"dispatcher": "alltoall", "transfer": "direct", "micro_batches": 2},
    {"dispatcher": "alltoall", "fp8_dispatch": True},
    {"dispatcher": "alltoall", "router_skew": 3.0, "micro_batches": 2},
    {"dispatcher": "padded"},
    {"dispatcher": "padded", "micro_batches": 2},
    {"dispatcher": "padded", "capacity_factor": 0.1},
    {"dispatcher": "alltoall", "train": True, "micro_batches": 2},
]


def on_every_gpu(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return `function(rank, *arguments)` of one process a GPU."""
    given = (free_port(), function, arguments)
    return fork_ranks(_with_nccl, GPUS, *given, timeout_s=_TIMEOUT_S, method="spawn")


def _with_nccl(
    rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    faulthandler.dump_traceback_later(_TIMEOUT_S - 10)  # says where a rank hangs
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=GPUS, device_id=device)
    value = function(rank, *arguments)
    dist.destroy_process_group()
    return value


def setting(rank: int, dtype: torch.dtype) -> Setting:
    device = torch.device("cuda", rank)
    return Setting(backend="nccl", backend_reason="test", device=device, dtype=dtype, notes=())


def wide(spec: ModelSpec, factor: float) -> ModelSpec:
    return spec.with_overrides(scale=factor)


def spread(spec: ModelSpec, *, copies: int = 0, num_hosts: int = 1) -> Plan:
    """Return a plan with all experts on all GPUs, and `copies` replicas.

    More hosts than one are in name only.
    """
    slots = -(-(spec.num_experts + copies) // GPUS)
    return make_plan(spec, GPUS, slots_per_rank=slots, num_hosts=num_hosts, copies=copies)


def run_cases(rank: int, cases: list[tuple[Plan, Options]]) -> list[tuple[Any, ...]]:
    """Run all cases; returns the failures on rank 0."""
    failures = []
    for plan, options in cases:
        result = run_rank(plan, options, setting(rank, torch.float16), rank)
        if result is not None and not result.verified:
            failures.append((plan.model.name, options, result.problems))
    return failures


def test_equals_the_dense_model() -> None:
    cases = [
        (spread(wide(spec, 8.0)), replace(OPTIONS, **case))
        for spec in (REFERENCE, MIXTRAL, QWEN, DEEPSEEK)
        for case in CASES
    ]
    copied = spread(wide(MIXTRAL, 8.0), copies=GPUS)
    everywhere = spread(wide(MIXTRAL, 8.0), copies=MIXTRAL.num_experts * (GPUS - 1))
    cases += [
        (copied, replace(OPTIONS, dispatcher="alltoall", micro_batches=2)),
        (copied, replace(OPTIONS, dispatcher="padded")),
        (copied, replace(OPTIONS, dispatcher="alltoall", replicas="nearest")),
        (everywhere, replace(OPTIONS, dispatcher="local", replicas="nearest")),
    ]
    hosts = spread(wide(QWEN, 8.0), num_hosts=2)
    once_a_host = replace(OPTIONS, dispatcher="alltoall", transfer="node-dedup")
    cases += [(hosts, once_a_host), (hosts, replace(once_a_host, micro_batches=2))]
    assert on_every_gpu(run_cases, cases)[0] == []


def kinds_of_output(rank: int, cases: list[tuple[Plan, Options]]) -> list[int]:
    """Run 40 steps of each case; tells how many different outputs there were."""
    device = torch.device("cuda", rank)
    kinds = []
    for plan, options in cases:
        weights = SeededWeights(spec=plan.model, seed=0, device=device, dtype=torch.float16)
        model = build_model(plan, options, choose(plan, options, device), weights, rank)
        shape = (options.sequences, options.positions, plan.model.hidden_size)
        x_BSH = seeded_hidden(0, rank, shape, device=device, dtype=torch.float16)
        outputs: list[torch.Tensor] = []
        for output in [model.forward(x_BSH).hidden_BSH for _ in range(40)]:
            if not any(torch.equal(output, other) for other in outputs):
                outputs.append(output)
        kinds.append(len(outputs))
    return kinds


def test_steps_in_a_row_give_the_same_bits() -> None:
    """Rows that arrive into memory that is still read would change some of them."""
    hosts = spread(wide(QWEN, 8.0), num_hosts=2)
    alltoall = replace(OPTIONS, dispatcher="alltoall")
    options = [
        alltoall,
        replace(alltoall, transfer="direct"),
        replace(alltoall, transfer="node-dedup"),
        replace(alltoall, transfer="node-dedup", fp8_dispatch=True),
        replace(OPTIONS, dispatcher="padded"),
    ]
    cases = [(hosts, replace(each, micro_batches=parts)) for each in options for parts in (2, 3)]
    assert on_every_gpu(kinds_of_output, cases) == [[1] * len(cases)] * GPUS


def decode_both_ways(rank: int, plan: Plan, dtype: torch.dtype) -> list[bool]:
    """Run decode steps as a graph and kernel by kernel; tells which are equal."""
    options = replace(OPTIONS, dispatcher="padded", sequence_length=1, micro_batches=2)
    device, spec = torch.device("cuda", rank), plan.model
    weights = SeededWeights(spec=spec, seed=0, device=device, dtype=dtype)
    model = build_model(plan, options, choose(plan, options, device), weights, rank)
    caches = [
        filled_cache(
            spec.attention,
            num_layers=spec.num_layers,
            sequences=options.sequences // 2,
            context=7,
            device=device,
            dtype=dtype,
        )
        for _ in range(2)
    ]
    assert isinstance(model.dispatcher, Padded)
    graphed, equal = GraphedDecode(model, caches), []
    for seed, capacity in enumerate([8, 8, 1, 8]):  # 1: rows are lost, and the step run again
        model.dispatcher.capacity = capacity
        shape = (options.sequences, 1, spec.hidden_size)
        x_B1H = seeded_hidden(seed, rank, shape, device=device, dtype=dtype)
        if capacity == 1:
            graphed = GraphedDecode(model, caches)
        result_B1H = graphed(x_B1H).clone()
        expected_B1H = model.forward(x_B1H, caches=caches).hidden_BSH
        for cache in caches:
            cache.truncate(7)
        equal.append(torch.allclose(result_B1H, expected_B1H, rtol=1e-2, atol=1e-2))
    return equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # the second: experts grouped
def test_decode_as_a_graph_equals_decode_kernel_by_kernel(dtype: torch.dtype) -> None:
    assert on_every_gpu(decode_both_ways, spread(wide(QWEN, 8.0)), dtype) == [[True] * 4] * GPUS


def decode_by_tensor_parallelism(rank: int, plan: Plan) -> list[bool]:
    """Run decode steps of the baseline as a graph, and sorted by expert kernel by kernel."""
    spec, device, sequences = plan.model, torch.device("cuda", rank), 12
    weights = SeededWeights(spec=spec, seed=0, device=device, dtype=torch.bfloat16)
    grid = Grid(shards=GPUS, stages=1)
    model = PipelineParallelModel(weights, grid, rank, PhaseClock(device))
    caches = model.filled_caches(sequences, 1, 7)

    def step(x_B1H: torch.Tensor) -> torch.Tensor | None:
        result = model.forward(x_B1H, num_micro_batches=1, overlap=False, caches=caches)
        caches[0].truncate(7)
        return result.hidden_BSH

    shape = (sequences, 1, spec.hidden_size)
    inputs = [seeded_hidden(n, 0, shape, device=device, dtype=torch.bfloat16) for n in range(3)]
    assert tensor_parallel.never_waits(spec, inputs[0].flatten(0, 1))
    graph = DecodeGraph(step, inputs[0])
    results = [result.clone() for x_B1H in inputs if (result := graph(x_B1H)) is not None]
    with patch.object(tensor_parallel, "_PADDED_TOKENS", 0):
        expected = [result for x_B1H in inputs if (result := step(x_B1H)) is not None]
    return [
        torch.allclose(result_B1H, expected_B1H, rtol=2e-2, atol=2e-2)
        for result_B1H, expected_B1H in zip(results, expected, strict=True)
    ]


def test_tensor_parallel_decode_as_a_graph_equals_sorted_rows() -> None:
    plan = spread(wide(QWEN, 8.0))
    assert on_every_gpu(decode_by_tensor_parallelism, plan) == [[True] * 3] * GPUS


def spans_of_step(rank: int, plan: Plan, options: Options) -> list[Span]:
    """Run some steps and return what happened when in the last."""
    weights = SeededWeights(
        spec=plan.model, seed=0, device=torch.device("cuda", rank), dtype=torch.float16
    )
    model = build_model(plan, options, choose(plan, options, weights.device), weights, rank)
    shape = (options.sequences, options.sequence_length, plan.model.hidden_size)
    x_BSH = seeded_hidden(0, rank, shape, device=weights.device, dtype=weights.dtype)
    for _ in range(3):
        dist.barrier()
        model.forward(x_BSH)
    return model.clock.spans()


def test_transfers_run_under_the_other_micro_batch() -> None:
    """Rows of one micro-batch arrive while the other's attention, or experts, still compute."""
    # Large enough for the device to be behind the host: attention takes milliseconds. Experts four
    # times as wide, so that they take longer than the rows: with 4096 they were 0.1 ms ahead once.
    spec = wide(REFERENCE, 64.0).model_copy(update={"expert_ffn_size": 16384})
    options = replace(
        OPTIONS, dispatcher="alltoall", micro_batches=2, sequences=2, sequence_length=16384
    )
    for spans in on_every_gpu(spans_of_step, spread(spec), options):
        by_place = {(span.track, span.name, span.place): span for span in spans}
        for layer in range(spec.num_layers):
            rows = by_place["communication", "dispatch", (layer, 0)]
            attention = by_place["compute", "attention", (layer, 1)]
            assert rows.end_s < attention.end_s
            experts = by_place["compute", "experts", (layer, 0)]
            assert by_place["communication", "dispatch", (layer, 1)].end_s < experts.end_s
