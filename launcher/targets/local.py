"""All ranks on this machine, whatever hosts the plan names.

    epplan launch --Popen--> fork server (imports torch) --fork--> rank 0 ... rank N-1
         ^------------------- stdout and stderr of each rank, by pipes -----------'

This process only reads the pipes, passes signals on and reports.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from epplan.errors import EpplanError, RankFailedError
from epplan.launcher.forkserver import Job
from epplan.launcher.output import Emit, LinePump, RankOutput
from epplan.launcher.ranks import machine_environment, rank_environments
from epplan.launcher.request import LaunchRequest

LOOPBACK = "127.0.0.1"
# Below the ports the kernel hands out by itself: a rank that connects before rank 0 listens could
# be given the very port as its own, and would then be connected to itself.
PORTS = range(20000, 32000)
GRACE_S = 5.0
FORWARDED = (signal.SIGINT, signal.SIGTERM)
# Of a rank that runs while all others have given up waiting for it.
_STATES = {
    "stopped": "is stopped by a signal: the others waited for it in vain",
    "hangs": "hangs: the others waited for it in vain",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """How a run without failure ended: with the worker's result, or by a signal."""

    result: dict[str, Any] | None = None
    interrupted_by: signal.Signals | None = None


def run_local(request: LaunchRequest, emit: Emit, *, grace_s: float = GRACE_S) -> LocalRun:
    """Run all ranks to their end; to be called from the main thread, because it handles signals.

    Args:
        request: what to run.
        emit: receives what the ranks print, line by line.
        grace_s: how long ranks may take to end when asked to, before they are killed.

    Raises:
        RankFailedError: a rank failed; all others have been stopped.
        EpplanError: the ranks could not be started, or left no result.
    """
    reports: dict[str, Any] = {}

    def on_report(line: bytes) -> None:
        reports.update(json.loads(line))
        if "failed" in reports:
            emit(f"{_what_failed(request, reports)}; stopping all ranks".encode(), True)

    with closing(LinePump()) as pump:
        output = RankOutput(request.num_ranks, pump, emit)
        with _fork_server(request, output, grace_s) as (server, received):
            assert server.stdout is not None
            report_pipe = os.dup(server.stdout.fileno())
            pump.add(report_pipe, on_report)
            pump.run_until_closed(report_pipe)
    result = json.loads(reports["result"]) if "result" in reports else None
    if "failed" in reports:
        raise _rank_failed(request, reports, output.tail(reports["failed"]), result)
    if received:
        return LocalRun(interrupted_by=received[0])
    if server.returncode != 0:
        raise EpplanError(
            f"the ranks could not be run: the process that imports {request.module} "
            f"{_ended(server.returncode)}"
        )
    if result is None:
        raise EpplanError(f"all ranks ended well, but {request.module} left no result")
    return LocalRun(result=result)


@contextmanager
def _fork_server(
    request: LaunchRequest, output: RankOutput, grace_s: float
) -> Iterator[tuple[subprocess.Popen[bytes], list[signal.Signals]]]:
    """Start the fork server; pass SIGINT and SIGTERM on to it, and list those that came."""
    received: list[signal.Signals] = []

    def forward(signum: int, _: FrameType | None) -> None:
        received.append(signal.Signals(signum))
        server.send_signal(signum)

    # Blocked until somebody can handle them: here `forward`; there the fork server, which
    # inherits the mask and lifts it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        server = _start(request, output)
        handlers = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    finally:
        output.close_write_ends()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with server:
        try:
            _send_job(server, request, output, grace_s)
            yield server, received
        except BaseException:
            server.send_signal(signal.SIGHUP)  # end everything at once
            raise
        finally:
            server.wait()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def _start(request: LaunchRequest, output: RankOutput) -> subprocess.Popen[bytes]:
    environment = machine_environment(os.environ, request, num_cpus=len(os.sched_getaffinity(0)))
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from epplan.launcher.forkserver import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        pass_fds=[fd for outputs in output.write_ends for fd in outputs],
        start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
    )


def _send_job(
    server: subprocess.Popen[bytes], request: LaunchRequest, output: RankOutput, grace_s: float
) -> None:
    job = Job(
        module=request.module,
        arguments=request.worker_arguments(),
        environments=rank_environments(
            [request.num_ranks], master_address=LOOPBACK, master_port=free_port()
        ),
        outputs=output.write_ends,
        grace_s=grace_s,
    )
    assert server.stdin is not None
    with suppress(BrokenPipeError), server.stdin as stdin:  # its exit code tells why it is gone
        stdin.write(json.dumps(asdict(job)).encode() + b"\n")


def free_port() -> int:
    """Return a port of this machine that nobody has."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise EpplanError(f"no free port in {PORTS.start}..{PORTS.stop - 1}")


def _what_failed(request: LaunchRequest, reports: dict[str, Any]) -> str:
    rank = reports["failed"]
    ended = _STATES.get(reports.get("state", "")) or _ended(reports["code"])
    return f"rank {rank} ({request.place(rank)}) {ended}"


def _rank_failed(
    request: LaunchRequest,
    reports: dict[str, Any],
    tail: list[str],
    result: dict[str, Any] | None,
) -> RankFailedError:
    message = f"{_what_failed(request, reports)}; "
    if tail:
        message += "the last it wrote on stderr:\n" + "\n".join(f"    {line}" for line in tail)
    else:
        message += "it wrote nothing on stderr"
    code = reports["code"]
    hints = []
    if code == -signal.SIGKILL:
        hints.append("SIGKILL is often the kernel out of memory: look into `dmesg`")
    exit_code = code if code > 0 else 128 - code
    return RankFailedError(message, exit_code=exit_code, hints=hints, result=result)


def _ended(code: int) -> str:
    """Return how a process ended; a negative code is a signal."""
    if code >= 0:
        return f"exited with code {code}"
    names = {int(known): known.name for known in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"
