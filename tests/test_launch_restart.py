"""Starting ranks again: which failures, how often, and from which step."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from epplan.errors import EpplanError, RankFailedError
from epplan.launcher.restart import progress_file, run_with_restarts
from tests.launch_modules.running import Launch, finish


def failing(*errors: EpplanError) -> Callable[[], str]:
    """Return a run that raises these errors, one a call, and then ends well."""
    left = list(errors)

    def run() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return run


def lost(code: int = -9, result: dict[str, bool] | None = None) -> RankFailedError:
    return RankFailedError(f"rank 3 ended ({code})\n  last words", exit_code=code, result=result)


def test_restarts_until_it_works() -> None:
    said: list[str] = []
    assert run_with_restarts(failing(lost(), lost(1)), 3, said.append) == "done"
    assert said == [
        "rank 3 ended (-9)\nrestart 1 of 3",
        "rank 3 ended (1)\nrestart 2 of 3",
    ]


def test_restarts_end() -> None:
    said: list[str] = []
    with pytest.raises(RankFailedError, match=r"ended \(1\)"):
        run_with_restarts(failing(lost(), lost(1)), 1, said.append)
    assert len(said) == 1
    with pytest.raises(RankFailedError):
        run_with_restarts(failing(lost()), 0, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "error",
    [lost(2), lost(3), lost(1, result={"verified": False}), EpplanError("no free port")],
    ids=["bad input", "infeasible", "differs from dense", "not a rank's"],
)
def test_what_would_come_again_is_not_restarted(error: EpplanError) -> None:
    with pytest.raises(type(error), match=re.escape(error.message)):
        run_with_restarts(failing(error), 5, lambda line: None)


def test_restarts_keep_progress_even_when_nobody_asked(tmp_path: Path) -> None:
    with progress_file(None, 0) as path:
        assert path is None
    with progress_file(tmp_path / "own", 3) as path:
        assert path == tmp_path / "own"
    with progress_file(None, 3) as path:
        assert path is not None
        assert path.parent.is_dir()
    assert not path.parent.exists()


DIES_ONCE = """
import threading
from epplan.runtime import worker

def die_after_two_steps(progress):
    while not progress.exists() or json.loads(progress.read_text())["done"] < 2:
        time.sleep(0.005)
    (Path(__file__).parent / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)

def main(args):
    (progress,) = [arg.partition("=")[2] for arg in args if arg.startswith("--progress=")]
    if rank() == 1 and not (Path(__file__).parent / "died").exists():
        threading.Thread(target=die_after_two_steps, args=[Path(progress)], daemon=True).start()
    worker.main(args)
"""


def test_a_killed_rank_costs_no_finished_step(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    launch = Launch(tmp_path, DIES_ONCE, 2)
    steps = 400
    exit_code, stdout, stderr = finish(
        launch.start("--json", "--max-restarts=1", f"--steps={steps}", "--sequence-length=8")
    )
    assert exit_code == 0, stderr
    assert "rank 1 (host a, GPU 1) was killed by SIGKILL" in stderr
    assert "restart 1 of 1" in stderr
    result = json.loads(stdout)
    assert result["verified"] is True
    (note,) = [note for note in result["notes"] if "finished steps" in note]
    finished = int(note.split()[3])
    assert finished >= 2
    assert result["steps"] == steps - finished
    launch.assert_nothing_left()


@pytest.mark.slow
def test_without_restarts_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    launch = Launch(tmp_path, DIES_ONCE, 2)
    progress = tmp_path / "progress.json"
    arguments = ["--steps=400", "--sequence-length=8", f"--progress={progress}"]
    exit_code, _, stderr = finish(launch.start(*arguments))
    assert exit_code != 0
    assert "was killed by SIGKILL" in stderr
    done = json.loads(progress.read_text())["done"]
    exit_code, stdout, stderr = finish(launch.start(*arguments))
    assert exit_code == 0, stderr
    assert f"went on after {done} finished steps" in stdout
