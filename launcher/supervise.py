"""Waiting for ranks, and ending them all when one fails or somebody says stop."""

import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from epplan.errors import PeerError

from .linux import is_stopped, signal_group

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# From the first rank that gave up waiting to the last: by then who has not given up is the cause.
SETTLE_S = 5.0


class FailureLog:
    """Memory shared with the ranks, where each notes when it failed and with which exit code.

    One failing rank breaks the collectives of all others within milliseconds, and exit statuses
    do not tell in which order processes ended; these notes do.
    """

    def __init__(self, num_ranks: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, 16 * num_ranks)).cast("q")

    def note(self, rank: int, code: int) -> None:
        """Note that `rank` fails now, to end with exit code `code`."""
        self._cells[2 * rank + 1] = code
        self._cells[2 * rank] = time.monotonic_ns()

    def failed_at(self, rank: int) -> int:
        """Return when `rank` failed, in nanoseconds; 0 if it noted nothing."""
        return self._cells[2 * rank]

    def code(self, rank: int) -> int:
        """Return the exit code `rank` noted."""
        return self._cells[2 * rank + 1]


class SignalPipe:
    """Makes stop signals and the end of children readable from a pipe."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end)
        for signum in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)

    def wait(self, timeout_s: float | None) -> list[signal.Signals]:
        """Return the stop signals that arrive within `timeout_s`; none after a child's end."""
        ready, _, _ = select.select([self._read_end], [], [], timeout_s)
        numbers = os.read(self._read_end, 4096) if ready else b""
        return [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let stop signals wait while the block runs."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        """Give all signals their default action, in a process forked while they were deferred.

        SIGINT too: a rank mostly waits inside a collective, where Python's own handler, which
        raises KeyboardInterrupt, would not get to run.
        """
        for signum in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self._read_end)
        os.close(self._write_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def supervise(
    leaders: list[int],
    failures: FailureLog,
    signals: SignalPipe,
    grace_s: float,
    report: Callable[[dict[str, Any]], None],
) -> list[int]:
    """Wait for all ranks; at the first failure or stop signal, end them.

    Args:
        leaders: process ids of the ranks, each the leader of a process group.
        failures: what failing ranks noted.
        signals: where stop signals and the end of ranks arrive.
        grace_s: how long ranks may take to end when asked to.
        report: told at once which rank failed first.

    Returns:
        The exit code of each rank, negative for a signal.
    """
    codes: dict[int, int] = {}
    deadline: float | None = None  # set once the ranks have been asked to end

    def stop(signum: signal.Signals) -> float:
        for rank, leader in enumerate(leaders):
            # A rank that has failed by itself is ending already, perhaps printing its traceback.
            if signum == signal.SIGKILL or not failures.failed_at(rank):
                signal_group(leader, signum)
                signal_group(leader, signal.SIGCONT)  # a stopped process would not even end
        return time.monotonic() + grace_s

    gave_up_at: float | None = None  # the first rank that waited for another in vain
    while True:
        _note_ended(leaders, codes)
        failed = {
            rank: codes.get(rank, failures.code(rank))
            for rank in range(len(leaders))
            if codes.get(rank) or failures.failed_at(rank)
        }
        if failed and deadline is None:
            gave_up_at = gave_up_at or time.monotonic()
            settled = len(failed | codes) == len(leaders) or _left(gave_up_at + SETTLE_S) == 0
            cause = _cause(leaders, failed, codes, failures, settled=settled)
            if cause is not None:
                report(cause)
                deadline = stop(signal.SIGTERM)
        if len(codes) == len(leaders):
            return [codes[rank] for rank in range(len(leaders))]
        patience = None
        if deadline is not None:
            patience = _left(deadline)
        elif gave_up_at is not None:
            patience = _left(gave_up_at + SETTLE_S)
        if deadline is not None and patience == 0.0:
            stop(signal.SIGKILL)
            patience = None
        for signum in signals.wait(patience):
            if signum == signal.SIGHUP or deadline is not None:  # gone, or asked a second time
                deadline = time.monotonic()
            else:
                deadline = stop(signum)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _note_ended(leaders: list[int], codes: dict[int, int]) -> None:
    """Add the exit codes of the ranks that have ended since.

    They stay zombies until all have ended: a group whose leader is not reaped keeps its number,
    so that no signal can reach a stranger.
    """
    for rank, leader in enumerate(leaders):
        if rank not in codes:
            ended = os.waitid(os.P_PID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                by_itself = ended.si_code == os.CLD_EXITED
                codes[rank] = ended.si_status if by_itself else -ended.si_status


def _cause(
    leaders: list[int],
    failed: dict[int, int],
    codes: dict[int, int],
    failures: FailureLog,
    *,
    settled: bool,
) -> dict[str, Any] | None:
    """Return which rank to report as the cause of the others' failures; None: not clear yet.

    A rank that was killed could note nothing, and its death is why the others fail: it sorts
    first, at time 0. A rank that gave up waiting is no cause; when only such have failed and the
    others have had time to, one that has not hangs.

    Args:
        leaders: process ids of the ranks.
        failed: exit codes by rank.
        codes: the same of all ranks that have ended, well or not.
        failures: what failing ranks noted.
        settled: whether no more failures are to be expected.
    """
    causes = [rank for rank, code in failed.items() if code != PeerError.exit_code]
    if causes:
        first = min(causes, key=failures.failed_at)
        return {"failed": first, "code": failed[first]}
    if not settled:
        return None
    hanging = [rank for rank in range(len(leaders)) if rank not in failed and rank not in codes]
    if not hanging:
        first = min(failed, key=failures.failed_at)
        return {"failed": first, "code": failed[first]}
    # A stopped one before one that merely computes for too long.
    rank = min(hanging, key=lambda rank: not is_stopped(leaders[rank]))
    state = "stopped" if is_stopped(leaders[rank]) else "hangs"
    return {"failed": rank, "code": PeerError.exit_code, "state": state}
