"""From a request and the user's settings to a job: names, addresses, variables, files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import yaml

from epplan.planner.plan import plan_text
from epplan.quoting import comment

from .environment import Variable, common_variables, gpu_variables
from .host_map import read_host_map
from .job import (
    FINAL_ERROR_FILE,
    PLAN_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    File,
    Job,
    JobHost,
    Network,
)
from .quoting import check_hosts, label
from .request import LaunchRequest
from .restart import FINAL_VARIABLE
from .targets import kubernetes
from .targets.registry import KUBERNETES

HOST_MAP_FILE = "host-map.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user may choose beside the plan and the worker's options.

    Args:
        output: folder for the job's files.
        host_map: file that names renamed hosts.
        master_address: where rank 0 listens; by default its host's name.
        master_port: the port it listens on.
        python: the interpreter on the hosts; by default this one, in containers `python3`.
        name: of the job; by default the plan's.
        image: the container image.
        max_restarts: how often all ranks are started again after a crash.
        progress: the user's file of finished steps.
    """

    output: Path
    host_map: Path | None
    master_address: str | None
    master_port: int
    python: str | None
    name: str | None
    image: str | None
    max_restarts: int
    progress: Path | None


def build_job(
    request: LaunchRequest,
    target: str,
    settings: Settings,
    *,
    topology: str | None,
    made_by: str,
    this_python: str,
) -> Job:
    """Return the job a target renders.

    Args:
        request: plan and worker options.
        target: name of the target.
        settings: the user's.
        topology: SOURCE of the cluster, from which NICs are chosen and described to NCCL.
        made_by: version and command line.
        this_python: the interpreter that runs here.

    Raises:
        InputError: hosts that cannot be addressed, an invalid host map, a topology without them.
    """
    in_pods = target in KUBERNETES
    names = read_host_map(settings.host_map, request.hosts)
    check_hosts(names.values(), "the host map" if settings.host_map else "the plan")
    name = settings.name or label(request.plan_path.stem, kubernetes.MAX_NAME)
    output = settings.output.absolute()
    folder = kubernetes.FOLDER if in_pods else output
    files = [File(name=PLAN_FILE, text=plan_text(request.plan))]
    if settings.host_map is not None:
        renamed = {planned: real for planned, real in names.items() if planned != real}
        files.append(
            File(name=HOST_MAP_FILE, text=f"# {comment(made_by)}\n{yaml.safe_dump(renamed)}")
        )
        request = replace(
            request, options=(*request.options, f"--host-map={folder / HOST_MAP_FILE}")
        )
    progress, variables, forgotten = settings.progress, common_variables(request), []
    if settings.max_restarts and not in_pods:
        forgotten.append(folder / FINAL_ERROR_FILE)
        variables += (_final_error_variable(folder),)
        if progress is None:
            progress = folder / PROGRESS_FILE
            forgotten.append(progress)
    if progress is not None:
        request = replace(request, options=(*request.options, f"--progress={progress.absolute()}"))
    network = _network(request, topology, folder, made_by)
    default_address = kubernetes.master_address(name) if in_pods else names[request.hosts[0]]
    return Job(
        request=request,
        made_by=made_by,
        name=name,
        output=output,
        folder=folder,
        result=None if in_pods else output / RESULT_FILE,
        python=settings.python or ("python3" if in_pods else this_python),
        master_address=settings.master_address or default_address,
        master_port=settings.master_port,
        hosts=tuple(_hosts(request, names, network)),
        variables=(*variables, *network.variables),
        files=(*files, *network.files),
        image=settings.image,
        notes=(*network.notes, *_restart_notes(settings, in_pods)),
        max_restarts=settings.max_restarts,
        forgotten=tuple(forgotten),
    )


def _final_error_variable(folder: Path) -> Variable:
    return Variable(
        name=FINAL_VARIABLE,
        value=str(folder / FINAL_ERROR_FILE),
        reason="where a rank notes an error that a restart would not change",
        is_fixed=True,
    )


def _restart_notes(settings: Settings, in_pods: bool) -> tuple[str, ...]:
    if not settings.max_restarts or not in_pods or settings.progress is not None:
        return ()
    return (
        "restarted pods begin with the first step: give --progress FILE on a volume that the pods "
        "share",
    )


def _network(request: LaunchRequest, topology: str | None, folder: Path, made_by: str) -> Network:
    if topology is None or not request.uses_gpus:
        return Network(variables=(), of_host={}, files=(), notes=())
    from epplan.topologies.sources import load_cluster  # networkx, only where it is needed

    from .network import choose_network

    used: dict[str, set[str]] = {host: set() for host in request.hosts}
    for rank in request.plan.ranks:
        used[rank.host].update(rank.nics)
    return choose_network(load_cluster(topology), used, str(folder), made_by)


def _hosts(request: LaunchRequest, names: dict[str, str], network: Network) -> Sequence[JobHost]:
    hosts: list[JobHost] = []
    for planned, members in groupby(request.plan.ranks, key=lambda rank: rank.host):
        ranks = tuple(members)
        variables = gpu_variables(ranks) if request.uses_gpus else ()
        variables += network.of_host.get(planned, ())
        hosts.append(
            JobHost(index=len(hosts), name=names[planned], ranks=ranks, variables=variables)
        )
    return hosts
