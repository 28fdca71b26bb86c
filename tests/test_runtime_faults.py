"""Faults of real ranks: every rank ends in time, the cause is named, nothing is left."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from epplan.errors import EpplanError, InputError, PeerError, RankFailedError
from epplan.launcher.request import request_from_plan
from epplan.launcher.targets.local import free_port
from epplan.runtime.environment import RankEnvironment, Setting
from epplan.runtime.process_group import meet, process_group
from epplan.runtime.watchdog import Sign, blame
from tests.launch_modules.running import Launch

TIMEOUT_S = 3.0
# The worker itself, with a fault in one rank's third forward pass (the second timed step).
WORKER = """
import resource
import torch
from epplan.runtime import measure, worker
FORWARD = measure.ExpertParallelModel.forward

def fault(model):
    {fault}

def main(args):
    announce()
    passes = []
    def forward(model, *arguments, **options):
        passes.append(1)
        if len(passes) == 3 and rank() == {rank}:
            fault(model)
        return FORWARD(model, *arguments, **options)
    measure.ExpertParallelModel.forward = forward
    worker.main(["--backend=gloo", "--no-identity", "--timeout={timeout_s}", "--steps=4", *args])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # torch makes this folder when it is imported; it is none of the launch's files.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    yield tmp_path
    with pytest.raises(ChildProcessError):  # no child is left, dead or alive
        os.waitpid(-1, os.WNOHANG)


def failing_launch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    *,
    rank: int = 2,
    ranks: int = 4,
    timeout_s: float = TIMEOUT_S,
) -> tuple[RankFailedError, float]:
    """Run the worker with a fault; return the error, and the seconds from the fault to the end."""
    stamp = folder / "stamp"
    fault = f'Path("{stamp}").touch()\n    {fault}'
    launch = Launch(folder, WORKER.format(fault=fault, rank=rank, timeout_s=timeout_s), ranks)
    with pytest.raises(RankFailedError) as caught:
        launch.run(monkeypatch, grace_s=1.0)
    seconds = time.time() - stamp.stat().st_mtime
    assert len(launch.pids()) == ranks
    launch.assert_nothing_left()
    return caught.value, seconds


@pytest.mark.parametrize(("rank", "ranks"), [(0, 4), pytest.param(11, 16, marks=pytest.mark.slow)])
def test_a_killed_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int
) -> None:
    fault = "os.kill(os.getpid(), signal.SIGKILL)"
    error, seconds = failing_launch(
        folder, monkeypatch, fault, rank=rank, ranks=ranks, timeout_s=60
    )
    assert str(error).startswith(f"rank {rank} (host a, GPU {rank}) was killed by SIGKILL; ")
    assert error.exit_code == 128 + signal.SIGKILL
    assert seconds < 10  # nobody waits for the timeout when a connection breaks


@pytest.mark.slow
def test_a_stopped_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = 0  # the hardest: the store in which the others look stops with it
    fault = "os.kill(os.getpid(), signal.SIGSTOP)"
    error, seconds = failing_launch(folder, monkeypatch, fault, rank=rank)
    assert str(error).startswith(
        f"rank {rank} (host a, GPU {rank}) is stopped by a signal: the others waited for it in vain"
    )
    assert error.exit_code == 7
    assert TIMEOUT_S < seconds < TIMEOUT_S + 10


@pytest.mark.slow
def test_a_rank_that_hangs_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, seconds = failing_launch(folder, monkeypatch, "time.sleep(600)")
    assert re.match(
        r"rank 2 \(host a, GPU 2\) exited with code 1; the last it wrote on stderr:\n(.|\n)*"
        r"error: rank 2 hangs: it has been at step 2 for more than 3 s",
        str(error),
    ), error
    assert TIMEOUT_S < seconds < TIMEOUT_S + 10


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        # A real refusal of the kernel, through torch and through Python.
        (
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); torch.empty(1 << 40)",
            r".*can't allocate memory.*",
        ),
        pytest.param(
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); bytearray(1 << 40)",
            "MemoryError",
            marks=pytest.mark.slow,
        ),
        # What a GPU's allocator raises.
        ("raise torch.OutOfMemoryError('CUDA out of memory.')", r"CUDA out of memory\."),
    ],
)
def test_a_rank_out_of_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    error, seconds = failing_launch(folder, monkeypatch, fault)
    assert re.match(
        r"rank 2 \(host a, GPU 2\) exited with code 1; the last it wrote on stderr:\n(.|\n)*"
        rf"error: rank 2 ran out of memory at step 2: {reason}\n"
        r"    remedies:\n      1\. take fewer --sequences",
        str(error),
    ), error
    assert seconds < TIMEOUT_S


def test_a_bad_expert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks stop; the one that has the expert is named."""
    fault = "model.layers[0].feed_forward.experts[0].down_HF[0, 0] = float('nan')"
    error, seconds = failing_launch(folder, monkeypatch, fault)
    assert str(error).startswith("rank 2 (host a, GPU 2) exited with code 1; ")
    # The plan of `Launch` deals experts in reverse.
    assert "error: rank 2: outputs of expert 1 of layer 0 are not finite" in str(error)
    assert seconds < TIMEOUT_S


def test_any_other_error_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, _ = failing_launch(folder, monkeypatch, "raise ValueError('boom')", rank=3)
    assert str(error).startswith("rank 3 (host a, GPU 3) exited with code 1; ")
    assert str(error).endswith("ValueError: boom")


def test_a_restart_after_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a failed run is in the way of the next."""
    source = WORKER.format(fault="os.kill(os.getpid(), signal.SIGKILL)", rank=1, timeout_s=60)
    launch = Launch(folder, source, 4)
    with pytest.raises(RankFailedError):
        launch.run(monkeypatch, grace_s=1.0)
    launch.program.write_text(launch.program.read_text().replace("SIGKILL", "SIGCONT"))
    result = launch.run(monkeypatch).result
    assert result is not None
    assert result["verified"] is True


def test_an_edited_plan_starts_nothing(folder: Path) -> None:
    launch = Launch(folder, "def main(args):\n    announce()\n", 2)
    text = launch.plan.read_text()
    launch.plan.write_text(text.replace('"name": "tiny"', '"name": "tinier"'))
    with pytest.raises(InputError, match="was changed after it was made: its sha256 says"):
        request_from_plan(launch.plan)
    assert launch.pids() == []


# Ranks without a launcher: only what they find out themselves.

RANKS = 4
Ended = tuple[int | None, str]  # exit code (None: still there after the time), and its message


def run_ranks(folder: Path, fault: str, bad: int, within_s: float) -> list[Ended]:
    """Fork ranks that exchange until rank `bad` has its fault; those left are killed."""
    port = free_port()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, port, folder / str(rank), fault if rank == bad else "")
        pids.append(pid)
    deadline = time.monotonic() + within_s
    ended: dict[int, int | None] = {}
    ends_never = fault in ("stop", "absent")
    while len(ended) < RANKS - ends_never and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if rank not in ended and (done := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    for rank, pid in enumerate(pids):
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended[rank] = None
    messages = [folder / str(rank) for rank in range(RANKS)]
    return [
        (ended[rank], path.read_text() if path.exists() else "")
        for rank, path in enumerate(messages)
    ]


def be_rank(rank: int, port: int, message: Path, fault: str) -> None:
    """Exchange with the others for ever, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # c10d logs what it thinks of lost connections
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS)
    )
    torch.set_num_threads(1)
    place = RankEnvironment(
        rank=rank, local_rank=rank, world_size=RANKS, num_local_ranks=RANKS, restarts=0
    )
    setting = Setting(
        backend="gloo",
        backend_reason="asked for",
        device=torch.device("cpu"),
        dtype=torch.float32,
        notes=(),
    )
    code = 0
    try:
        if fault == "absent":
            time.sleep(600)
        store = meet(place, TIMEOUT_S)
        with process_group(place, setting, store, TIMEOUT_S) as watchdog:
            for step in range(1000):
                watchdog.at(f"step {step}")
                if step == 20 and fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == 20 and fault == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if step == 20 and fault == "error":
                    raise EpplanError("no more")
                if fault == "slow":
                    time.sleep(0.05 if step < 20 else 600)
                dist.all_to_all_single(torch.empty(RANKS), torch.ones(RANKS))
                time.sleep(0.02)
    except EpplanError as error:
        message.write_text(str(error))
        code = error.exit_code
    finally:
        os._exit(code)


def test_a_port_that_somebody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    place = RankEnvironment(rank=0, local_rank=0, world_size=2, num_local_ranks=2, restarts=0)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(PeerError) as caught:
            meet(place, TIMEOUT_S)
    assert caught.value.message == (
        f"rank 0: port {port}, where ranks are to meet, is in use on its host"
    )
    assert caught.value.hints == ("take another --master-port, or end the job that has it",)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("kill", -9, "does not respond: it was killed or stopped, or its host or the network"),
        ("stop", None, "does not respond: it was killed or stopped, or its host or the network"),
        ("error", 1, "failed: no more"),
        ("absent", None, "never started"),
    ],
)
def test_every_other_rank_ends_and_names_the_rank(
    tmp_path: Path, bad: int, fault: str, code: int | None, words: str
) -> None:
    ended = run_ranks(tmp_path, fault, bad, TIMEOUT_S + 8)
    assert ended[bad][0] == code
    for rank in set(range(RANKS)) - {bad}:
        assert ended[rank][0] == 7, ended
        first, *found = ended[rank][1].splitlines()
        if fault == "absent" and 0 in (rank, bad):  # there is no store to ask yet
            assert first.startswith(f"rank {rank}: ")
            assert "rank 0" in first or "some rank did not reach it" in first
            continue
        assert first.startswith(f"rank {rank} waited in vain at ")
        if bad:
            assert any(line.startswith(f"  - rank {bad} {words}") for line in found), ended
        else:  # with rank 0 the store is gone, too
            assert found[0].startswith("  - rank 0 "), ended


def test_blame() -> None:
    def sign(beat: int, progress: int, place: str = "step 3") -> Sign:
        return Sign(beat=beat, progress=progress, place=place)

    before = {0: sign(4, 9), 1: sign(4, 9), 2: sign(4, 9)}
    alive = {0: sign(6, 9), 1: sign(6, 9), 2: sign(7, 9)}
    assert blame(before, alive, 0, 3) == []
    assert blame(before, alive | {1: sign(4, 9)}, 0, 3) == [
        "rank 1 does not respond: it was killed or stopped, or its host or the network to it is "
        "gone; last at step 3"
    ]
    assert blame(before, alive | {2: sign(6, 8, "step 2")}, 0, 3) == [
        "rank 2 is behind: still at step 2"
    ]
    gone = alive | {1: sign(4, 9, "failed: no more"), 2: sign(4, 9)}
    assert blame(before, gone, 0, 3) == ["rank 1 failed: no more"]
    assert blame(before, alive | {2: sign(4, 9, "gave up: waited")}, 0, 3) == []
    assert blame(before, alive, 0, 4) == ["rank 3 never started"]
