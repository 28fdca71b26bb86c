"""One rank's decode step of the reference model, on one GPU, transfers left out.

    python benchmarks/one_rank.py -o planner/simulate/data/one-rank-h200.yaml

What one of 16 GPUs computes for one new token of 1024 sequences:

    ep16      64 sequences, attention replicated, one expert a layer, 4 layers
    tp8pp2    a pipeline stage: 2 layers, an eighth of the heads and of all 16 experts, 512
              sequences a pass (two passes make a step) or 1024 (one pass a stage)

    graph     a CUDA graph, the experts of tp8pp2 as one batched product
    bare      the same without norms, router, sorting and gathering of rows: the most that fused
              kernels could save
    eager     without a graph
    naive     without a graph, experts one after another, each picking its rows with a mask

Rows are spread evenly.

Shapes: B sequences, R rows, H hidden size, E experts, F width of an expert, S cached positions.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from epplan.files import write_atomically
from epplan.planner.model import load_model
from epplan.runtime.calibrate import decode_by_products
from epplan.runtime.layer.norm import rms_norm

CONTEXTS = (0, 128, 1024, 4096, 10000)
Layer = Callable[[Tensor], Tensor]
SPEC = load_model("reference")


class Rank:
    """One layer's weights and cache on one rank."""

    def __init__(self, *, heads: int, experts: int, ffn: int, batch: int, context: int) -> None:
        hidden, width = SPEC.hidden_size, heads * SPEC.attention.head_dim
        self.heads, self.batch = heads, batch
        self.qkv = _random(3 * width, hidden)
        self.out = _random(hidden, width)
        self.router = _random(SPEC.num_experts, hidden)
        self.up_EHF = _random(experts, hidden, ffn)
        self.down_EFH = _random(experts, ffn, hidden)
        # The new token is the last of `context`: an odd number of positions would misalign the
        # products and halve their speed, which no cache in service does.
        self.context = max(context, 8)
        shape = (batch, heads, self.context, SPEC.attention.head_dim)
        self.key, self.value = (
            torch.zeros(shape, device="cuda", dtype=torch.float16) for _ in "kv"
        )

    def attention(self, x_BH: Tensor, *, norm: bool = True) -> Tensor:
        """Return attention of one new token a sequence; its key and value join the cache."""
        query, key, value = F.linear(rms_norm(x_BH) if norm else x_BH, self.qkv).chunk(3, -1)
        heads = (self.batch, self.heads, 1, SPEC.attention.head_dim)
        self.key[:, :, -1:] = key.view(heads)
        self.value[:, :, -1:] = value.view(heads)
        attend = decode_by_products if self.context >= 1024 else F.scaled_dot_product_attention
        out = attend(query.view(heads), self.key, self.value)
        return x_BH + F.linear(out.view(self.batch, -1), self.out)

    def expert(self, x_RH: Tensor, expert: int) -> Tensor:
        """Return one expert's output."""
        return F.gelu(x_RH @ self.up_EHF[expert]) @ self.down_EFH[expert]

    def ep_layer(self, x_BH: Tensor) -> Tensor:
        """Return a layer's output; as many rows come to the expert as leave the rank."""
        x_BH = self.attention(x_BH)
        h_BH = rms_norm(x_BH)
        best = (h_BH @ self.router.T).argmax(-1)
        rows = h_BH[best.argsort()]
        return x_BH + self.expert(rows, 0)

    def tp_layer(self, x_BH: Tensor) -> Tensor:
        """Return a layer's output with all experts as one batched product."""
        x_BH = self.attention(x_BH)
        h_BH = rms_norm(x_BH)
        order = (h_BH @ self.router.T).argmax(-1).argsort()
        rows_ERH = torch.unflatten(h_BH[order], 0, (len(self.up_EHF), -1))
        out = torch.bmm(F.gelu(torch.bmm(rows_ERH, self.up_EHF)), self.down_EFH)
        return x_BH + out.flatten(0, 1)[order.argsort()]

    def bare_layer(self, x_BH: Tensor) -> Tensor:
        """Return attention and experts alone: what is left if all else were fused into them."""
        x_BH = self.attention(x_BH, norm=False)
        if len(self.up_EHF) == 1:
            return x_BH + self.expert(x_BH, 0)
        rows_ERH = torch.unflatten(x_BH, 0, (len(self.up_EHF), -1))
        out = torch.bmm(F.gelu(torch.bmm(rows_ERH, self.up_EHF)), self.down_EFH)
        return x_BH + out.flatten(0, 1)

    def naive_layer(self, x_BH: Tensor, choice_B: Tensor) -> Tensor:
        """Return a layer's output, one expert after another."""
        x_BH = self.attention(x_BH)
        h_BH = rms_norm(x_BH)
        (h_BH @ self.router.T).argmax(-1)
        out = torch.zeros_like(h_BH)
        for expert in range(len(self.up_EHF)):
            mask = choice_B == expert
            out[mask] = self.expert(h_BH[mask], expert)  # the mask is counted on the host
        return x_BH + out


def _random(*shape: int) -> Tensor:
    values: Tensor = torch.randn(shape, device="cuda", dtype=torch.float16)
    return values * float(shape[-1] ** -0.5)


def _seconds(work: Callable[[], Any], repeats: int = 20) -> float:
    work()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / repeats)
    return median(times)


def _graph_seconds(work: Callable[[], Any]) -> float:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _seconds(graph.replay)


def _run(layers: list[Layer], batch: int) -> Callable[[], Tensor]:
    x_BH = torch.randn(batch, SPEC.hidden_size, device="cuda", dtype=torch.float16)

    def work() -> Tensor:
        h_BH = x_BH
        for layer in layers:
            h_BH = layer(h_BH)
        return h_BH

    return work


def _layout(context: int, heads: int, experts: int, batch: int, layers: int) -> list[Rank]:
    ffn = SPEC.expert_ffn_size if experts == 1 else SPEC.expert_ffn_size // 8
    return [
        Rank(heads=heads, experts=experts, ffn=ffn, batch=batch, context=context)
        for _ in range(layers)
    ]


@torch.inference_mode()
def measure(context: int) -> list[dict[str, Any]]:
    """Return the times of all layouts at one context."""
    rows = []

    def note(layout: str, how: str, batch: int, seconds: float) -> None:
        entry = {"layout": layout, "how": how, "sequences": batch, "context": context}
        rows.append({**entry, "seconds": float(f"{seconds:.4g}")})
        click.echo(str(rows[-1]))

    ranks = _layout(context, 16, 1, 64, 4)
    work = _run([rank.ep_layer for rank in ranks], 64)
    note("ep16", "graph", 64, _graph_seconds(work))
    note("ep16", "eager", 64, _seconds(work))
    note("ep16", "bare", 64, _graph_seconds(_run([rank.bare_layer for rank in ranks], 64)))
    del ranks, work
    for batch in (512, 1024):
        ranks = _layout(context, 2, 16, batch, 2)
        note("tp8pp2", "graph", batch, _graph_seconds(_run([x.tp_layer for x in ranks], batch)))
        note("tp8pp2", "bare", batch, _graph_seconds(_run([x.bare_layer for x in ranks], batch)))
        choice = torch.arange(batch, device="cuda") % 16
        naive: list[Layer] = [
            lambda x, rank=rank, choice=choice: rank.naive_layer(x, choice)  # type: ignore[misc]
            for rank in ranks
        ]
        note("tp8pp2", "naive", batch, _seconds(_run(naive, batch), 5))
        del ranks, naive
        torch.cuda.empty_cache()
    return rows


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
def main(output: Path) -> None:
    """Time all layouts at all contexts."""
    rows = [row for context in CONTEXTS for row in measure(context)]
    name = torch.cuda.get_device_name()
    head = {
        "schema_version": 1,
        "kind": "epplan-one-rank",
        "device": name,
        "source": f"benchmarks/one_rank.py on one {name}, torch {torch.__version__}",
    }
    lines = [f"{key}: {value}" for key, value in head.items()]
    lines += ["steps:"]
    lines += [
        f"  - {yaml.safe_dump(row, default_flow_style=True, width=200).strip()}" for row in rows
    ]
    write_atomically(output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
