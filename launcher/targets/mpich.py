"""MPICH and Intel MPI: Hydra with a machine file, which keeps the order of hosts.

Ranks of a host are consecutive in every plan, so that `host:ranks` per line says all. Both bring
`mpiexec.hydra`, while `mpiexec` may be another MPI's. Intel MPI would pin each rank to cores of its
own choice and, under a batch system, take that one's placement instead of the file's: both are
switched off.
"""

from epplan.launcher.job import Command, File, Job, Rendering
from epplan.launcher.scripts import header, rank_script, run_lines
from epplan.quoting import shell

_START = """\
cd {folder}
export I_MPI_PIN=0 I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=off
"""


def render(job: Job) -> Rendering:
    """Return machine file, rank script and the script that calls mpiexec."""
    places = "".join(f"{host.name}:{len(host.ranks)}\n" for host in job.hosts)
    start = (
        header(job, "Runs the plan with MPICH or Intel MPI.")
        + _START.format(folder=shell(str(job.folder)))
        + run_lines(job, f"mpiexec.hydra -machinefile hosts -n {job.num_ranks} -l bash rank.sh")
    )
    files = (
        File(name="hosts", text=job.head("Hosts in rank order, and their ranks.") + places),
        rank_script(job, rank="PMI_RANK"),
        File(name="start.sh", text=start, is_executable=True),
    )
    return Rendering(files=files, commands=(Command(arguments=("bash", job.path("start.sh"))),))
