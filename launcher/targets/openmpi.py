"""Open MPI 4, and 5 with PRRTE: one rank file in the syntax both read.

A rank file binds cores, not GPUs: the rank script gives the GPU. Its slots say nothing either
(`--bind-to none`): they count packages, and what matters is the NUMA node of the GPU, to which the
worker binds itself.
"""

from epplan.launcher.job import Command, File, Job, Rendering
from epplan.launcher.scripts import header, rank_script, run_lines
from epplan.quoting import shell

# Names are relative, because PRRTE takes a colon or comma in a path for its own syntax.
_START = """\
cd {folder}
case "$(mpirun --version 2> /dev/null | head -n 1)" in
  *Open*' 4.'*) map=(--rankfile rankfile) ;;
  *Open*) map=(--map-by rankfile:file=rankfile) ;;
  *) echo "mpirun is not Open MPI's: $(command -v mpirun)" >&2; exit 2 ;;
esac
"""
_RUN = 'mpirun --hostfile hosts "${map[@]}" --bind-to none --tag-output'


def render(job: Job) -> Rendering:
    """Return host file, rank file, rank script and the script that calls mpirun."""
    slots = "".join(f"{host.name} slots={len(host.ranks)}\n" for host in job.hosts)
    places = "".join(
        f"rank {rank.rank}={host.name} slot=0:*\n" for host in job.hosts for rank in host.ranks
    )
    start = (
        header(job, "Runs the plan with Open MPI 4 or 5.")
        + _START.format(folder=shell(str(job.folder)))
        + run_lines(job, f"{_RUN} -n {job.num_ranks} bash rank.sh")
    )
    files = (
        File(name="hosts", text=job.head("Hosts in rank order, and their ranks.") + slots),
        File(name="rankfile", text=job.head("The host of every rank.") + places),
        rank_script(job, rank="OMPI_COMM_WORLD_RANK"),
        File(name="start.sh", text=start, is_executable=True),
    )
    return Rendering(files=files, commands=(Command(arguments=("bash", job.path("start.sh"))),))
