"""From a request and the user's settings to a job: names, addresses, variables, files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import yaml

from epplan.planner.plan import plan_text

from .environment import common_variables, gpu_variables
from .host_map import read_host_map
from .job import PLAN_FILE, RESULT_FILE, File, Job, JobHost, Network
from .quoting import check_hosts, comment, label
from .request import LaunchRequest
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
    """

    output: Path
    host_map: Path | None
    master_address: str | None
    master_port: int
    python: str | None
    name: str | None
    image: str | None


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
        variables=(*common_variables(request), *network.variables),
        files=(*files, *network.files),
        image=settings.image,
        notes=network.notes,
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
