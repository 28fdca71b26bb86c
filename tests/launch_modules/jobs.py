"""Jobs for tests: rendered with fixed names, and run on hosts that are namespaces."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from epplan.launcher.build import Settings, build_job
from epplan.launcher.job import File, Job, Rendering
from epplan.launcher.request import LaunchRequest
from epplan.launcher.targets.registry import render
from epplan.planner.plan import Plan

MADE_BY = "epplan 0.1.0: epplan launch plan.json"
DEFAULTS = Settings(
    output=Path("/shared/job"),
    host_map=None,
    master_address=None,
    master_port=29500,
    python=None,
    name=None,
    image="registry/epplan:1",
    max_restarts=0,
    progress=None,
)

# ssh for tests: the command runs here, under the host's name. Hydra's ssh options take no values
# but for -o and -l.
SSH = """\
#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -[lop]) shift 2;; *) shift;; esac; done
host=$1; shift
exec unshare {options} --uts sh -c 'hostname "$0"; exec sh -c "$*"' "$host" "$@"
"""


def make_job(
    plan: Plan,
    target: str,
    *,
    options: Sequence[str] = (),
    module: str | None = None,
    environment: Sequence[tuple[str, str]] = (),
    topology: str | None = None,
    **settings: Any,
) -> Job:
    """Return a job as the command line would build it."""
    request = LaunchRequest(
        plan=plan,
        plan_path=Path("plan.json"),
        options=tuple(options),
        environment=tuple(environment),
    )
    if module is not None:
        request = replace(request, module=module)
    return build_job(
        request,
        target,
        replace(DEFAULTS, **settings),
        topology=topology,
        made_by=MADE_BY,
        this_python="/opt/venv/bin/python",
    )


def make_rendering(plan: Plan, target: str, **fields: Any) -> Rendering:
    """Return a job in a target's words."""
    return render(make_job(plan, target, **fields), target)


def files_of(plan: Plan, target: str, **fields: Any) -> dict[str, File]:
    """Return a job's files by name."""
    return {file.name: file for file in make_rendering(plan, target, **fields).files}


def write_ssh(folder: Path) -> Path:
    """Write a program that is called as ssh is, and return its path."""
    options = "" if os.getuid() == 0 else "--map-root-user"
    program = folder / "ssh"
    program.write_text(SSH.format(options=options))
    program.chmod(0o755)
    return program


def why_no_hosts() -> str | None:
    """Return why host names of one's own cannot be had here, or None if they can."""
    options = [] if os.getuid() == 0 else ["--map-root-user"]
    try:
        done = subprocess.run(
            ["unshare", *options, "--uts", "hostname", "other"], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        return str(error)
    return done.stderr if done.returncode else None
