"""`epplan topo`: what the cluster is."""

from pathlib import Path

import click

_OUTPUT = click.Path(path_type=Path, dir_okay=False)
FINDINGS = 6


@click.group()
def topo() -> None:
    """Read a cluster's topology, ask this machine for it, check it and measure it."""


@topo.command()
@click.argument("source")
@click.option(
    "--gpu", "gpu_model", metavar="MODEL", help="GPU model where SOURCE does not tell it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(source: str, gpu_model: str | None, as_json: bool) -> None:
    """Show what SOURCE describes, what was assumed, and what is odd about it.

    SOURCE is a bundled cluster's name, `local` for this machine, or a file, known by its content:
    a cluster file, a host file of `epplan topo discover`, or another tool's output.
    """
    from epplan.output import print_json, print_tables
    from epplan.topologies.show import summary, tables
    from epplan.topologies.sources import load_cluster

    cluster = load_cluster(source, gpu_model)
    if as_json:
        print_json(summary(cluster))
    else:
        print_tables(tables(cluster))


@topo.command()
@click.option("-o", "--output", type=_OUTPUT, help="The host file; stdout without it.")
def discover(output: Path | None) -> None:
    """Ask NVML and sysfs what this machine is and write all answers down.

    Started by srun, torchrun or mpirun it writes one file for all hosts: rank 0 gathers them
    through the folder OUTPUT.parts, which all hosts have to share.

    \b
    Examples:
      epplan topo discover -o host.json
      srun --ntasks-per-node=1 epplan topo discover -o hosts.json
    """
    import os

    from epplan.errors import InputError
    from epplan.output import talk
    from epplan.topologies.live.discover import discover_host, hosts_file
    from epplan.topologies.live.gather import find_place, gather
    from epplan.topologies.live.host_file import hosts_text, write_hosts
    from epplan.topologies.live.host_graph import hosts_graph

    place = find_place(os.environ)
    if output is None and place.count > 1:
        raise InputError(f"{place.count} ranks need -o FILE, in a folder that all hosts share")
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written: folder {output.parent} does not exist")
    hosts = [discover_host()]
    if output is not None and place.count > 1:
        gathered = gather(hosts[0], place, output)
        if gathered is None:
            return
        hosts = gathered
    file = hosts_file(hosts)
    if output is None:
        click.echo(hosts_text(file), nl=False)
        return
    write_hosts(output, file)
    cluster = hosts_graph("discovered", *hosts)
    for line in cluster.assumed:
        talk(f"assumed: {line}")
    for line in cluster.warnings:
        talk(f"warning: {line}")
    gpus = sum(len(host.gpus) for host in hosts)
    talk(f"wrote {output}: {len(hosts)} hosts, {gpus} GPUs")


@topo.command()
@click.argument("source")
@click.argument("other", required=False)
@click.option(
    "--gpu", "gpu_model", metavar="MODEL", help="GPU model where SOURCE does not tell it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(source: str, other: str | None, gpu_model: str | None, as_json: bool) -> int:
    """Check SOURCE for faults, and against OTHER for what the two say differently.

    Every line is pass, warn or fail, with the remedy; anything but pass ends in exit code 6.

    \b
    Examples:
      epplan topo check hosts.json
      epplan topo check topology.conf ibnetdiscover.out
    """
    from epplan.output import print_json, print_tables, talk
    from epplan.topologies.check import check_against, check_cluster
    from epplan.topologies.check_report import joined
    from epplan.topologies.check_table import report_table
    from epplan.topologies.sources import load_cluster

    clusters = [load_cluster(name, gpu_model) for name in (source, other) if name]
    reports = [check_cluster(cluster) for cluster in clusters]
    if len(clusters) == 2:
        reports.append(check_against(*clusters))
    report = joined(reports)
    if as_json:
        print_json({"sources": [source, *([other] if other else [])], **report.to_json()})
    else:
        print_tables(report_table(report))
        counts = report.counts()
        talk(", ".join(f"{count} {level}" for level, count in counts.items()))
    return FINDINGS if report.has_findings else 0


@topo.command()
@click.argument("hosts", nargs=-1, required=True)
@click.option(
    "--fabric", metavar="FILE", help="Port GUIDs and switches: ibnetdiscover, iblinkinfo."
)
@click.option("--gpu", "gpu_model", metavar="MODEL", help="GPU model where HOSTS do not tell it.")
@click.option("--name", help="Of the cluster; by default the output's.")
@click.option("-o", "--output", type=_OUTPUT, required=True, help="The cluster file.")
def merge(
    hosts: tuple[str, ...],
    fabric: str | None,
    gpu_model: str | None,
    name: str | None,
    output: Path,
) -> None:
    """Join HOSTS to their leafs and spines by port GUID and write one cluster file.

    \b
    Example:
      epplan topo merge host*.json --fabric ibnetdiscover.out -o cluster.yaml
    """
    from epplan.files import write_atomically
    from epplan.output import talk
    from epplan.quoting import made_by
    from epplan.topologies.cluster_writer import cluster_text
    from epplan.topologies.merge import merge as join
    from epplan.topologies.sources import load_cluster

    clusters = [load_cluster(source, gpu_model) for source in hosts]
    cluster = join(name or output.stem, clusters, load_cluster(fabric) if fabric else None)
    write_atomically(output, cluster_text(cluster, f"written by {made_by()}"))
    for line in cluster.warnings:
        talk(f"warning: {line}")
    talk(f"wrote {output}: {len(cluster.by_host())} hosts, {len(cluster.gpus())} GPUs")


@topo.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--topology", metavar="SOURCE", help="By default the one PLAN was made from.")
@click.option(
    "--times", type=_OUTPUT, help="Times from epplan.runtime.link_benchmark; nothing is launched."
)
@click.option("-o", "--output", type=_OUTPUT, help="The cluster file with what was measured.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "gloo", "nccl"]),
    default="auto",
    show_default=True,
    help="nccl between GPUs, gloo between CPU ranks.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(4096),
    help="Of the largest message; by default 2 MiB with gloo and 128 MiB with nccl.",
)
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of every transfer."
)
@click.option(
    "--slow",
    "slow_below",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="A pair is slow below this share of its class's median bandwidth.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def measure(
    plan: Path,
    topology: str | None,
    times: Path | None,
    output: Path | None,
    backend: str,
    max_bytes: int | None,
    repeats: int,
    slow_below: float,
    as_json: bool,
) -> int:
    """Time transfers between the ranks of PLAN and fit latency and bandwidth per path type.

    All ranks run on this machine, so PLAN has to be for one host. For several, start the
    benchmark on them and give the result; pairs much slower than their class end in exit code 6.

    \b
    Examples:
      epplan topo measure plan.json -o measured.yaml
      srun python -m epplan.runtime.link_benchmark plan.json --result times.json
      epplan topo measure plan.json --times times.json -o measured.yaml
    """
    from epplan.files import write_atomically
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.plan import read_plan
    from epplan.quoting import made_by
    from epplan.topologies.cluster_writer import measured_text
    from epplan.topologies.measure import measure as fit_times
    from epplan.topologies.measure import parse_times, read_times
    from epplan.topologies.measure_table import measurement_json, measurement_table
    from epplan.topologies.sources import load_cluster

    source = topology or read_plan(plan).inputs.topology.source
    cluster = load_cluster(source)
    if times is not None:
        found = read_times(times)
    else:
        options = [f"--backend={backend}", f"--repeats={repeats}"]
        options += [f"--max-bytes={max_bytes}"] if max_bytes else []
        found = parse_times(_time_links(plan, tuple(options)), "the benchmark's result")
    measurement = fit_times(cluster, found, slow_below)
    if output is not None:
        head = f"written by {made_by()}"
        write_atomically(output, measured_text(source, cluster, head, measurement.rows))
        talk(f"wrote {output}")
    if as_json:
        print_json(measurement_json(measurement, found))
    else:
        print_tables(measurement_table(measurement, found))
    return FINDINGS if measurement.slow else 0


def _time_links(plan: Path, options: tuple[str, ...]) -> object:
    """Run the benchmark on all ranks of a plan, here, and return its result."""
    import importlib.util

    from epplan.errors import InputError
    from epplan.launcher.request import request_from_plan
    from epplan.launcher.targets.local import run_local

    request = request_from_plan(plan, options=options, module="epplan.runtime.link_benchmark")
    if len(request.hosts) > 1:
        raise InputError(
            f"plan {plan} is for {len(request.hosts)} hosts; here only this machine's memory would "
            "be timed, not the network",
            hints=[
                f"srun python -m epplan.runtime.link_benchmark {plan} --result times.json",
                f"then: epplan topo measure {plan} --times times.json",
            ],
        )
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "timing transfers needs torch, which is not installed",
            hints=["pip install 'epplan[runtime]'"],
        )
    run = run_local(request, lambda line, is_error: click.echo(line, err=True))
    if run.interrupted_by is not None:
        click.get_current_context().exit(128 + run.interrupted_by)
    return run.result
