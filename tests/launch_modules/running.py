"""Real launches of small rank programs, inside the test process or in one of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from epplan.launcher.output import Emit
from epplan.launcher.request import request_from_plan
from epplan.launcher.targets.local import LocalRun, run_local

from .plans import write_ranks_plan

ROOT = Path(__file__).parents[2]
DRIVER = "tests.launch_modules.driver"
PROGRAM = "rank_program"
PRELUDE = """\
import json, os, signal, subprocess, sys, time
from pathlib import Path
PIDS = Path(__file__).parent / "pids"
def rank():
    return int(os.environ["RANK"])
def announce(pid=None):
    (PIDS / str(pid or os.getpid())).touch()
def wait_for(count):
    while len(list(PIDS.iterdir())) < count:
        time.sleep(0.01)
def write_result(args, value):
    if rank() == 0:
        Path(args[args.index("--result") + 1]).write_text(json.dumps(value))
"""
SLEEP_FOR_EVER = """
def main(args):
    announce()
    time.sleep(600)
"""


class Launch:
    """A plan, a rank program, and what became of them.

    The program's source follows `PRELUDE` and defines `main(args)`.
    """

    def __init__(self, folder: Path, source: str, num_ranks: int) -> None:
        self.folder = folder
        self.num_ranks = num_ranks
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "pids").mkdir()
        self.program = folder / f"{PROGRAM}.py"
        self.program.write_text(PRELUDE + source)
        self.plan = write_ranks_plan(folder / "plan.json", num_ranks)
        self.lines: list[bytes] = []
        self.error_lines: list[bytes] = []
        self.emit: Emit = self._collect

    def run(self, monkeypatch: pytest.MonkeyPatch, *, grace_s: float = 5.0) -> LocalRun:
        """Run the ranks from this process, and collect their lines."""
        monkeypatch.syspath_prepend(str(self.folder))
        monkeypatch.setenv("TMPDIR", str(self.temporary))
        request = request_from_plan(self.plan, module=PROGRAM)
        return run_local(request, self.emit, grace_s=grace_s)

    def start(self, *arguments: str, grace_s: float = 5.0) -> subprocess.Popen[bytes]:
        """Start `epplan launch` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", DRIVER, "launch", *arguments, "--", str(self.plan)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(self.folder),
                "TMPDIR": str(self.temporary),
                # Importing torch's compiler makes this folder, in TMPDIR unless told.
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
                "TEST_MODULE": PROGRAM,
                "TEST_GRACE_S": str(grace_s),
            },
        )

    def pids(self) -> list[int]:
        """Return the processes that have announced themselves."""
        return [int(entry.name) for entry in (self.folder / "pids").iterdir()]

    def wait_until_running(self, count: int) -> list[int]:
        """Return the processes, once `count` have announced themselves."""
        wait_until(lambda: len(self.pids()) >= count, timeout_s=20)
        return self.pids()

    def assert_nothing_left(self) -> None:
        """Check that no announced process lives and no temporary file exists."""
        wait_until(lambda: not [pid for pid in self.pids() if alive(pid)], timeout_s=1)
        assert not list(self.temporary.iterdir())

    def _collect(self, line: bytes, is_error: bool) -> None:
        (self.error_lines if is_error else self.lines).append(line)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a started launch, ended here if it hangs."""
    try:
        stdout, stderr = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
        raise AssertionError(f"launch hangs:\n{stderr.decode()}") from None
    return process.returncode, (stdout or b"").decode(), stderr.decode()


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie that nobody has reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Wait for a condition, and fail when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
