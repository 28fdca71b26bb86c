"""Functions run side by side, each in one of a few Python processes.

Not multiprocessing: fork would copy the threads of a solver that has run here, and spawn would
import the caller's main module again, which a library must not ask of its callers.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from epplan.errors import EpplanError

Result = TypeVar("Result")

_PROGRAM = "from epplan.planner.processes import serve; serve()"


def run_in_processes(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], num_processes: int
) -> Iterator[tuple[int, Result]]:
    """Yield the number and result of every task, as they are ready.

    Args:
        function: importable by name; arguments and results are pickled.
        tasks: positional arguments; started in this order.
        num_processes: how many run at once.

    Raises:
        EpplanError: a process died.
    """
    waiting: SimpleQueue[int | None] = SimpleQueue()
    ready: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    for number in [*range(len(tasks)), *[None] * num_processes]:
        waiting.put(number)
    processes = [_start() for _ in range(num_processes)]
    threads = [
        Thread(target=_feed, args=(process, function, tasks, waiting, ready), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            number, result = ready.get()
            if isinstance(result, BaseException):
                raise EpplanError(f"a solver process failed: {result!r}")
            yield number, result
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def serve() -> None:
    """Run what arrives on stdin until it ends; what the functions print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)
        while True:
            try:
                function, task = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                result = function(*task)
            except Exception as error:
                result = error
            pickle.dump(result, results)
            results.flush()


def _start() -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _feed(
    process: "subprocess.Popen[bytes]",
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    waiting: "SimpleQueue[int | None]",
    ready: "SimpleQueue[tuple[int, Any]]",
) -> None:
    """Give one process a task after the other."""
    assert process.stdin is not None
    assert process.stdout is not None
    while (number := waiting.get()) is not None:
        try:
            pickle.dump((function, tasks[number]), process.stdin)
            process.stdin.flush()
            ready.put((number, pickle.load(process.stdout)))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            ready.put((number, error))
            return
