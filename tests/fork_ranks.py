"""Run a function on N real ranks, forked: 16 of them start, run and stop in about a second.

The parent has imported torch, so a fork costs milliseconds where a fresh interpreter costs
seconds; only CUDA does not survive one, and its ranks are spawned. The first rank to fail is
reported with its traceback and the others are killed, also out of a collective that would wait for
ever.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

_TIMEOUT_S = 60.0


class RankError(Exception):
    """A rank failed; holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Return `function(rank, *arguments)` of all ranks, run in one gloo process group.

    Raises:
        RankError: of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        return fork_ranks(_with_gloo, world_size, world_size, store, function, arguments)


def fork_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = _TIMEOUT_S,
    method: Literal["fork", "spawn"] = "fork",
) -> list[Any]:
    """Return `function(rank, *arguments)` of all ranks, each in a process of its own.

    `timeout_s` is how long nobody may finish; `method` how processes start.

    Raises:
        RankError: of the first rank that failed.
    """
    context: Any = multiprocessing.get_context(method)  # the stub of their union has no Process
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(sender, function, rank, arguments))
            with warnings.catch_warnings():
                # From Python 3.12: the threads are BLAS's, which do not run while we fork.
                warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
                process.start()
            # Before the next fork: no other process may keep this end open after the rank's.
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        return _collect(receivers, timeout_s)
    finally:
        for started in processes:
            started.kill()
            started.join()
        for receiver in receivers:
            receiver.close()


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(receivers):
        waiting = [end for rank, end in enumerate(receivers) if rank not in values]
        ready = wait(waiting, timeout=timeout_s)
        if not ready:
            ranks = [rank for rank in range(len(receivers)) if rank not in values]
            raise RankError(f"ranks {ranks} still run after {timeout_s:.0f} s")
        for end in ready:
            assert isinstance(end, Connection)
            rank = receivers.index(end)
            try:
                done, value = pickle.loads(end.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if not done:
                raise RankError(f"rank {rank}: {value}")
            values[rank] = value
    return [values[rank] for rank in range(len(receivers))]


def _run(
    sender: Connection, function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        # Pickled here: multiprocessing would pass tensors by shared memory that ends with us.
        message = pickle.dumps((True, function(rank, *arguments)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # Stay: if our sockets closed, the others would fail too and hide the cause.
        signal.pause()
    sender.send_bytes(message)
    sender.close()
    os._exit(0)


def _with_gloo(
    rank: int,
    world_size: int,
    store: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    value = function(rank, *arguments)
    dist.destroy_process_group()
    return value
