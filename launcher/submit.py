"""A rendered job: on disk, in words, and started."""

import os
import shutil
import sys
from typing import Any, NoReturn

from epplan.errors import InputError
from epplan.files import write_atomically
from epplan.quoting import shell

from .host_map import same_host
from .job import PLAN_FILE, Command, Job, Rendering


def write_job(job: Job, rendering: Rendering) -> None:
    """Write the job's files into its folder.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        job.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {job.output} cannot be made: {error.strerror}") from None
    for file in rendering.files:
        path = job.output / file.name
        write_atomically(path, file.text)
        if file.is_executable:
            path.chmod(path.stat().st_mode | 0o111)


def job_text(job: Job, rendering: Rendering) -> str:
    """Return all files and commands as a person reads them."""
    parts = []
    for file in rendering.files:
        text = file.text
        if file.name == PLAN_FILE:
            text = f"(a copy of {job.request.plan_path})\n"
        parts.append(f"==> {job.output / file.name}\n{text}")
    for command in rendering.commands:
        where = f"on {command.host}" if command.host else "here"
        parts.append(f"run {where}: {shell(*command.arguments)}")
    return "\n".join(parts)


def job_json(job: Job, rendering: Rendering) -> dict[str, Any]:
    """Return the job as JSON values."""
    return {
        "folder": str(job.output),
        "files": [
            {"name": file.name, "text": file.text, "executable": file.is_executable}
            for file in rendering.files
        ],
        "commands": [
            {"host": command.host, "arguments": list(command.arguments)}
            for command in rendering.commands
        ],
        "result": str(job.result) if job.result else None,
    }


def command_here(rendering: Rendering, this_host: str) -> Command:
    """Return the command this machine has to run.

    Raises:
        InputError: every command belongs to another host, or its program is not here.
    """
    for command in rendering.commands:
        if command.host is None or same_host(command.host, this_host):
            _check_program(command.arguments[0])
            return command
    hosts = ", ".join(str(command.host) for command in rendering.commands)
    raise InputError(
        f"this machine, {this_host}, is none of the plan's hosts: {hosts}",
        hints=[
            "run the same command on each of them, or the scripts that --dry-run writes",
            "or name renamed hosts with --host-map FILE",
        ],
    )


def _check_program(program: str) -> None:
    if shutil.which(program) is None:
        raise InputError(
            f"`{program}` is not on this machine",
            hints=["write the files with --dry-run, and run the command where it is"],
        )


def become(command: Command, *, stdout_to_stderr: bool) -> NoReturn:
    """Replace this process by a command: its output, signals and exit code are the job's."""
    sys.stdout.flush()
    sys.stderr.flush()
    if stdout_to_stderr:
        os.dup2(2, 1)
    os.execvp(command.arguments[0], command.arguments)
