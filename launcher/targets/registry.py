"""The targets by name; their modules are imported when one is chosen."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the names, and `epplan --help` stays fast
    from epplan.launcher.job import Job, Rendering

LOCAL = "local"
KUBERNETES = ("kubernetes", "kubeflow")
_RENDER = {
    "torchrun": "torchrun:render",
    "ssh": "ssh:render",
    "slurm": "slurm:render",
    "openmpi": "openmpi:render",
    "mpich": "mpich:render",
    "kubernetes": "kubernetes:render_jobset",
    "kubeflow": "kubernetes:render_trainjob",
}
TARGETS = (LOCAL, *_RENDER)


def render(job: "Job", target: str) -> "Rendering":
    """Return a job in a target's words: the job's own files, and the target's.

    Raises:
        InputError: the target cannot run this job.
    """
    module, _, name = _RENDER[target].partition(":")
    function: Callable[[Job], Rendering] = getattr(
        importlib.import_module(f"epplan.launcher.targets.{module}"), name
    )
    rendering = function(job)
    if target in KUBERNETES:  # its manifest holds them
        return rendering
    return replace(rendering, files=(*job.files, *rendering.files))
