"""The environment of every rank: torchrun's contract, without its elastic agent."""

from collections.abc import Mapping, Sequence

from .environment import Variable, applied, common_variables, gpu_variables
from .request import LaunchRequest


def rank_environments(
    ranks_per_machine: Sequence[int], *, master_address: str, master_port: int
) -> list[dict[str, str]]:
    """Return each rank's own variables, in rank order.

    Args:
        ranks_per_machine: how many consecutive ranks each machine runs, [machines].
        master_address: where rank 0 listens.
        master_port: the port it listens on.
    """
    shared = {
        "WORLD_SIZE": str(sum(ranks_per_machine)),
        "GROUP_WORLD_SIZE": str(len(ranks_per_machine)),
        "MASTER_ADDR": master_address,
        "MASTER_PORT": str(master_port),
    }
    environments: list[dict[str, str]] = []
    for machine, num_ranks in enumerate(ranks_per_machine):
        for local_rank in range(num_ranks):
            own = {
                "RANK": str(len(environments)),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "GROUP_RANK": str(machine),
            }
            environments.append(own | shared)
    return environments


def machine_environment(
    inherited: Mapping[str, str], request: LaunchRequest, *, num_cpus: int
) -> dict[str, str]:
    """Return the variables all ranks of this machine share, when it runs the whole plan.

    Args:
        inherited: the launcher's own environment; what the user set there is kept.
        request: what is launched.
        num_cpus: CPUs the ranks share.
    """
    # An agent around the launcher (epplan inside torchrun) would make rank 0 look for the agent's
    # store instead of opening its own, and all ranks would wait for ever.
    variables = {
        name: value for name, value in inherited.items() if not name.startswith("TORCHELASTIC_")
    }
    chosen = local_variables(request, num_cpus)
    if "CUDA_VISIBLE_DEVICES" in inherited:  # GPUs given by a scheduler, or by the user
        chosen = tuple(x for x in chosen if not x.name.startswith("CUDA_"))
    return applied(chosen, variables)


def local_variables(request: LaunchRequest, num_cpus: int) -> tuple[Variable, ...]:
    """Return what all ranks get beside who they are, when this machine runs the whole plan."""
    threads = Variable(
        name="OMP_NUM_THREADS",
        value=str(max(1, num_cpus // request.num_ranks)),
        reason="the ranks share this machine's CPUs",
    )
    gpus: tuple[Variable, ...] = ()
    if request.uses_gpus and len(request.hosts) == 1:
        # By number: this need not be the machine whose UUIDs the plan has.
        ranks = [rank.model_copy(update={"gpu_uuid": None}) for rank in request.plan.ranks]
        gpus = gpu_variables(ranks)
    return (*common_variables(request), threads, *gpus)
