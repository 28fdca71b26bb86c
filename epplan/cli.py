"""The command `epplan`: finds the subcommand, turns errors into messages and exit codes."""

import importlib
import os
import sys

import click

import epplan
from epplan.errors import EpplanError

INTERRUPTED = 130

_COMMANDS = {
    "topo": "epplan.commands.topo:topo",
    "solve": "epplan.commands.solve:solve",
    "explain": "epplan.commands.explain:explain",
    "rebalance": "epplan.commands.rebalance:rebalance",
    "replan": "epplan.commands.replan:replan",
    "launch": "epplan.commands.launch:launch",
    "simulate": "epplan.commands.simulate:simulate",
    "bench": "epplan.commands.bench:bench",
    "doctor": "epplan.commands.doctor:doctor",
    "env": "epplan.commands.env:env",
}


class _LazyGroup(click.Group):
    """Imports a subcommand only when it is needed; the heavy imports are inside the commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a subcommand."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(epplan.__version__, prog_name="epplan")
def cli() -> None:
    """Plan which GPU holds which expert, prove how good that is, and launch it.

    \b
    Examples:
      epplan topo show dgx-h100-2
      epplan solve --topology dgx-h100-2 --model reference -o plan.json
      epplan explain plan.json
      epplan launch plan.json --to local
      epplan bench plan.json --baseline tp8pp2

    \b
    Exit codes: 0 ok, 1 internal error, 2 usage or invalid input, 3 infeasible,
    4 limit hit with a feasible plan written, 5 limit hit without one, 6 findings,
    7 a rank hangs, 130 interrupted.
    """


def main() -> None:
    """Run the command line; the console script and `python -m epplan`."""
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EpplanError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("EPPLAN_DEBUG"):
            raise
        click.echo(f"error: internal error: {type(error).__name__}: {error}", err=True)
        click.echo("hint: EPPLAN_DEBUG=1 shows the traceback; please report it", err=True)
        return 1
    return result if isinstance(result, int) else 0
