"""What one GPU of the reference model's EP=16 job reaches, beside ceilings of the same run.

    PYTHONPATH=. python benchmarks/one_gpu.py [--only decode] [--only attention] ...

The GPU holds one expert of each layer (4 layers, 16 experts, H 8192, F 32768, attention 16 heads x
512, float16) and does all its work but the transfers, through the runtime's own model code. Prints
JSON lines; times are medians of device events.
"""

import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from epplan.launcher.bench_options import BenchOptions
from epplan.planner.model import load_model
from epplan.runtime.layer import experts
from epplan.runtime.layer.attend import attend
from epplan.runtime.layer.experts import MlpWeights, mlp, run_experts
from epplan.runtime.layer.layers import Layer, MoeWeights, build_layers
from epplan.runtime.timing.bench_jobs import one_rank_job
from epplan.runtime.timing.ceilings import device_seconds, measure_ceilings
from epplan.runtime.weights import SeededWeights
from tests.runtime_cases import make_plan

DEVICE = torch.device("cuda")
RANKS = 16
EXPERTS = ((16, 8192, 32768), (16, 7168, 2048), (8, 4096, 14336))
STEPS_IN_A_ROW = 16  # the host starts the later ones while the first runs
READ_NUMBERS = 1 << 30  # float32: 80 times the L2


def emit(what: str, **values: Any) -> None:
    """Print one line."""
    rounded = {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in values.items()
    }
    click.echo(json.dumps({"what": what, **rounded}))


def median_seconds(work: Callable[[], object], repeats: int = 15, warm_up: int = 3) -> float:
    """Return the device's time of one call."""
    for _ in range(warm_up):
        work()
    return statistics.median(device_seconds(work, DEVICE) for _ in range(repeats))


def options(phase: str, sequences: int, length: int, context: int) -> BenchOptions:
    """Return what to run."""
    return BenchOptions(
        phase=phase,
        baseline=None,
        one_rank=0,
        backend="auto",
        sequences=sequences,
        sequence_length=length,
        context=context,
        micro_batches=None,
        overlap=True,
        graph=True,
        steps=30,
        warm_up=5,
        seed=0,
    )


def reading_bytes_per_s() -> float:
    """Return how fast the device reads what it only adds up."""
    numbers = torch.randn(READ_NUMBERS, device=DEVICE)
    seconds = median_seconds(numbers.sum, repeats=200)  # 0.2 s: it gets as hot as in decode
    return numbers.numel() * numbers.itemsize / seconds


def decode(layers: list[Layer], weights: SeededWeights, bytes_per_s: float) -> None:
    """Time the decode step of 64 sequences as a CUDA graph; its floor is to read its bytes.

    A step alone finds an idle device, which waits while the host starts the graph; in a row the
    host is ahead, as it is where tokens are not looked at before the next step.
    """
    for context in (128, 1024):
        job = one_rank_job(layers, options("decode", 64, 1, context), weights, "decode")
        seconds = median_seconds(job.step, repeats=50, warm_up=10)
        in_a_row = median_seconds(partial(run_in_a_row, job.step)) / STEPS_IN_A_ROW
        floor = job.bytes_read / bytes_per_s
        emit(
            "decode",
            context=context,
            ms=seconds * 1e3,
            ms_in_a_row=in_a_row * 1e3,
            floor_ms=floor * 1e3,
            bytes=job.bytes_read,
            of_floor=floor / seconds,
            of_floor_in_a_row=floor / in_a_row,
        )


def run_in_a_row(step: Callable[[], object]) -> None:
    """Run several steps, none of which waits for the host."""
    for _ in range(STEPS_IN_A_ROW):
        step()


def moe(layers: list[Layer], weights: SeededWeights) -> None:
    """Compare norm, router, batching, expert and combine of 8192 tokens with the expert alone."""
    job = one_rank_job(layers, options("prefill", 1, 8192, 0), weights, "prefill")
    feed_forward = layers[0].feed_forward
    assert isinstance(feed_forward, MoeWeights)
    expert = next(each for each in feed_forward.experts if each is not None)
    rows = torch.randn(8192, weights.spec.hidden_size, device=DEVICE).to(weights.dtype)
    alone: list[float] = []
    around: list[dict[str, float]] = []
    clock = job.clock
    assert clock is not None
    for _ in range(20):
        job.step()
        around.append(clock.seconds())
        alone += [device_seconds(lambda: mlp(rows, expert), DEVICE) for _ in range(4)]
    parts = {
        name: statistics.median(step[name] for step in around[5:]) / len(layers)
        for name in around[0]
    }
    inside = sum(parts[name] for name in ("route", "dispatch", "experts", "combine"))
    expert_s = statistics.median(alone[20:])
    emit(
        "moe_layer",
        tokens=8192,
        ms=inside * 1e3,
        expert_alone_ms=expert_s * 1e3,
        share=expert_s / inside,
        parts_ms={name: round(value * 1e3, 3) for name, value in parts.items()},
    )


def attention() -> None:
    """Time causal attention of one sequence of 10,000 positions."""
    heads, length, width = 16, 10_000, 512
    query, key, value = (
        torch.randn(1, heads, length, width, device=DEVICE, dtype=torch.float16) for _ in range(3)
    )
    flop = 4 * heads * width * length * (length + 1) / 2

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    for name, work in (("attend", lambda: attend(query, key, value, scale=None)), ("sdpa", sdpa)):
        seconds = median_seconds(work)
        emit("attention", kernel=name, ms=seconds * 1e3, tflop_per_s=flop / seconds / 1e12)


def many_experts() -> None:
    """Time the experts of one GPU: one by one, by matrix, grouped, and as chosen.

    The ways take turns: one after the other, the later ones would find a hotter board.
    """
    for dtype, (number, hidden, width) in product((torch.float16, torch.bfloat16), EXPERTS):
        up = torch.randn(number, width, hidden, device=DEVICE, dtype=dtype) / math.sqrt(hidden)
        down = torch.randn(number, hidden, width, device=DEVICE, dtype=dtype) / math.sqrt(width)
        group = MlpWeights(gate_FH=None, up_FH=up, down_HF=down)
        slots = [MlpWeights(gate_FH=None, up_FH=up[e], down_HF=down[e]) for e in range(number)]
        for rows in (64, 128, 256, 512, 1024, 2048):
            x = torch.randn(number * rows, hidden, device=DEVICE, dtype=dtype)
            counts = [rows] * number
            ways: dict[str, Callable[[], object]] = {
                "loop": partial(loop, x, rows, slots),
                "by_matrix": partial(experts._run_by_matrix, x, counts, slots, slots[0]),
                "grouped": partial(experts._run_grouped, x, counts, group),
                "run_experts": partial(run_experts, x, counts, slots),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(11):
                for name, work in ways.items():
                    times[name].append(device_seconds(work, DEVICE))
            emit(
                "many_experts",
                dtype=str(dtype).removeprefix("torch."),
                experts=f"{number} of {hidden} x {width}",
                rows=rows,
                ms={name: round(statistics.median(t[2:]) * 1e3, 3) for name, t in times.items()},
            )


def loop(x: Tensor, rows: int, slots: list[MlpWeights]) -> Tensor:
    """Run the experts one by one."""
    parts = zip(torch.split(x, rows), slots, strict=True)
    return torch.cat([mlp(part, slot) for part, slot in parts])


SECTIONS = ("decode", "moe", "attention", "experts")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="By default all.")
def main(only: tuple[str, ...]) -> None:
    """Measure and print."""
    chosen = only or SECTIONS
    spec = load_model("reference")
    with torch.inference_mode():
        ceilings = measure_ceilings(DEVICE, torch.float16)
        read_bytes_per_s = reading_bytes_per_s()
        emit(
            "ceilings",
            device=torch.cuda.get_device_name(),
            torch=torch.__version__,
            tflop_per_s=ceilings.flop_per_s / 1e12,
            gb_per_s=ceilings.bytes_per_s / 1e9,
            read_gb_per_s=read_bytes_per_s / 1e9,
        )
        if "decode" in chosen or "moe" in chosen:
            weights = SeededWeights(spec=spec, seed=0, device=DEVICE, dtype=torch.float16)
            layers = build_layers(make_plan(spec, RANKS), 0, weights)
            if "decode" in chosen:
                decode(layers, weights, read_bytes_per_s)
            if "moe" in chosen:
                moe(layers, weights)
            del layers
        if "attention" in chosen:
            attention()
        if "experts" in chosen:
            many_experts()


if __name__ == "__main__":
    main()
