"""A Slurm cluster on this machine: munged, slurmctld and a slurmd per node, in a folder."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo")
GPUS = 4  # that Slurm believes each node to have
_START_S = 20.0
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n.spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
{nodes}
PartitionName=test Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def find_program(name: str) -> str | None:
    """Return the path of a program; daemons are often not on PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def slurm_cluster(folder: Path, nodes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Run a cluster with these nodes; yield the environment in which Slurm's commands reach it."""
    ports = _free_ports(1 + len(nodes))
    lines = [
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs=16 Gres=gpu:{GPUS} State=UNKNOWN"
        for name, port in zip(nodes, ports[1:], strict=True)
    ]
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=socket.gethostname(),
            port=ports[0],
            user=getpass.getuser(),
            folder=folder,
            nodes="\n".join(lines),
        )
    )
    for index in range(GPUS):  # where Slurm looks for devices
        (folder / f"gpu{index}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    with ExitStack() as stack:
        stack.enter_context(_daemon(folder, environment, _munged(folder)))
        _wait_for(lambda: (folder / "munge.socket").exists(), folder)
        stack.enter_context(_daemon(folder, environment, ["slurmctld", "-D"]))
        for name in nodes:
            stack.enter_context(_daemon(folder, environment, ["slurmd", "-D", "-N", name]))
        _wait_for(lambda: _idle_nodes(environment) == len(nodes), folder)
        yield environment


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    return ["munged", "-F", "--force", *(f"--{name}={path}" for name, path in files.items())]


@contextmanager
def _daemon(folder: Path, environment: dict[str, str], command: list[str]) -> Iterator[None]:
    program = find_program(command[0])
    assert program is not None
    with (folder / f"{command[0]}.out").open("ab") as output:
        process = subprocess.Popen(
            [program, *command[1:]], env=environment, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return len(done.stdout.split())


def _wait_for(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text(errors="replace")[-2000:] for path in folder.glob("*.out")]
            raise RuntimeError("Slurm did not start:\n" + "\n".join(logs))
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
