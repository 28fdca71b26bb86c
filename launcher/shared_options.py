"""Options that the worker and the benchmark share, and how options get on a command.

No torch here: the command line imports this.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Option = Callable[[Any], Any]

BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "gloo", "nccl"]),
    default="auto",
    show_default=True,
    help="nccl computes on GPUs, gloo on the CPU; auto: nccl where every rank has a GPU.",
)
SEQUENCES = click.option(
    "--sequences", type=click.IntRange(1), default=2, show_default=True, help="Per rank."
)
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of weights and inputs.")

ROUTER_SKEW = click.option(
    "--router-skew",
    metavar="SIGMA",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Seeded routers only: prefer some experts, about as traffic lognormal:SIGMA does.",
)


def number(name: str, default: int, text: str, least: int = 1) -> Option:
    """Return an option for a whole number with a default."""
    return click.option(
        name, type=click.IntRange(least), default=default, show_default=True, help=text
    )


def switch(name: str, text: str, *, default: bool = False) -> Option:
    """Return an option `--name/--no-name`."""
    return click.option(f"--{name}/--no-{name}", default=default, show_default=True, help=text)


def add_options(options: Iterable[Option], command: Decorated) -> Decorated:
    """Add options to a click command, in their order."""
    for option in reversed(tuple(options)):
        command = option(command)
    return command
