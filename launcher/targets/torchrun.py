"""torchrun with static rendezvous: one script per host, to be started on each of them.

The c10d rendezvous sorts hosts as text (node10 before node2) and ignores `--node-rank`; the static
one keeps it. Inside a host local rank i takes the i-th of CUDA_VISIBLE_DEVICES.
"""

from epplan.launcher.job import Command, Job, Rendering
from epplan.launcher.scripts import host_script


def render(job: Job) -> Rendering:
    """Return one script per host and the command that runs it there."""
    files = tuple(host_script(job, host, job.max_restarts) for host in job.hosts)
    commands = tuple(
        Command(arguments=("bash", job.path(file.name)), host=host.name)
        for host, file in zip(job.hosts, files, strict=True)
    )
    return Rendering(files=files, commands=commands)
