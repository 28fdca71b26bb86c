"""What to start: one value, from which every target renders its environments and commands."""

from dataclasses import dataclass
from pathlib import Path

from epplan.planner.plan import Plan, read_plan

WORKER_MODULE = "epplan.runtime.worker"
MAX_HOSTS_NAMED = 4
CPU_MODEL = "cpu-"  # hardware profiles of CPU ranks begin so


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """A checked plan and what its ranks shall do with it.

    Args:
        plan: the plan in `plan_path`.
        plan_path: the file every rank reads.
        options: options of the worker, passed to every rank as they are.
        environment: names and values of variables the user wants in every rank.
        module: the module whose `main(arguments)` is the rank.
    """

    plan: Plan
    plan_path: Path
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    module: str = WORKER_MODULE

    @property
    def num_ranks(self) -> int:
        """Number of processes to start."""
        return self.plan.world_size

    @property
    def hosts(self) -> list[str]:
        """Hosts of the plan, in rank order."""
        return list(dict.fromkeys(rank.host for rank in self.plan.ranks))

    @property
    def uses_gpus(self) -> bool:
        """Whether ranks compute on GPUs: not with gloo, and not on a cluster of CPU ranks."""
        on_cpus = all(rank.gpu_model.startswith(CPU_MODEL) for rank in self.plan.ranks)
        return not on_cpus and "--backend=gloo" not in self.options

    def worker_arguments(self) -> list[str]:
        """Return the arguments of every rank.

        The path is absolute, so that no file name can look like an option.
        """
        return [*self.options, str(self.plan_path.absolute())]

    def place(self, rank: int) -> str:
        """Return where the plan puts `rank`, in words."""
        planned = self.plan.ranks[rank]
        return f"host {planned.host}, GPU {planned.gpu_index}"

    def title(self) -> str:
        """Return plan, size and hosts in one line."""
        hosts = self.hosts
        names = ", ".join(hosts)
        if len(hosts) > MAX_HOSTS_NAMED:
            names = f"{hosts[0]} ... {hosts[-1]}"
        plural = "host" if len(hosts) == 1 else f"{len(hosts)} hosts"
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return f"plan {self.plan_path} ({self.plan.sha256()[:12]}): {ranks} on {plural} {names}"


def request_from_plan(
    plan_path: Path,
    *,
    options: tuple[str, ...] = (),
    environment: tuple[tuple[str, str], ...] = (),
    module: str = WORKER_MODULE,
) -> LaunchRequest:
    """Return the request to start the plan in `plan_path`.

    Raises:
        InputError: the plan is missing, truncated, edited or inconsistent.
    """
    return LaunchRequest(
        plan=read_plan(plan_path),
        plan_path=plan_path,
        options=options,
        environment=environment,
        module=module,
    )
