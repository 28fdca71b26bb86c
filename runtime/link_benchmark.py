"""Times transfers between the ranks of a plan: every pair alone, then all to all.

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... \\
        python -m epplan.runtime.link_benchmark PLAN --result times.json

The same contract as the worker's: `epplan topo measure` starts it here, srun and torchrun start it
on several hosts. Pairs are timed one after the other, there and back, while all others wait, so
that a slow pair is slow by itself; all to all then shows what sharing costs. No number is
interpreted here.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor

from epplan.errors import EpplanError, InputError
from epplan.files import write_atomically
from epplan.planner.plan import Plan, read_plan

from .clock import synchronize
from .environment import Setting, choose_setting, num_local_ranks, read_environment

SMALLEST_BYTES = 4096
STEP = 8  # each size is that many times the one before
MAX_BYTES = {"gloo": 2 * 2**20, "nccl": 128 * 2**20}  # large enough to fill the link
MAX_BUFFER_BYTES = 512 * 2**20  # of one rank in all to all
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time; the same on all ranks."""

    backend: str
    max_bytes: int | None  # None: MAX_BYTES of the backend
    repeats: int

    def sizes(self, backend: str) -> list[int]:
        """Return the message sizes, smallest first."""
        sizes = [SMALLEST_BYTES]
        while sizes[-1] * STEP <= (self.max_bytes or MAX_BYTES[backend]):
            sizes.append(sizes[-1] * STEP)
        return sizes


def main(args: list[str] | None = None) -> None:
    """Run one rank; ends in SystemExit."""
    command.main(args=args, prog_name="python -m epplan.runtime.link_benchmark")


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["auto", "gloo", "nccl"]),
    default="auto",
    show_default=True,
    help="nccl between GPUs, gloo between CPUs; auto: nccl where every rank has a GPU.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(SMALLEST_BYTES),
    help="Of the largest message; by default 2 MiB with gloo and 128 MiB with nccl.",
)
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of every transfer."
)
@click.option("--result", type=click.Path(path_type=Path), help="File for rank 0's times, as JSON.")
def command(plan: Path, result: Path | None, **options: Any) -> None:
    """Time transfers between the ranks of PLAN, with torchrun's variables in the environment."""
    try:
        _run(plan, Options(**options), result)
    except EpplanError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _run(path: Path, options: Options, result: Path | None) -> None:
    environment = read_environment(os.environ)
    plan = read_plan(path)
    if plan.world_size != environment.world_size:
        raise InputError(
            f"plan {path} is for {plan.world_size} ranks, WORLD_SIZE is {environment.world_size}"
        )
    local_ranks = num_local_ranks(environment, plan)
    setting = choose_setting(options.backend, plan.model, environment.local_rank, local_ranks)
    device = setting.device if setting.device.type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        setting.backend,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=_TIMEOUT,
        device_id=device,
    )
    times = time_links(plan, options, setting, environment.rank)
    dist.destroy_process_group()
    if times is not None and result is not None:
        write_atomically(result, json.dumps(times, indent=1) + "\n")


def time_links(plan: Plan, options: Options, setting: Setting, rank: int) -> dict[str, Any] | None:
    """Return all times on rank 0, None on the others; a collective."""
    sizes = options.sizes(setting.backend)
    pairs = _time_pairs(sizes, options.repeats, setting.device, rank, plan.world_size)
    exchange = _time_all_to_all(sizes, options.repeats, setting.device, plan.world_size)
    own = {"machine": socket.gethostname(), "pairs": pairs, "all_to_all": exchange}
    everyone: list[dict[str, Any]] = [{}] * plan.world_size
    dist.all_gather_object(everyone, own)
    if rank != 0:
        return None
    cuda = setting.device.type == "cuda"
    return {
        "schema_version": 1,
        "kind": "epplan-link-times",
        "backend": setting.backend,
        "backend_reason": setting.backend_reason,
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "repeats": options.repeats,
        "ranks": [
            {"host": planned.host, "gpu_index": planned.gpu_index, "machine": rank["machine"]}
            for planned, rank in zip(plan.ranks, everyone, strict=True)
        ],
        "pairs": [row for rank in everyone for row in rank["pairs"]],
        "all_to_all": [
            {"bytes": rows[0]["bytes"], "seconds": max(row["seconds"] for row in rows)}
            for rows in zip(*(rank["all_to_all"] for rank in everyone), strict=True)
        ],
    }


def _time_pairs(
    sizes: list[int], repeats: int, device: torch.device, rank: int, world_size: int
) -> list[dict[str, Any]]:
    """Return the times of the pairs whose first rank this is, one way."""
    rows: list[dict[str, Any]] = []
    for first, second in combinations(range(world_size), 2):
        dist.barrier()  # one pair at a time
        if rank not in (first, second):
            continue
        for size in sizes:
            message = torch.zeros(size, dtype=torch.uint8, device=device)
            step = partial(_there_and_back, message, rank == first, first, second)
            # The best: whatever else this machine does can only add time.
            seconds = min(_seconds(step, repeats, device))
            if rank == first:
                rows.append({"ranks": [first, second], "bytes": size, "seconds": seconds / 2})
    return rows


def _there_and_back(message: Tensor, is_first: bool, first: int, second: int) -> None:
    ways = [(dist.isend, second), (dist.irecv, second)]
    if not is_first:
        ways = [(dist.irecv, first), (dist.isend, first)]
    for way, peer in ways:
        # In a batch, because NCCL makes a communicator of its own for every pair otherwise.
        for work in dist.batch_isend_irecv([dist.P2POp(way, message, peer)]):
            work.wait()


def _time_all_to_all(
    sizes: list[int], repeats: int, device: torch.device, world_size: int
) -> list[dict[str, Any]]:
    """Return this rank's times by the bytes it sends to others; nothing for a single rank.

    Every peer gets a message of the size; sizes that would need too much memory are left out.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        if world_size == 1 or size * world_size > MAX_BUFFER_BYTES:
            continue
        sent = torch.zeros(size * world_size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        dist.barrier()
        step = partial(dist.all_to_all_single, received, sent)
        seconds = median(_seconds(step, repeats, device))
        rows.append({"bytes": size * (world_size - 1), "seconds": seconds})
    return rows


def _seconds(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the times of a step, after one to warm up; on a GPU the device's."""
    step()
    if device.type == "cuda":
        return _device_seconds(step, repeats, device)
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return times


def _device_seconds(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the device's times of a step.

    In a model the host is ahead of the device, so the time it takes to launch a transfer does not
    count. Here a matrix product keeps the device busy until all is queued; the first step then
    waits for the other ranks, and every further one begins on all of them when the last has ended.
    """
    busy = torch.ones(8192, 8192, device=device, dtype=torch.float16)
    for _ in range(1 + repeats // 16):  # a millisecond or two each
        torch.mm(busy, busy)
    marks = []
    for _ in range(repeats + 1):
        step()
        marks.append(torch.Event(device=device, enable_timing=True))
        marks[-1].record()
    synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


if __name__ == "__main__":
    main()
