"""What one of N CPU ranks of this machine reaches: the figures of the profile `cpu-rank`.

    python benchmarks/cpu_ranks.py [--ranks 16]

All ranks work at once, as they do in `epplan launch --to local`. Prints one JSON line each for
matrix products, reading memory, and gloo's all-to-all with its fitted latency and bandwidth.
"""

import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
import torch.distributed as dist

ROUNDS = 7
SIZE = 512  # of the square matrices
READ_BYTES = 64 << 20  # beyond the caches
MESSAGE_BYTES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)  # one rank to one other


@click.command()
@click.option("--ranks", default=16, show_default=True, help="Processes that work at once.")
def main(ranks: int) -> None:
    """Measure and print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch is imported once
    processes = [context.Process(target=_rank, args=(rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _rank(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    machine = {"ranks": ranks, "cores": os.cpu_count(), "machine": platform.machine()}
    machine["torch"] = torch.__version__
    for line in (_matmul(), _read(), _all_to_all(ranks)):
        if rank == 0:
            click.echo(json.dumps({**line, **machine}))
    dist.destroy_process_group()


def _median_seconds(work: Callable[[], object]) -> float:
    """Return the median over rounds of the slowest rank's time."""
    times = []
    for _ in range(ROUNDS + 1):  # the first warms up
        dist.barrier()
        began = time.perf_counter()
        work()
        slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(slowest.item())
    return statistics.median(times[1:])


def _matmul() -> dict[str, object]:
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    seconds = _median_seconds(lambda: a @ b)
    return {"what": "matmul", "seconds": seconds, "gflop_per_s": 2 * SIZE**3 / seconds / 1e9}


def _read() -> dict[str, object]:
    data = torch.ones(READ_BYTES // 4)
    seconds = _median_seconds(data.sum)
    return {"what": "read", "seconds": seconds, "gb_per_s": READ_BYTES / seconds / 1e9}


def _all_to_all(ranks: int) -> dict[str, object]:
    """Fit t = latency + bytes sent by one rank / bandwidth."""
    sent, taken = [], []
    for message in MESSAGE_BYTES:
        buffer = torch.ones(ranks * message // 4)
        output = torch.empty_like(buffer)
        taken.append(_median_seconds(partial(dist.all_to_all_single, output, buffer)))
        sent.append((ranks - 1) * message)
    slope, latency = np.polyfit(sent, taken, 1, w=1 / np.array(taken))
    return {
        "what": "all_to_all",
        "bytes_sent": sent,
        "seconds": taken,
        "fit_latency_s": float(latency),
        "fit_gb_per_s": float(1 / slope / 1e9),
    }


if __name__ == "__main__":
    main()
