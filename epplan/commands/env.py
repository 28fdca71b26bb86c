"""`epplan env`: what a bug report needs."""

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def env(as_json: bool) -> None:
    """Print versions, hardware and variables, to be pasted into a bug report.

    No host names, users, addresses or GPU serials are in it.
    """
    from epplan.launcher.bug_report import bug_report, bug_report_text
    from epplan.output import print_json

    report = bug_report()
    if as_json:
        print_json(report)
    else:
        click.echo(bug_report_text(report))
