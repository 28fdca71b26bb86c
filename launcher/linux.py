"""The Linux calls that keep a tree of processes together and that Python does not offer."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: signal.Signals, parent: int) -> None:
    """Have the kernel send this process `signum` when its parent ends, however it ends.

    Args:
        signum: the signal.
        parent: process id of the parent; if it is gone already, this process ends at once.
    """
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before the call above, which then watches the wrong one
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_children() -> None:
    """Kill and reap all children, and theirs as they are adopted, until none is left."""
    while children := _children(os.getpid()):
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def signal_group(leader: int, signum: signal.Signals) -> None:
    """Send `signum` to the process group of `leader`, a child that has not been reaped."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:  # forked a moment ago and not yet a group of its own
        os.kill(leader, signum)


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal (SIGSTOP, SIGTSTP) or a debugger."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # ended
        return False
    return stat.rpartition(b")")[2].split()[0] in (b"T", b"t")


def flush_c_streams() -> None:
    """Write out what C and C++ libraries have printed so far (NCCL's log among them)."""
    _libc.fflush(None)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _children(parent: int) -> list[int]:
    """Return the child processes of `parent`, ended ones included."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended between listing and reading
            # "PID (NAME) STATE PPID ...", where NAME may hold blanks and brackets
            after_name = stat.read_bytes().rpartition(b")")[2].split()
            if int(after_name[1]) == parent:
                children.append(int(stat.parent.name))
    return children
