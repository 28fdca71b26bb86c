"""`epplan explain`: a plan as tables."""

from pathlib import Path

import click


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--all-layers", is_flag=True, help="Show every layer, however wide the table.")
@click.option("--json", "as_json", is_flag=True, help="Print the checked plan as one JSON object.")
def explain(plan: Path, all_layers: bool, as_json: bool) -> None:
    """Show where PLAN puts every expert, what it costs, and how good it provably is."""
    from epplan.output import print_json, print_tables
    from epplan.planner.explain import explain as render
    from epplan.planner.plan import read_plan

    document = read_plan(plan)
    if as_json:
        print_json(document.model_dump(mode="json"))
    else:
        print_tables(render(document, every_layer=all_layers))
