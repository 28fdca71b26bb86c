"""Starting ranks again: which failures, how often, and from which step."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from epplan.errors import EpplanError, RankFailedError
from epplan.launcher.job import FINAL_ERROR_FILE, PROGRESS_FILE, Job
from epplan.launcher.restart import (
    FINAL_VARIABLE,
    final_error,
    note_final_error,
    progress_file,
    run_with_restarts,
)
from epplan.launcher.submit import write_job
from epplan.launcher.targets.registry import render
from tests.launch_modules.jobs import files_of, make_job
from tests.launch_modules.plans import uneven_plan
from tests.launch_modules.running import Launch, finish, wait_until


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


# --- jobs: a loop around the launcher, torchrun's own option, or the JobSet's ---------------------


@dataclass(frozen=True)
class LoopJob:
    """A job for MPICH whose mpiexec is a script of the test's."""

    job: Job
    folder: Path

    def start(self, mpiexec: str, **variables: str) -> "subprocess.Popen[str]":
        """Start the job's script; a line is added to `starts` before `mpiexec` runs."""
        program = self.folder / "mpiexec.hydra"
        program.write_text(f"#!/bin/bash\necho x >> {self.folder}/starts\n{mpiexec}\n")
        program.chmod(0o755)
        return subprocess.Popen(
            ["bash", str(self.job.output / "start.sh")],
            env={"PATH": f"{self.folder}:{os.environ['PATH']}", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, mpiexec: str, **variables: str) -> tuple[int, str]:
        """Return exit code and what was said."""
        process = self.start(mpiexec, **variables)
        _, said = process.communicate(timeout=20)
        return process.returncode, said

    def starts(self) -> int:
        """Return how often mpiexec was started."""
        path = self.folder / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def loop(tmp_path: Path) -> LoopJob:
    job = make_job(uneven_plan(), "mpich", output=tmp_path / "it's a $job", max_restarts=2)
    write_job(job, render(job, "mpich"))
    return LoopJob(job=job, folder=tmp_path)


def test_a_job_that_crashed_runs_again(loop: LoopJob) -> None:
    again = "the ranks ended with exit code 137; restart 1 of 2\n"
    assert loop.run(f"(( $(wc -l < {loop.folder}/starts) > 1 )) || exit 137") == (0, again)
    assert loop.starts() == 2


def test_restarts_of_a_job_end(loop: LoopJob) -> None:
    code, said = loop.run("exit 7")
    assert (code, said.count("restart"), loop.starts()) == (7, 2, 3)


def test_a_job_does_not_repeat_an_error_that_would_come_again(loop: LoopJob) -> None:
    # srun says 143 where one rank said 2 and it ended the others.
    assert loop.run("echo 2 > final-error; exit 143") == (2, "")
    assert loop.starts() == 1
    assert loop.run("exit 0") == (0, "")  # nothing is left of it
    assert not (loop.job.output / FINAL_ERROR_FILE).exists()


def test_a_new_start_of_a_job_forgets_its_own_progress(loop: LoopJob, tmp_path: Path) -> None:
    (loop.job.output / PROGRESS_FILE).touch()
    assert loop.run("exit 0")[0] == 0
    assert not (loop.job.output / PROGRESS_FILE).exists()
    (loop.job.output / PROGRESS_FILE).touch()
    assert (
        loop.run("exit 0", SLURM_RESTART_COUNT="1")[0] == 0
    )  # Slurm has put it in its queue again
    assert (loop.job.output / PROGRESS_FILE).exists()
    own = make_job(
        uneven_plan(), "mpich", output=tmp_path, max_restarts=2, progress=tmp_path / "own"
    )
    assert f"--progress={tmp_path}/own" in own.request.options
    assert own.forgotten == (tmp_path / FINAL_ERROR_FILE,)


def test_a_job_that_is_stopped_is_not_restarted(loop: LoopJob) -> None:
    process = loop.start("sleep 60 & trap 'kill $!; exit 9' TERM; wait")
    wait_until(lambda: loop.starts() == 1, timeout_s=10)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert loop.starts() == 1


def test_torchrun_restarts_its_ranks_itself() -> None:
    files = files_of(uneven_plan(), "torchrun", max_restarts=3)
    for number in range(2):
        text = files[f"host-{number}.sh"].text
        assert "--max-restarts=3 \\\n" in text
        assert "--progress=/shared/job/progress.json" in text
        assert f"export {FINAL_VARIABLE}=/shared/job/final-error" in text
    assert "rm -f /shared/job/final-error /shared/job/progress.json" in files["host-0.sh"].text
    assert "rm -f" not in files["host-1.sh"].text


@pytest.mark.parametrize(("target", "number"), [("kubernetes", 1), ("kubeflow", 1)])
def test_a_job_set_is_made_again(target: str, number: int) -> None:
    [file] = files_of(uneven_plan(), target, max_restarts=3).values()
    spec = list(yaml.safe_load_all(file.text))[number]["spec"]
    spec = spec["template"]["spec"] if target == "kubeflow" else spec
    assert spec["failurePolicy"] == {"maxRestarts": 3}
    assert "--max-restarts" not in file.text  # torchrun's would multiply them
    notes = make_job(uneven_plan(), target, max_restarts=3).notes
    assert any("begin with the first step" in note for note in notes)


def test_ranks_leave_errors_that_would_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_final_error(2)  # nobody asked
    monkeypatch.setenv(FINAL_VARIABLE, str(tmp_path / "final"))
    for code in (1, 7, 137):
        note_final_error(code)
        assert final_error() is None
    note_final_error(1, is_final=True)
    assert final_error() == 1
    note_final_error(3)
    assert final_error() == 3


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
    steps = 100
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
    arguments = ["--steps=100", "--sequence-length=8", f"--progress={progress}"]
    exit_code, _, stderr = finish(launch.start(*arguments))
    assert exit_code != 0
    assert "was killed by SIGKILL" in stderr
    done = json.loads(progress.read_text())["done"]
    exit_code, stdout, stderr = finish(launch.start(*arguments))
    assert exit_code == 0, stderr
    assert f"went on after {done} finished steps" in stdout
