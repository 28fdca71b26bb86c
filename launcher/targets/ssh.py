"""ssh to every host of a host file: no scheduler, only a folder that all hosts share.

    start.sh --ssh--> remote.sh on each host --> host-N.sh --> torchrun --> ranks

`start.sh` ends when all hosts have, or when the first fails, and then ends the others. A remote
command does not learn that its ssh is gone unless it reads from it: `remote.sh` does nothing else.
"""

from epplan.launcher.job import Command, File, Job, Rendering
from epplan.launcher.scripts import header, host_script
from epplan.quoting import shell

_START = """\
cd {folder}
hold=$(mktemp -d)
mkfifo "$hold/stdin"
exec 9<> "$hold/stdin"  # open until this script ends: its hosts wait for that
connections=()
end() {{
  trap - EXIT INT TERM
  kill "${{connections[@]}}" 2> /dev/null || true
  exec 9>&-
  rm -rf "$hold"
  wait
}}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
number=0
while read -r host _; do
  case $host in ''|'#'*) continue;; esac
  ${{EPPLAN_SSH:-ssh}} -o BatchMode=yes "$host" \\
    {remote}" host-$number.sh" < "$hold/stdin" 9>&- &
  connections+=($!)
  number=$((number + 1))
done < hosts
for _ in "${{connections[@]}}"; do
  wait -n || exit $?  # the first failure ends all
done
"""

_REMOTE = """\
cd {folder}
bash "$1" < /dev/null &
ranks=$!
trap 'kill "$ranks" 2> /dev/null || true' TERM INT HUP
( cat > /dev/null; kill "$ranks" 2> /dev/null ) <&0 &
watch=$!
code=0
wait "$ranks" || code=$?
kill "$watch" 2> /dev/null || true
exit "$code"
"""


def render(job: Job) -> Rendering:
    """Return the host file, a script per host, and the two that connect them."""
    slots = "".join(f"{host.name} slots={len(host.ranks)}\n" for host in job.hosts)
    folder = shell(str(job.folder))
    remote = shell(f"bash {shell(job.path('remote.sh'))}")
    files = (
        File(name="hosts", text=job.head("Hosts in rank order, and their ranks.") + slots),
        *(host_script(job, host, job.max_restarts) for host in job.hosts),
        File(
            name="remote.sh",
            text=header(job, "Runs a host's script until it ends or the connection does.")
            + _REMOTE.format(folder=folder),
            is_executable=True,
        ),
        File(
            name="start.sh",
            text=header(job, "Starts all hosts over ssh; the first to fail ends all.")
            + _START.format(folder=folder, remote=remote),
            is_executable=True,
        ),
    )
    return Rendering(files=files, commands=(Command(arguments=("bash", job.path("start.sh"))),))
