"""Times what a step is made of on the GPU at hand and writes a device profile.

    python3 -m epplan.runtime.calibrate -o profile.yaml

Matrix products by rows, attention over whole sequences, one decoded token against a cache, memory
copies, the permutation of rows, and launches. The simulator (`epplan.planner.simulate.device`)
reads the file; no number is interpreted here.

A GPU at its power limit is slower than one that just woke up, so it is heated first and the large
products come first. Weights rotate through more memory than the cache holds. Everything runs from a
CUDA graph: what launching costs is a figure of its own.

Shapes: R rows, H hidden size, F width of an MLP, B sequences, Q query heads, G key and value heads,
S cached positions, D width of a head.
"""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from epplan.files import write_atomically
from epplan.runtime.layer.experts import MlpWeights, mlp
from epplan.runtime.layer.norm import rms_norm

from .clock import synchronize

ROWS = tuple(2**power for power in range(15))  # 1 to 16384
POOL_BYTES = 2**30  # weights to rotate through: more than any cache
_Pool = list[tuple[Tensor, Tensor]]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """An MLP to time: an expert, or a slice of one."""

    hidden: int
    ffn: int
    gated: bool
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """An attention to time."""

    query: int
    kv: int
    dim: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is timed, and for how long."""

    rows: tuple[int, ...] = ROWS
    mlps: tuple[Mlp, ...] = (
        Mlp(hidden=8192, ffn=32768, gated=False, dtype="float16"),  # the reference model's expert
        Mlp(hidden=8192, ffn=4096, gated=False, dtype="float16"),  # an eighth of it (TP=8)
        Mlp(hidden=7168, ffn=2048, gated=True, dtype="bfloat16"),  # DeepSeek-V3's
        Mlp(hidden=4096, ffn=14336, gated=True, dtype="bfloat16"),  # Mixtral's
    )
    linears: tuple[tuple[int, int, str], ...] = ((8192, 8192, "float16"),)  # in, out, dtype
    heads: tuple[Heads, ...] = (
        Heads(query=16, kv=16, dim=512, dtype="float16"),
        Heads(query=64, kv=64, dim=128, dtype="float16"),
        Heads(query=64, kv=4, dim=128, dtype="bfloat16"),
    )
    prefill: tuple[int, ...] = (1024, 4096, 10000)
    decode: tuple[tuple[int, int], ...] = (  # sequences, context
        *((16, context) for context in (128, 1024, 4096, 10000)),
        *((64, context) for context in (128, 1024, 4096)),
        (256, 1024),
    )
    copy_bytes: int = 4 * 2**30
    permute: tuple[int, ...] = (1024, 8192, 65536)  # rows
    least_s: float = 0.06  # of every timing
    heat_s: float = 3.0


QUICK = Sizes(  # for machines without a GPU: shows that all parts run
    rows=(1, 16),
    mlps=(Mlp(hidden=64, ffn=128, gated=True, dtype="float32"),),
    linears=((64, 64, "float32"),),
    heads=(Heads(query=4, kv=2, dim=16, dtype="float32"),),
    prefill=(32,),
    decode=((2, 32), (4, 32)),
    copy_bytes=2**20,
    permute=(64,),
    least_s=0.001,
    heat_s=0.0,
)


class Timer:
    """Seconds of a piece of work, as a CUDA graph where there is a GPU."""

    def __init__(self, device: torch.device, least_s: float) -> None:
        self._device = device
        self._least_s = least_s

    def __call__(self, work: Callable[[], Any]) -> float:
        """Return the median seconds of `work`."""
        if self._device.type != "cuda":
            return self.eager(work)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # chooses algorithms, which may not happen during a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.eager(graph.replay)

    def eager(self, work: Callable[[], Any]) -> float:
        """Return the median seconds of `work`, launched piece by piece."""
        work()
        once = self._seconds(work, 1)
        repeats = max(1, round(self._least_s / 3 / max(once, 1e-7)))
        return median(self._seconds(work, repeats) for _ in range(3))

    def _seconds(self, work: Callable[[], Any], repeats: int) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(self._device)
        return (time.perf_counter() - begin) / repeats


@torch.inference_mode()
def calibrate(device: torch.device, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Return a device profile as plain data, in the order of the file."""
    torch.manual_seed(0)
    timer = Timer(device, sizes.least_s)
    _heat(device, sizes.heat_s)
    tables: dict[str, Any] = {
        "mlp": [_time_mlp(each, sizes.rows, device, timer) for each in sizes.mlps],
        "linear": [_time_linear(each, sizes.rows, device, timer) for each in sizes.linears],
    }
    say("matrix products done")
    tables["attention"] = [_time_prefill(x, sizes.prefill, device, timer) for x in sizes.heads]
    say("attention over whole sequences done")
    tables["decode"] = [_time_decode(x, sizes.decode, device, timer) for x in sizes.heads]
    say("decoding done")
    return {
        "schema_version": 1,
        "kind": "epplan-device-profile",
        "name": _name(device),
        "provenance": "measured",
        "source": _source(device),
        **tables,
        "memory": _time_memory(sizes, device, timer),
        "launch": _time_launches(device, timer),
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()


def _source(device: torch.device) -> str:
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return (
        f"python3 -m epplan.runtime.calibrate on one {_name(device) or 'CPU'}, torch "
        f"{torch.__version__}{cuda}, {datetime.now(UTC).date().isoformat()}"
    )


def _heat(device: torch.device, seconds: float) -> None:
    """Run large products until the device is as warm as in service."""
    if device.type != "cuda":
        return
    square = torch.randn(8192, 8192, device=device, dtype=torch.float16)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            square @ square
        synchronize(device)


def _weights(shape: tuple[int, int], dtype: str, device: torch.device) -> Tensor:
    weights: Tensor = torch.randn(shape, device=device, dtype=_DTYPES[dtype])
    return weights * float(shape[1] ** -0.5)


def _pool_size(matrix_bytes: int) -> int:
    return max(1, min(32, -(-POOL_BYTES // matrix_bytes)))


def _time_mlp(of: Mlp, rows: tuple[int, ...], device: torch.device, timer: Timer) -> dict[str, Any]:
    up, down = (of.ffn, of.hidden), (of.hidden, of.ffn)
    one = MlpWeights(
        gate_FH=_weights(up, of.dtype, device) if of.gated else None,
        up_FH=_weights(up, of.dtype, device),
        down_HF=_weights(down, of.dtype, device),
    )
    matrices = [m for m in (one.gate_FH, one.up_FH, one.down_HF) if m is not None]
    count = _pool_size(sum(matrix.nbytes for matrix in matrices))
    pool = [one] + [
        MlpWeights(
            gate_FH=None if one.gate_FH is None else one.gate_FH.clone(),
            up_FH=one.up_FH.clone(),
            down_HF=one.down_HF.clone(),
        )
        for _ in range(count - 1)
    ]

    def work(x_RH: Tensor) -> None:
        for weights in pool:
            mlp(x_RH, weights)

    seconds = _by_rows(rows, of.hidden, of.dtype, device, timer, work, count)
    return {
        "hidden": of.hidden,
        "ffn": of.ffn,
        "gated": of.gated,
        "dtype": of.dtype,
        "rows": list(rows),
        "seconds": seconds,
    }


def _time_linear(
    of: tuple[int, int, str], rows: tuple[int, ...], device: torch.device, timer: Timer
) -> dict[str, Any]:
    size_in, size_out, dtype = of
    one = _weights((size_out, size_in), dtype, device)
    pool = [one, *(one.clone() for _ in range(_pool_size(one.nbytes) - 1))]

    def work(x_RH: Tensor) -> None:
        for weight in pool:
            F.linear(x_RH, weight)

    seconds = _by_rows(rows, size_in, dtype, device, timer, work, len(pool))
    return {
        "size_in": size_in,
        "size_out": size_out,
        "dtype": dtype,
        "rows": list(rows),
        "seconds": seconds,
    }


def _by_rows(
    rows: tuple[int, ...],
    size_in: int,
    dtype: str,
    device: torch.device,
    timer: Timer,
    work: Callable[[Tensor], None],
    count: int,
) -> list[float]:
    """Return seconds of one of `count` equal pieces of `work` for each number of rows."""
    seconds = []
    for number in reversed(rows):  # largest first, while the device is warm
        x_RH = torch.randn(number, size_in, device=device, dtype=_DTYPES[dtype])

        def run(x_RH: Tensor = x_RH) -> None:
            work(x_RH)

        seconds.append(_rounded(timer(run) / count))
    return seconds[::-1]


def _time_prefill(
    of: Heads, contexts: tuple[int, ...], device: torch.device, timer: Timer
) -> dict[str, Any]:
    """Time causal attention of one sequence over itself, as the runtime computes it."""
    seconds = []
    for context in contexts:
        query = torch.randn(1, of.query, context, of.dim, device=device, dtype=_DTYPES[of.dtype])
        key = torch.randn(1, of.kv, context, of.dim, device=device, dtype=_DTYPES[of.dtype])

        def run(query: Tensor = query, key: Tensor = key) -> None:
            F.scaled_dot_product_attention(
                query, key, key, is_causal=True, enable_gqa=of.query != of.kv
            )

        seconds.append(_rounded(timer(run)))
    return {**_heads(of), "context": list(contexts), "seconds": seconds}


def _heads(of: Heads) -> dict[str, Any]:
    return {"num_heads": of.query, "num_kv_heads": of.kv, "head_dim": of.dim, "dtype": of.dtype}


def _time_decode(
    of: Heads, points: tuple[tuple[int, int], ...], device: torch.device, timer: Timer
) -> dict[str, Any]:
    """Time one new token of every sequence against its cache, the better of two ways."""
    rows = []
    for sequences, context in points:
        cache = (sequences, of.kv, context, of.dim)
        key, value = (torch.zeros(cache, device=device, dtype=_DTYPES[of.dtype]) for _ in "kv")
        count = _pool_size(2 * key.nbytes)
        pool = [(key, value), *((key.clone(), value.clone()) for _ in range(count - 1))]
        query = torch.randn(sequences, of.query, 1, of.dim, device=device, dtype=_DTYPES[of.dtype])

        def sdpa(query: Tensor = query, pool: _Pool = pool) -> None:
            for key, value in pool:
                F.scaled_dot_product_attention(query, key, value, enable_gqa=of.query != of.kv)

        def products(query: Tensor = query, pool: _Pool = pool) -> None:
            for key, value in pool:
                decode_by_products(query, key, value)

        ways = {"sdpa": sdpa, "products": products}
        times = {name: timer(way) / count for name, way in ways.items()}
        best = min(times, key=times.__getitem__)
        rows.append(
            {
                "sequences": sequences,
                "context": context,
                "seconds": _rounded(times[best]),
                "way": best,
            }
        )
    return {**_heads(of), "points": rows}


def decode_by_products(query_BQ1D: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
    """Return attention of one position over a cache by two batched matrix products."""
    grouped = torch.unflatten(query_BQ1D.squeeze(2), 1, (key_BGSD.shape[1], -1))
    scores = grouped @ key_BGSD.transpose(-1, -2) * float(query_BQ1D.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ value_BGSD).flatten(1, 2).unsqueeze(2)


def _time_memory(sizes: Sizes, device: torch.device, timer: Timer) -> dict[str, Any]:
    source = torch.zeros(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source))
    read = timer(lambda: source.sum())
    permuted = []
    for rows in sizes.permute:
        x_RH = torch.zeros(rows, 8192, device=device, dtype=torch.float16)
        index = torch.randperm(rows, device=device)

        def permute(x_RH: Tensor = x_RH, index: Tensor = index) -> None:
            x_RH[index]

        seconds = timer(permute)
        permuted.append({"rows": rows, "row_bytes": 8192 * 2, "seconds": _rounded(seconds)})
    x_RH = torch.zeros(max(sizes.permute), 8192, device=device, dtype=torch.float16)
    normed = timer(lambda: rms_norm(x_RH))
    return {
        "copy_bytes_per_s": _rounded(2 * source.nbytes / copied),  # read and written
        "read_bytes_per_s": _rounded(source.nbytes / read),
        "permute": permuted,
        "norm": {"rows": len(x_RH), "row_bytes": 8192 * 2, "seconds": _rounded(normed)},
    }


def _time_launches(device: torch.device, timer: Timer) -> dict[str, float]:
    x = torch.zeros(1, device=device)
    number = 100

    def work() -> None:
        for _ in range(number):
            x.add_(1.0)

    return {
        "eager_s": _rounded(timer.eager(work) / number),
        "graph_s": _rounded(timer(work) / number),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def profile_text(profile: dict[str, Any]) -> str:
    """Return the file: one table of a few lines each."""
    return "".join(_lines(profile))


def _lines(profile: dict[str, Any]) -> Iterator[str]:
    for name, value in profile.items():
        if isinstance(value, list):
            yield f"{name}:\n"
            for item in value:
                yield f"  - {_flow(item)}\n"
        else:
            yield f"{name}: {_flow(value)}\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return str(text).removesuffix("...\n").strip()


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The device profile (YAML).",
)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that everything runs.")
def main(output: Path, quick: bool) -> None:
    """Time the GPU at hand (the CPU where there is none) and write its profile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        click.echo("no GPU here: calibrating the CPU takes --quick sizes", err=True)
    sizes = QUICK if quick or device.type == "cpu" else Sizes()
    profile = calibrate(device, sizes, lambda line: click.echo(line, err=True))
    write_atomically(output, profile_text(profile))
    click.echo(f"wrote {output}", err=True)


if __name__ == "__main__":
    main()
