"""Slurm: a batch script whose one step lays its tasks out as a host file says.

`--nodelist` does not order nodes (Slurm sorts it); SLURM_HOSTFILE with `--distribution=arbitrary`
does, and only for a step. GPUs are given per node and bound by nobody: `--gpus-per-task` would show
each task one GPU alone, and NCCL would lose the NVLinks between them.
"""

from epplan.launcher.job import Command, File, Job, Rendering
from epplan.launcher.scripts import header, rank_script, run_lines
from epplan.quoting import shell

BATCH = "job.sbatch"
HOSTS = "hosts.txt"


def render(job: Job) -> Rendering:
    """Return batch script, host file and rank script."""
    hosts = job.head("The host of every rank, in rank order.")
    hosts += "".join(f"{host.name}\n" * len(host.ranks) for host in job.hosts)
    files = (
        File(name=BATCH, text=_batch(job), is_executable=True),
        File(name=HOSTS, text=hosts),
        rank_script(job, rank="SLURM_PROCID", host="SLURMD_NODENAME"),
    )
    return Rendering(files=files, commands=(Command(arguments=("sbatch", job.path(BATCH))),))


def _batch(job: Job) -> str:
    first, _, rest = header(job, "Runs the plan as one Slurm job.").partition("set -e")
    options = [
        f"--job-name={job.name}",
        f"--nodes={len(job.hosts)}",
        f"--ntasks={job.num_ranks}",
        f"--nodelist={','.join(host.name for host in job.hosts)}",
        "--exclusive",
        "--mem=0",  # all of it
    ]
    step = [
        *("srun", f"--ntasks={job.num_ranks}", "--distribution=arbitrary", "--mpi=none"),
        *("--kill-on-bad-exit=1", "--label", f"--cpu-bind={_cpu_bind(job)}"),
    ]
    if job.request.uses_gpus:
        options.append(_gpus(job))
        step.append("--gpu-bind=none")
    step += ["bash", job.path("rank.sh")]
    return (
        first
        + "".join(f"#SBATCH {option}\n" for option in options)
        + f"set -e{rest}"
        + "# one line per rank, in rank order\n"
        + f"export SLURM_HOSTFILE={shell(job.path(HOSTS))}\n"
        + run_lines(job, shell(*step))
    )


def _gpus(job: Job) -> str:
    """Return the request for GPUs: the same for each node, or in all where they differ."""
    counts = [host.num_gpus for host in job.hosts]
    if len(set(counts)) == 1:
        return f"--gpus-per-node={counts[0]}"
    return f"--gpus={sum(counts)}"


def _cpu_bind(job: Job) -> str:
    """Return the NUMA node of each local rank's GPU; Slurm takes one list for all hosts.

    Where hosts differ Slurm binds nothing, and the worker binds itself.
    """
    lists = {tuple(rank.numa for rank in host.ranks) for host in job.hosts}
    nodes = lists.pop()
    if lists or None in nodes or not job.request.uses_gpus:
        return "none"
    return "map_ldom:" + ",".join(map(str, nodes))
