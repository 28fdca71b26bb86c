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
from contextlib import suppress
from functools import partial
from math import inf
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Event, Thread, Timer
from typing import Any, TypeVar

from epplan.errors import EpplanError

Result = TypeVar("Result")

_PROGRAM = "from epplan.planner.placement.processes import serve; serve()"


def run_in_processes(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    num_processes: int,
    limit_s: Callable[[int], float] = lambda number: inf,
) -> Iterator[tuple[int, Result]]:
    """Yield the number and result of every task, and results reported on the way, as they come.

    Args:
        function: importable by name; arguments and results are pickled. Called with a task's
            arguments and, last, a function that takes what is to be reported.
        tasks: positional arguments; started in this order.
        num_processes: how many run at once.
        limit_s: of a task's number, when it begins: seconds from when on it is ended; what it
            reported is all it yields.

    Raises:
        EpplanError: a process died.
    """
    waiting: SimpleQueue[int | None] = SimpleQueue()
    ready: SimpleQueue[tuple[int, str, Any]] = SimpleQueue()
    for number in [*range(len(tasks)), *[None] * num_processes]:
        waiting.put(number)
    workers = [_Worker() for _ in range(num_processes)]
    threads = [
        Thread(target=worker.feed, args=(function, tasks, waiting, ready, limit_s), daemon=True)
        for worker in workers
    ]
    try:
        for thread in threads:
            thread.start()
        left = len(tasks)
        while left:
            number, kind, result = ready.get()
            left -= kind != "reported"
            if isinstance(result, BaseException):
                raise EpplanError(f"a solver process failed: {result!r}")
            if kind != "ended":
                yield number, result
    finally:
        for worker in workers:
            worker.close()


def serve() -> None:
    """Run what arrives on stdin until it ends; what the functions print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)

        def send(kind: str, result: Any) -> None:
            pickle.dump((kind, result), results)
            results.flush()

        while True:
            try:
                function, task = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            send("begun", None)
            try:
                result = function(*task, partial(send, "reported"))
            except Exception as error:
                result = error
            send("done", result)


class _Worker:
    """One process, started again when a task had to be ended."""

    def __init__(self) -> None:
        self._process = _start()
        self._closed = False

    def feed(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        waiting: "SimpleQueue[int | None]",
        ready: "SimpleQueue[tuple[int, str, Any]]",
        limit_s: Callable[[int], float],
    ) -> None:
        """Give the process a task after the other."""
        while (number := waiting.get()) is not None and not self._closed:
            late = Event()
            timer = Timer(min(limit_s(number), TIMEOUT_MAX), _end, (self._process, late))
            timer.daemon = True
            failure = None
            try:
                for kind, result in self._results(function, tasks[number]):
                    if kind == "begun":
                        timer.start()
                    else:
                        ready.put((number, kind, result))
            except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
                failure = error
            timer.cancel()
            if timer.is_alive():
                timer.join()
            if late.is_set() and not self._closed:
                _close(self._process)
                self._process = _start()
            if failure is not None:
                ready.put((number, "ended", None if late.is_set() else failure))

    def _results(self, function: Callable[..., Any], task: tuple[Any, ...]) -> Iterator[Any]:
        """Yield kind and value of what the process sends for a task; the last kind is done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((function, task), self._process.stdin)
        self._process.stdin.flush()
        kind = ""
        while kind != "done":
            kind, result = pickle.load(self._process.stdout)
            yield kind, result

    def close(self) -> None:
        """End the process."""
        self._closed = True
        _close(self._process)


def _end(process: "subprocess.Popen[bytes]", late: Event) -> None:
    late.set()
    process.kill()


def _close(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # what a killed process did not read
            pipe.close()


def _start() -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
