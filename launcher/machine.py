"""Facts about this machine and what is installed on it, for `epplan doctor` and `epplan env`.

Everything is asked of the thing itself, and what cannot be asked is None: nothing here raises.
"""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

PACKAGES = (
    *("click", "highspy", "networkx", "numpy", "nvidia-ml-py", "pulp", "pydantic", "pyyaml"),
    *("rich", "scipy", "torch", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
# Programs that start jobs, and how each tells its version.
_LAUNCHERS = {
    "ssh": ("-V",),
    "sbatch": ("--version",),
    "mpirun": ("--version",),
    "mpiexec.hydra": ("--version",),
    "kubectl": ("version", "--client"),
}
# What each target starts, and whose it has to be: several MPIs bring a program of the same name.
PROGRAMS = {
    "ssh": ("ssh", ""),
    "slurm": ("sbatch", ""),
    "openmpi": ("mpirun", "Open MPI"),
    "mpich": ("mpiexec.hydra", ""),
    "kubernetes": ("kubectl", ""),
    "kubeflow": ("kubectl", ""),
}
_NAMES = (
    ("Open MPI", re.compile("Open MPI|OpenRTE")),
    ("Intel MPI", re.compile(r"Intel\(R\) MPI")),
    ("Hydra", re.compile("HYDRA")),
)
# What changes how ranks run. Names, so that nothing secret is copied into a bug report.
_VARIABLES = re.compile(
    r"(CUDA|NCCL|TORCH|TORCHELASTIC|GLOO|OMP|MKL|UCX|FI|OMPI|PMIX|I_MPI|EPPLAN)_[A-Z0-9_]+"
    r"|SLURM_(CONF|JOB_ID|NTASKS|NNODES|NODELIST)|LD_LIBRARY_PATH|PYTHONPATH"
)
_VERSION = re.compile(r"\d+\.\d+[\w.\-+]*")
_TIMEOUT_S = 5


def package_versions() -> dict[str, str | None]:
    """Return the version of every package that matters, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def launcher_versions() -> dict[str, str | None]:
    """Return name and version of every program that starts jobs, None where it is not here."""
    return {program: _launcher_version(program) for program in _LAUNCHERS}


def _launcher_version(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    command = [program, *_LAUNCHERS[program]]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"
    text = done.stdout + done.stderr
    found = _VERSION.search(text) if done.returncode == 0 else None
    if found is None:
        return "does not tell its version"
    names = [name for name, pattern in _NAMES if pattern.search(text)]
    return " ".join([*names, found[0]])


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change how ranks run, with the home folder as `~`."""
    home = environment.get("HOME", "")
    return {
        name: value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(environment.items())
        if _VARIABLES.fullmatch(name)
    }


def system() -> dict[str, str | int]:
    """Return what the machine is."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def free_bytes(folder: Path) -> int | None:
    """Return what is free in a file system."""
    try:
        facts = os.statvfs(folder)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def limit(number: int) -> int | None:
    """Return a soft limit of this process; None is no limit."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def clock_source() -> str | None:
    """Return what the kernel takes the time from."""
    path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    try:
        return path.read_text().strip()
    except OSError:
        return None


def own_addresses() -> tuple[str, list[str]]:
    """Return this host's name and the addresses it resolves to."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return name, []
    return name, list(dict.fromkeys(str(entry[4][0]) for entry in found))
