"""Ranks as real processes, run from the test process."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epplan.errors import EpplanError, RankFailedError
from epplan.launcher.targets.local import LocalRun
from tests.launch_modules.running import Launch


class Ranks(Launch):
    """A launch that this process runs."""

    monkeypatch: pytest.MonkeyPatch

    def go(self, *, grace_s: float = 5.0) -> LocalRun:
        """Run the ranks."""
        return self.run(self.monkeypatch, grace_s=grace_s)

    def fails(
        self,
        match: str | None = None,
        *,
        kind: type[EpplanError] = RankFailedError,
        grace_s: float = 5.0,
    ) -> EpplanError:
        """Run the ranks, and return the error that must come."""
        with pytest.raises(kind, match=match) as caught:
            self.go(grace_s=grace_s)
        return caught.value


MakeLaunch = Callable[[str, int], Ranks]


def open_descriptors() -> set[Path]:
    """Return the descriptors of this process."""
    return set(Path("/proc/self/fd").iterdir())


@pytest.fixture
def make_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLaunch]:
    """Launches of a test; afterwards no process, descriptor or temporary file is left."""
    descriptors = open_descriptors()
    launches: list[Ranks] = []

    def make(source: str, num_ranks: int) -> Ranks:
        launches.append(Ranks(tmp_path, source, num_ranks))
        launches[-1].monkeypatch = monkeypatch
        return launches[-1]

    yield make
    assert open_descriptors() == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    for launch in launches:
        launch.assert_nothing_left()


def test_every_rank_gets_the_contract(
    make_launch: MakeLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    launch = make_launch(
        """
def main(args):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR TORCHELASTIC_RUN_ID"
    print(*[os.environ.get(name) for name in names.split()], sys.argv[1], sys.stdin.read())
    print(os.environ["MASTER_PORT"], file=sys.stderr)
    assert os.getsid(0) == os.getpid() == os.getpgid(0)
    assert len(os.listdir("/proc/self/fd")) == 4, "stdin, stdout, stderr and the listing's own"
    write_result(args, {"ok": True})
""",
        3,
    )
    assert launch.go().result == {"ok": True}
    assert sorted(launch.lines) == [
        f"[rank {rank}] {rank} {rank} 3 3 0 127.0.0.1 None {launch.plan} ".encode()
        for rank in range(3)
    ]
    ports = {line.partition(b"] ")[2] for line in launch.error_lines}
    assert len(launch.error_lines) == 3
    assert len(ports) == 1


def test_lines_of_each_rank_stay_in_order(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    for number in range(500):
        print(number)
    os.write(1, b"\\xff" * 200_000 + b"\\nno end")
    write_result(args, {})
""",
        12,
    )
    launch.go()
    for rank in range(12):
        prefix = f"[rank {rank:>2}] ".encode()
        own = [line.removeprefix(prefix) for line in launch.lines if line.startswith(prefix)]
        assert own == [b"%d" % number for number in range(500)] + [b"\xff" * 200_000, b"no end"]


def test_lines_come_while_the_rank_runs(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    print("now")
    time.sleep(600)
""",
        1,
    )

    def fail(line: bytes, is_error: bool) -> None:
        raise BrokenPipeError(line)

    launch.emit = fail
    started = time.monotonic()
    with pytest.raises(BrokenPipeError, match="now"):  # which ends the ranks, too
        launch.go()
    assert time.monotonic() - started < 3


def test_the_worker_is_imported_once_for_sixteen_ranks(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
import torch
announce()
IMPORTED_BY = os.getpid()
print("noise of an import")
def main(args):
    announce()
    wait_for(17)
    assert os.getppid() == IMPORTED_BY
    write_result(args, {"sum": torch.ones(3).sum().item()})
""",
        16,
    )
    started = time.monotonic()
    assert launch.go().result == {"sum": 3.0}
    assert time.monotonic() - started < 15
    assert len(launch.pids()) == 17
    assert launch.lines == []


def test_first_failure_stops_the_others_and_shows_its_traceback(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    announce()
    wait_for(4)
    if rank() == 2:
        raise ValueError("boom")
    time.sleep(600)
""",
        4,
    )
    started = time.monotonic()
    error = launch.fails()
    assert time.monotonic() - started < 3
    assert error.exit_code == 1
    message = re.sub(r"line \d+", "line N", str(error))
    assert message == (
        "rank 2 (host a, GPU 2) exited with code 1; the last it wrote on stderr:\n"
        "    Traceback (most recent call last):\n"
        f'      File "{launch.program}", line N, in main\n'
        '        raise ValueError("boom")\n'
        "    ValueError: boom"
    )
    assert launch.error_lines[-1] == (
        b"rank 2 (host a, GPU 2) exited with code 1; stopping all ranks"
    )
    assert len(launch.pids()) == 4


@pytest.mark.parametrize(
    ("statement", "exit_code", "message"),
    [
        ("sys.exit(7)", 7, "exited with code 7; it wrote nothing on stderr"),
        ("os._exit(9)", 9, "exited with code 9; it wrote nothing on stderr"),
        ("sys.exit('why')", 1, "exited with code 1; the last it wrote on stderr:\n    why"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "was killed by SIGKILL; it wrote nothing on stderr\n"
            "hint: SIGKILL is often the kernel out of memory: look into `dmesg`",
        ),
    ],
)
def test_exit_code_is_the_ranks_own(
    make_launch: MakeLaunch, statement: str, exit_code: int, message: str
) -> None:
    launch = make_launch(f"def main(args):\n    {statement}\n", 1)
    error = launch.fails()
    assert error.exit_code == exit_code
    assert str(error) == f"rank 0 (host a, GPU 0) {message}"


def test_a_segmentation_fault_has_a_traceback_too(make_launch: MakeLaunch) -> None:
    launch = make_launch("def main(args):\n    os.kill(os.getpid(), signal.SIGSEGV)\n", 1)
    error = launch.fails(r"killed by SIGSEGV(.|\n)*in main")
    assert error.exit_code == 139


def test_the_cause_is_reported_not_its_consequences(make_launch: MakeLaunch) -> None:
    """All ranks fail at once; the one that was killed is why."""
    launch = make_launch(
        """
def main(args):
    announce()
    wait_for(8)
    if rank() == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    while not any("(zombie)" in Path(f"/proc/{pid.name}/status").read_text()
                  for pid in PIDS.iterdir()):
        pass
    raise ConnectionError("rank 5 is gone")
""",
        8,
    )
    launch.fails(r"rank 5 .* was killed by SIGKILL")


def test_a_rank_that_gave_up_waiting_is_not_the_cause(make_launch: MakeLaunch) -> None:
    """The followers fail first; the rank that was why says so a moment later."""
    launch = make_launch(
        """
def main(args):
    announce()
    wait_for(4)
    if rank() == 2:
        time.sleep(0.5)
        sys.exit("out of memory")
    sys.exit(7)
""",
        4,
    )
    error = launch.fails(r"^rank 2 .* code 1; (.|\n)* out of memory$")
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "is stopped by a signal"),
        ("time.sleep(600)", "hangs"),
    ],
)
def test_a_rank_that_hangs_is_the_cause(
    make_launch: MakeLaunch, statement: str, words: str
) -> None:
    launch = make_launch(
        f"""
import epplan.launcher.supervise
epplan.launcher.supervise.SETTLE_S = 0.5
def main(args):
    announce()
    wait_for(3)
    if rank() == 1:
        {statement}
    print("rank 1 does not answer", file=sys.stderr)
    sys.exit(7)
""",
        3,
    )
    started = time.monotonic()
    error = launch.fails(grace_s=0.5)
    assert time.monotonic() - started < 5
    assert str(error) == (
        f"rank 1 (host a, GPU 1) {words}: the others waited for it in vain; it wrote nothing on "
        "stderr"
    )
    assert error.exit_code == 7


def test_when_all_gave_up_the_first_one_is_named(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    time.sleep(0.2 * (rank() != 1))
    sys.exit(7)
""",
        3,
    )
    error = launch.fails(r"^rank 1 .* exited with code 7")
    assert error.exit_code == 7


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce()
    wait_for(2)
    if rank() == 0:
        sys.exit(3)
    time.sleep(600)
""",
        2,
    )
    started = time.monotonic()
    launch.fails("rank 0 ", grace_s=0.5)
    assert 0.5 < time.monotonic() - started < 3


def test_a_rank_may_use_the_grace_to_end_well(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def last_words(*_):
    print("saved")
    sys.exit(0)

def main(args):
    signal.signal(signal.SIGTERM, last_words)
    announce()
    wait_for(2)
    if rank() == 0:
        sys.exit(3)
    time.sleep(600)
""",
        2,
    )
    launch.fails("rank 0 ")
    assert launch.lines == [b"[rank 1] saved"]


@pytest.mark.parametrize("ending", ["sys.exit(3)", "write_result(args, {})"])
def test_grandchildren_are_gone_too(make_launch: MakeLaunch, ending: str) -> None:
    launch = make_launch(
        f"""
def main(args):
    for own_session in (False, True):
        announce(subprocess.Popen(["sleep", "600"], start_new_session=own_session).pid)
    {ending}
""",
        2,
    )
    if "exit" in ending:
        launch.fails()
    else:
        launch.go()
    assert len(launch.pids()) >= 2


def test_a_module_that_cannot_be_imported(
    make_launch: MakeLaunch, capfd: pytest.CaptureFixture[str]
) -> None:
    launch = make_launch("import no_such_module\n", 2)
    message = "could not be run: the process that imports rank_program exited with code 1"
    launch.fails(message, kind=EpplanError)
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_ranks_that_leave_no_result(make_launch: MakeLaunch) -> None:
    launch = make_launch("def main(args):\n    pass\n", 2)
    launch.fails("ended well, but rank_program left no result", kind=EpplanError)


def test_the_fork_server_killed_from_outside(make_launch: MakeLaunch) -> None:
    launch = make_launch(
        """
def main(args):
    announce()
    wait_for(3)
    if rank() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
""",
        3,
    )
    launch.fails("was killed by SIGKILL", kind=EpplanError)
    for folder in launch.temporary.iterdir():  # nobody was left to remove it
        folder.rmdir()
