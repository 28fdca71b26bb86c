"""What would go wrong in a launch from this machine, found before it: pass, warn or fail.

Each check is a function of plain facts, so that it can be tried with facts of other machines; the
facts are gathered at the end of this file and in machine.py. GPUs are doctor_gpus.py's business.
"""

import ipaddress
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from epplan.planner.plan import Plan
from epplan.topologies.check_report import Level, Line, Report

from . import machine
from .doctor_gpus import gpu_lines
from .host_map import same_host

_GIB = 1 << 30
_MIN_SHM, _GOOD_SHM = 64 << 20, _GIB  # a container has 64 MiB unless told
_GOOD_FILES = 65536
_FILES_PER_RANK = 16  # sockets of gloo's mesh and NCCL's channels to one peer
_FILES = 512  # libraries, logs, pipes
_GOOD_LOCKED = 1 << 30
_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
_BROKEN_HIGHS = "1.14."
_OPTIMUM = 3  # of the small program


def examine(plan: Plan | None, target: str | None) -> Report:
    """Return the report on this machine.

    Args:
        plan: what is to be launched, if it is known already.
        target: how, if it is known already.
    """
    versions = machine.package_versions()
    name, addresses = machine.own_addresses()
    num_hosts = len({rank.host for rank in plan.ranks}) if plan else 1
    lines = [
        *check_packages(versions, must_run=plan is not None),
        *check_solver(),
        *check_launchers(machine.launcher_versions(), target),
        check_shared_memory(machine.free_bytes(Path("/dev/shm"))),
        check_open_files(machine.limit(resource.RLIMIT_NOFILE), plan.world_size if plan else 1),
        check_locked_memory(machine.limit(resource.RLIMIT_MEMLOCK), _has_rdma()),
        check_clock(machine.clock_source()),
        check_name(name, addresses, num_hosts),
        *check_variables(os.environ),
        *(check_plan_host(plan, name) if plan and target not in (None, "local") else ()),
        *gpu_lines(plan),
    ]
    return Report(lines=tuple(lines), not_checked=())


def check_packages(versions: Mapping[str, str | None], *, must_run: bool) -> Iterator[Line]:
    """Yield whether this environment can plan, and whether it can run."""
    for name in ("pulp", "networkx", "scipy"):
        if versions.get(name) is None:
            yield _line("fail", "packages", f"{name} is not installed", "pip install epplan")
    highs = versions.get("highspy")
    if highs is None or highs.startswith(_BROKEN_HIGHS):
        what = "is not installed" if highs is None else f"is {highs}, whose presolve is wrong"
        yield _line("fail", "packages", f"highspy {what}", "pip install 'highspy>=1.15.1'")
    if versions.get("torch") is None:
        level: Level = "fail" if must_run else "warn"
        message = "torch is not installed: plans can be made, not run"
        yield _line(level, "packages", message, "pip install 'epplan[runtime]'")
        return
    yield _line("pass", "packages", f"highspy {highs}, torch {versions['torch']}")


def check_solver() -> Iterator[Line]:
    """Yield whether the solver solves a small program with a known optimum."""
    remedy = "pip install --force-reinstall pulp highspy"
    try:
        value = _solve()
    except Exception as error:  # whatever is broken in it is what this check is to find
        message = f"does not solve: {type(error).__name__}: {error}"
        yield _line("fail", "solver", message, remedy)
        return
    is_right = abs(value + _OPTIMUM) < 1e-6
    message = f"PuLP and HiGHS find {-value:g} where {_OPTIMUM} is the optimum"
    yield _line("pass" if is_right else "fail", "solver", message, remedy)


def check_launchers(versions: Mapping[str, str | None], target: str | None) -> Iterator[Line]:
    """Yield the launchers that are here; only the one that is to be used has to be.

    Args:
        versions: name and version by program, None where it is not here.
        target: of `epplan launch`.
    """
    program, name = machine.PROGRAMS.get(target or "", (None, ""))
    if program is not None:
        found = versions[program]
        if found is None:
            message = f"--to {target} needs `{program}`, which is not here"
            remedy = "write the files with --dry-run, and start them where it is"
            yield _line("fail", "launchers", message, remedy)
        elif name not in found:
            message = f"--to {target} needs {name}'s `{program}`, and here it is {found}"
            yield _line("fail", "launchers", message, f"put {name} first in PATH")
    known = [f"{name} ({found})" for name, found in versions.items() if found is not None]
    missing = [name for name, found in versions.items() if found is None]
    text = f"here: {', '.join(known) or 'none'}; not here: {', '.join(missing) or 'none'}"
    yield _line("pass", "launchers", text)


def check_shared_memory(free: int | None) -> Line:
    """Return whether NCCL and gloo find room in /dev/shm."""
    remedy = "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory"
    if free is None:
        return _line("fail", "/dev/shm", "is not there", remedy)
    text = f"{free / _GIB:.2f} GiB free"
    if free <= _MIN_SHM:
        return _line("fail", "/dev/shm", f"{text}: NCCL needs more for several GPUs", remedy)
    return _line("warn" if free < _GOOD_SHM else "pass", "/dev/shm", text, remedy)


def check_open_files(limit: int | None, world_size: int) -> Line:
    """Return whether a rank may hold the sockets to all others."""
    needed = _FILES + _FILES_PER_RANK * world_size
    remedy = f"ulimit -n {max(needed, _GOOD_FILES)}, or LimitNOFILE= of the scheduler's service"
    text = "no limit" if limit is None else f"limit {limit}"
    if limit is not None and limit < needed:
        message = f"{text}; {world_size} ranks need about {needed}"
        return _line("fail", "open files", message, remedy)
    is_low = limit is not None and limit < min(_GOOD_FILES, 4 * needed)
    return _line("warn" if is_low else "pass", "open files", text, remedy)


def check_locked_memory(limit: int | None, has_rdma: bool) -> Line:
    """Return whether RDMA may register buffers, which locks them into memory."""
    text = "no limit" if limit is None else f"limit {limit >> 10} KiB"
    if has_rdma and limit is not None and limit < _GOOD_LOCKED:
        remedy = "ulimit -l unlimited, LimitMEMLOCK=infinity for slurmd, IPC_LOCK for containers"
        return _line("fail", "locked memory", f"{text}, and this host has RDMA devices", remedy)
    return _line("pass", "locked memory", text)


def check_clock(source: str | None) -> Line:
    """Return whether reading the time is cheap enough to time kernels with it."""
    if source is None or source in _CLOCKS:
        return _line("pass", "clock", source or "the kernel does not tell its source")
    message = f"{source} takes microseconds to read; measured times will be too long"
    return _line("warn", "clock", message, "boot with clocksource=tsc, or look why it is unstable")


def check_name(name: str, addresses: list[str], num_hosts: int) -> Line:
    """Return whether other hosts find this one by the name under which gloo announces it."""
    level: Level = "fail" if num_hosts > 1 else "warn"
    remedy = "give it in DNS or /etc/hosts, or name an interface in GLOO_SOCKET_IFNAME"
    if not addresses:
        return _line(level, "host name", f"{name} does not resolve", remedy)
    outside = [x for x in addresses if not ipaddress.ip_address(x.partition("%")[0]).is_loopback]
    if not outside:
        message = f"{name} is {', '.join(addresses)} here: other hosts would connect to themselves"
        return _line(level, "host name", message, remedy)
    return _line("pass", "host name", f"{name} is {', '.join(outside)}")


def check_variables(environment: Mapping[str, str]) -> Iterator[Line]:
    """Yield variables that are set and would spoil the run."""
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        message = "CUDA_DEVICE_MAX_CONNECTIONS=1 lines up all streams: nothing overlaps"
        yield _line("warn", "variables", message, "unset it; recipes for tensor parallelism set it")
    if environment.get("NCCL_P2P_DISABLE") == "1":
        message = "NCCL_P2P_DISABLE=1: GPUs of a host talk through shared memory, not NVLink"
        yield _line("warn", "variables", message, "unset it")
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        message = "CUDA_LAUNCH_BLOCKING=1 makes every kernel wait"
        yield _line("warn", "variables", message, "unset it")


def check_plan_host(plan: Plan, name: str) -> Iterator[Line]:
    """Yield whether this machine is one of the plan's; a login host need not be."""
    hosts = list(dict.fromkeys(rank.host for rank in plan.ranks))
    if any(same_host(host, name) for host in hosts):
        yield _line("pass", "plan", f"{name} is one of its {len(hosts)} hosts")
    else:
        remedy = "right on a login host; else --host-map FILE, or plan for this machine"
        yield _line("warn", "plan", f"{name} is none of its hosts {', '.join(hosts)}", remedy)


def _solve() -> float:
    """Return the optimum of a program of two binaries, of which one may be 1."""
    import pulp

    from epplan.planner.placement.highs import solve

    program = pulp.LpProblem("doctor", pulp.LpMinimize)
    x, y = (program.add_variable(name, cat="Binary") for name in "xy")
    program += -_OPTIMUM * x - 2 * y
    program += x + y <= 1
    return solve(program, start={"x": 0, "y": 0}, gap=0, time_limit_s=10, seed=0).bound


def _has_rdma() -> bool:
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _line(level: Level, check: str, message: str, remedy: str = "") -> Line:
    """Return a line; one that passed needs no remedy."""
    return Line(
        level=level,
        check=check,
        subject="this machine",
        message=message,
        remedy="" if level == "pass" else remedy,
    )
