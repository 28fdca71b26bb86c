"""Signals to `epplan launch` in a process of its own."""

import signal
import time
from pathlib import Path

import pytest

from tests.launch_modules.running import SLEEP_FOR_EVER, Launch, alive, finish, wait_until

# Two sleeping processes for every rank: the rank, and its child in a session of its own.
SLEEP_WITH_CHILD = """
def main(args):
    announce(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    announce()
    time.sleep(600)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_ranks(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    launch = Launch(tmp_path, SLEEP_WITH_CHILD, 3)
    process = launch.start("--json")
    launch.wait_until_running(6)
    process.send_signal(signum)
    started = time.monotonic()
    exit_code, stdout, stderr = finish(process)
    assert time.monotonic() - started < 3
    assert (exit_code, stdout) == (code, "")
    assert stderr.endswith(f"stopped by {signum.name}; no rank is left\n")
    assert "Traceback" not in stderr
    launch.assert_nothing_left()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ranks_get_the_very_signal(tmp_path: Path, signum: signal.Signals) -> None:
    launch = Launch(
        tmp_path,
        """
def say(signum, _):
    print("got", signal.Signals(signum).name)
    sys.exit(0)

def main(args):
    signal.signal(signal.SIGINT, say)
    signal.signal(signal.SIGTERM, say)
    announce()
    time.sleep(600)
""",
        2,
    )
    process = launch.start()
    launch.wait_until_running(2)
    process.send_signal(signum)
    exit_code, stdout, _ = finish(process)
    assert exit_code == 128 + signum
    assert sorted(stdout.splitlines()) == [
        f"[rank 0] got {signum.name}",
        f"[rank 1] got {signum.name}",
    ]


STUBBORN = """
def main(args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    announce()
    time.sleep(600)
"""


def test_a_rank_that_ignores_the_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    launch = Launch(tmp_path, STUBBORN, 2)
    process = launch.start(grace_s=0.5)
    launch.wait_until_running(2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert 0.5 <= time.monotonic() - started < 3
    launch.assert_nothing_left()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    launch = Launch(tmp_path, STUBBORN, 2)
    process = launch.start(grace_s=60)
    launch.wait_until_running(2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert len([pid for pid in launch.pids() if alive(pid)]) == 2
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert time.monotonic() - started < 3
    launch.assert_nothing_left()


def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    launch = Launch(tmp_path, SLEEP_WITH_CHILD, 3)
    process = launch.start(grace_s=60)
    launch.wait_until_running(6)
    process.kill()
    wait_until(lambda: not any(alive(pid) for pid in launch.pids()), timeout_s=1)
    wait_until(lambda: not list(launch.temporary.iterdir()), timeout_s=1)
    process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_the_worker_is_imported(tmp_path: Path, signum: signal.Signals) -> None:
    launch = Launch(tmp_path, "announce()\ntime.sleep(600)\n", 2)
    process = launch.start()
    launch.wait_until_running(1)
    process.send_signal(signum)
    exit_code, _, stderr = finish(process)
    assert exit_code == (-9 if signum == signal.SIGKILL else 128 + signum)
    assert "Traceback" not in stderr
    launch.assert_nothing_left()


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1])
def test_a_signal_at_any_moment(tmp_path: Path, delay_s: float) -> None:
    """Wherever in its start a launch is hit, it ends with 130 and leaves nothing."""
    launch = Launch(tmp_path, SLEEP_FOR_EVER, 4)
    process = launch.start()
    assert process.stderr is not None
    process.stderr.readline()  # the title; from here on, processes are started
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    exit_code, _, stderr = finish(process)
    assert exit_code == 130, stderr
    assert "Traceback" not in stderr
    launch.assert_nothing_left()
