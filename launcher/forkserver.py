"""The process between launcher and ranks: imports the worker once, forks the ranks, ends them.

Every rank needs torch, and importing it costs a second or more of CPU: 16 fresh interpreters on
2 cores take 23 s to start, while 16 forks of one process that has imported it take 0.05 s. This
process exists for that alone, so that the launcher stays small, without threads, and free to
answer signals; and it starts from nothing, so that no thread or lock of the launcher's caller is
forked. It never touches CUDA, which does not survive a fork.

No rank outlives it, and it does not outlive the launcher: SIGHUP, which the kernel sends when the
launcher is gone, ends everything at once; SIGINT and SIGTERM are passed on to the ranks, which
then have the grace period to end.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .linux import adopt_orphans, die_with_parent, kill_children, signal_group
from .rank_process import Main, run_rank
from .supervise import STOP_SIGNALS, FailureLog, SignalPipe, supervise


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the launcher asks for, as JSON on stdin."""

    module: str
    arguments: list[str]
    environments: list[dict[str, str]]  # of each rank
    outputs: list[tuple[int, int]]  # file descriptors for stdout and stderr of each rank
    grace_s: float  # between asking ranks to end and killing them


def main() -> None:
    """Run the job on stdin; `sys.argv[1]` is the launcher's process id.

    stdout carries one JSON object per line: `{"failed": RANK, "code": CODE}` as soon as a rank
    failed (a negative code is a signal; with `"state"` "stopped" or "hangs" if the others gave up
    waiting for it), `{"result": TEXT}` at the end, if there is one.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    die_with_parent(signal.SIGHUP, int(sys.argv[1]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher blocked them
    adopt_orphans()
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    with os.fdopen(os.dup(1), "w") as reports:
        os.dup2(2, 1)  # imports may print
        module = importlib.import_module(job.module)
        sys.argv = [str(module.__file__), *job.arguments]
        signals = SignalPipe()  # until here a stop signal ends this process
        with tempfile.TemporaryDirectory(prefix="epplan-") as folder:
            _run(job, module.main, Path(folder) / "result.json", signals, reports)


def _run(job: Job, main: Main, result: Path, signals: SignalPipe, reports: TextIO) -> None:
    def report(message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the launcher is gone, and SIGHUP is on its way
            reports.write(json.dumps(message) + "\n")
            reports.flush()

    arguments = [*job.arguments, "--result", str(result)]
    failures = FailureLog(len(job.environments))
    leaders: list[int] = []
    try:
        for leader in _fork_ranks(job, main, arguments, failures, signals, reports.fileno()):
            leaders.append(leader)
        supervise(leaders, failures, signals, job.grace_s, report)
    finally:
        for leader in leaders:
            signal_group(leader, signal.SIGKILL)  # what the ranks left running
        kill_children()
    if result.exists():
        report({"result": result.read_text(encoding="utf-8")})


def _fork_ranks(
    job: Job,
    main: Main,
    arguments: list[str],
    failures: FailureLog,
    signals: SignalPipe,
    report_fd: int,
) -> Iterator[int]:
    """Yield the process id of each rank, the leader of its own group."""
    parent = os.getpid()
    gc.freeze()  # keeps the collector's marks, and so copies, out of the pages all ranks share
    # Python 3.12 warns when it forks beside threads. numpy's BLAS is the one to have some by now,
    # and stops them around a fork by itself.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    pipes = [fd for outputs in job.outputs for fd in outputs]
    sys.stdout.flush()  # or every rank would print what is left in the buffer
    for environment, outputs in zip(job.environments, job.outputs, strict=True):
        with signals.deferred():  # the new process must not take one with this one's handlers
            leader = os.fork()
            if leader == 0:
                run_rank(
                    main,
                    arguments,
                    environment=environment,
                    outputs=outputs,
                    inherited_fds=[*pipes, report_fd],
                    parent=parent,
                    failures=failures,
                    signals=signals,
                )
        yield leader
    for fd in pipes:
        os.close(fd)
