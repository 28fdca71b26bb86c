"""`epplan topo`: what the cluster is."""

import click


@click.group()
def topo() -> None:
    """Read a cluster's topology."""


@topo.command()
@click.argument("source")
@click.option(
    "--gpu", "gpu_model", metavar="MODEL", help="GPU model where SOURCE does not tell it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(source: str, gpu_model: str | None, as_json: bool) -> None:
    """Show what SOURCE describes, what was assumed, and what is odd about it.

    SOURCE is a bundled cluster's name, a cluster file (YAML) or a NCCL topology XML; files are
    known by their content.
    """
    from epplan.output import print_json, print_tables
    from epplan.topologies.show import summary, tables
    from epplan.topologies.sources import load_cluster

    cluster = load_cluster(source, gpu_model)
    if as_json:
        print_json(summary(cluster))
    else:
        print_tables(tables(cluster))
