"""The environment of every rank: torchrun's contract, without its elastic agent."""

from collections.abc import Mapping, Sequence

from epplan.planner.plan import Plan


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
    inherited: Mapping[str, str], plan: Plan, *, num_local_ranks: int, num_cpus: int
) -> dict[str, str]:
    """Return the variables all ranks of this machine share.

    Args:
        inherited: the launcher's own environment; what the user set there is kept.
        plan: names the GPUs.
        num_local_ranks: ranks on this machine.
        num_cpus: CPUs they share.
    """
    # An agent around the launcher (epplan inside torchrun) would make rank 0 look for the agent's
    # store instead of opening its own, and all ranks would wait for ever.
    variables = {
        name: value for name, value in inherited.items() if not name.startswith("TORCHELASTIC_")
    }
    variables.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus // num_local_ranks)))
    if "CUDA_VISIBLE_DEVICES" not in variables and len({rank.host for rank in plan.ranks}) == 1:
        # CUDA's own order is by speed, the plan counts by PCI bus; local rank i is visible GPU i.
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(rank.gpu_index) for rank in plan.ranks)
    return variables
