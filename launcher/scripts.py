"""The shell scripts of a job: one that starts a host's ranks, one that becomes a rank.

Both are plain bash without anything to install, so that a person can read what will run.
"""

from collections.abc import Iterable

from epplan.quoting import comment, shell

from .environment import Variable
from .identity import HOST_VARIABLE
from .job import FINAL_ERROR_FILE, PLAN_FILE, File, Job, JobHost


def header(job: Job, what: str) -> str:
    """Return the first lines of a script."""
    return f"#!/usr/bin/env bash\n{job.head(what)}set -euo pipefail\n"


def exports(variables: Iterable[Variable], indent: str = "") -> str:
    """Return the lines that set variables, each below its reason."""
    lines = []
    for variable in variables:
        assignment = f"export {variable.name}={shell(variable.value)}"
        if not variable.is_fixed:
            assignment = f"[[ -v {variable.name} ]] || {assignment}"
        # Not every line: a value may have several, and has to stay what it is.
        lines.append(f"{indent}# {comment(variable.reason)}\n{indent}{assignment}\n")
    return "".join(lines)


def worker_command(job: Job) -> list[str]:
    """Return the module and the arguments of every rank, for the job's interpreter."""
    result = [f"--result={job.result}"] if job.result else []
    return ["-m", job.request.module, *job.request.options, *result, job.path(PLAN_FILE)]


def host_script(job: Job, host: JobHost, max_restarts: int) -> File:
    """Return the script that starts all ranks of one host through torchrun's static rendezvous.

    `--node-rank` counts only there: c10d, which most recipes name, sorts hosts as text. Each host's
    torchrun starts its own ranks again: one that dies makes those of all hosts fail.

    Args:
        job: the job.
        host: the host.
        max_restarts: of torchrun.
    """
    count = len(host.ranks)
    torchrun = [
        *("-m", "torch.distributed.run", "--rdzv-backend=static", f"--nnodes={len(job.hosts)}"),
        f"--node-rank={host.index}",
        *(f"--nproc-per-node={count}", f"--master-addr={job.master_address}"),
        f"--master-port={job.master_port}",
        *([f"--max-restarts={max_restarts}"] if max_restarts else []),
        *worker_command(job),
    ]
    last = host.first_rank + count - 1
    ranks = f"rank {last}" if count == 1 else f"ranks {host.first_rank} to {last}"
    text = (
        header(job, f"Starts {ranks} on host {host.name}.")
        + exports([*job.variables, *host.variables])
        + (_forget(job) if host.index == 0 else "")
        + "# the ranks of a host share its CPUs; torchrun would give each a single thread\n"
        + f"threads=$(( $(nproc) / {count} ))\n"
        + "[[ -v OMP_NUM_THREADS ]] || export OMP_NUM_THREADS=$(( threads > 1 ? threads : 1 ))\n"
        + f"exec {shell(job.python)} {_wrapped(torchrun)}\n"
    )
    return File(name=host_script_name(host), text=text, is_executable=True)


def host_script_name(host: JobHost) -> str:
    """Return the name of a host's script."""
    return f"host-{host.index}.sh"


def rank_script(job: Job, *, rank: str, host: str | None = None) -> File:
    """Return the script that every process a scheduler starts runs, and that becomes its rank.

    Args:
        job: the job.
        rank: the scheduler's variable that holds the rank.
        host: the scheduler's variable that holds its name of the machine, if it has one.
    """
    text = header(job, "Becomes one rank; the scheduler says which.")
    text += f"rank=${{{rank}:?this script is started by the scheduler}}\n"
    text += "# of a torchrun around the scheduler, whose store these ranks are not to use\n"
    text += "unset ${!TORCHELASTIC_@}\n"
    text += exports(job.variables)
    for number, entry in enumerate(job.hosts):
        end = entry.first_rank + len(entry.ranks)
        text += f"{'el' if number else ''}if (( rank < {end} )); then  # host {entry.name}\n"
        text += f"  first={entry.first_rank} count={len(entry.ranks)} group={entry.index}\n"
        text += exports(entry.variables, indent="  ")
    text += (
        f'else\n  echo "rank $rank: the plan has {job.num_ranks} ranks" >&2\n  exit 2\nfi\n'
        f'export RANK="$rank" LOCAL_RANK="$(( rank - first ))" LOCAL_WORLD_SIZE="$count"\n'
        f'export WORLD_SIZE={job.num_ranks} GROUP_WORLD_SIZE={len(job.hosts)} GROUP_RANK="$group"\n'
        f"export MASTER_ADDR={shell(job.master_address)} MASTER_PORT={job.master_port}\n"
    )
    if host is not None:
        text += f'export {HOST_VARIABLE}="${host}"\n'
    text += f"exec {shell(job.python)} {_wrapped(worker_command(job))}\n"
    return File(name="rank.sh", text=text, is_executable=True)


_LOOP = """\
# starts all ranks again after a crash or a kill, not after an error that would come again
restart=0 stopped= ranks=
trap 'stopped=130; kill $ranks 2> /dev/null || true' INT
trap 'stopped=143; kill $ranks 2> /dev/null || true' TERM
while [[ ! $stopped ]]; do
  code=0
  {command} &
  ranks=$!
  wait "$ranks" || code=$?
  if [[ $stopped ]]; then break; fi
  if [[ $code != 0 && -e {final_error} ]]; then exit "$(< {final_error})"; fi
  if [[ $code == 0 ]] || (( restart == {max_restarts} )); then exit "$code"; fi
  restart=$(( restart + 1 ))
  echo "the ranks ended with exit code $code; restart $restart of {max_restarts}" >&2
done
wait "$ranks" || true  # they end first
exit "$stopped"
"""


def run_lines(job: Job, command: str) -> str:
    """Return the end of a script: it becomes `command`, or runs it until it needs no restart.

    Args:
        job: the job.
        command: starts all ranks, and ends when they have.
    """
    if not job.max_restarts:
        return f"exec {command}\n"
    return _forget(job) + _LOOP.format(
        command=command,
        final_error=shell(job.path(FINAL_ERROR_FILE)),
        max_restarts=job.max_restarts,
    )


def _forget(job: Job) -> str:
    """Return the line by which a job that is started anew knows nothing of the time before.

    A job that Slurm has put in its queue again, after a node failed, is not started anew.
    """
    if not job.forgotten:
        return ""
    return f"(( ${{SLURM_RESTART_COUNT:-0}} )) || rm -f {shell(*map(str, job.forgotten))}\n"


def _wrapped(words: list[str]) -> str:
    """Return quoted words, one option per line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shell(*line) for line in lines)
